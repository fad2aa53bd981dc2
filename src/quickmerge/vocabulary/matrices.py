"""Which tensors of a model hold a row for every token, found by asking the model and never by a list of names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quickmerge.errors import QuickmergeError, UnsupportedModelError, first_sentence
from quickmerge.vocabulary.checkpoint import Checkpoint, Entry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FLOATS", "Matrices", "find_matrices"]

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of safetensors in which rows can be averaged."""


@dataclass(frozen=True)
class Matrices:
    """The tensors of a checkpoint that depend on the vocabulary."""

    input: Entry
    """``(V, d)``: what a token is read as."""
    output: Entry | None
    """``(V, d)``: what it is predicted by; None where the input matrix does that too."""
    bias: Entry | None
    """``(V,)``, added to the logits."""
    twins: tuple[Entry, ...] = ()
    """Further names under which a tied matrix was saved a second time."""

    @property
    def rows(self) -> int:
        """How many tokens there is room for."""
        return self.input.shape[0]


def find_matrices(checkpoint: Checkpoint, config: Any, *, donor: bool = False) -> Matrices:
    """Find the matrices of a model, which is built without its weights to be asked.

    Args:
        checkpoint: its weights.
        config: its config, as transformers reads it.
        donor: it only lends its matrices: it may be an encoder, and may have no output matrix.

    Raises:
        UnsupportedModelError: something else in it depends on the vocabulary, or it says not where its matrices are.
        QuickmergeError: they are not saved as plain numbers.
    """
    if not donor:
        _check_causal(checkpoint, config)
    model, other = (_without_weights(config, extra, donor=donor) for extra in (0, 1))
    ask = _parameters(model)
    if "input" not in ask:
        raise UnsupportedModelError(f"{type(model).__name__} has no input embeddings that can be replaced")
    bigger = {name: value.shape for name, value in other.state_dict().items()}
    grown = {name for name, value in model.state_dict().items() if bigger.get(name) != value.shape}
    if not donor and (foreign := sorted(grown - set(ask.values()) - {ask["input"]})):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps more for each token than embeddings and an output matrix ({foreign[0]}): "
            "its tokenizer can't be replaced"
        )
    rows = int(model.get_parameter(ask["input"]).shape[0])
    prefix = str(getattr(model, "base_model_prefix", ""))
    entries = {entry.name: entry for entry in checkpoint.entries()}
    found = {role: hit for role, name in ask.items() if (hit := _by_name(name, prefix, entries, rows))}
    tied = "output" in ask and _is_tied(model)
    for role in ("output", "input", "bias"):
        if role in ask and role not in found and not (tied and role == "output"):
            hit = _left_over(role, model.get_parameter(ask[role]).shape, entries, found)
            if hit is not None:
                found[role] = hit
    if tied and "input" not in found and "output" in found:  # only the other name of the shared tensor was saved
        found["input"] = found.pop("output")
    if "input" not in found:
        raise UnsupportedModelError(
            f"{checkpoint.folder} has no tensor for {ask['input']} of {type(model).__name__}: it was saved in a layout "
            "that is not known"
        )
    output, twins = found.get("output"), ()
    if output is None and not tied and not donor and "output" in ask:
        raise UnsupportedModelError(f"{checkpoint.folder} has no tensor for {ask['output']} of {type(model).__name__}")
    if output is not None and tied and output != found["input"] and _equal(checkpoint, found["input"], output):
        output, twins = None, (output,)  # type: ignore[assignment]
    for entry in (found["input"], output):
        if entry is not None and entry.dtype not in FLOATS:
            raise QuickmergeError(
                f"{entry.name} in {entry.file} must be saved in one of {', '.join(FLOATS)}, got {entry.dtype}"
            )
    return Matrices(found["input"], output, found.get("bias"), twins)


def _check_causal(checkpoint: Checkpoint, config: Any) -> None:
    from quickmerge.models.compat import causal_lm_names

    # an encoder such as BERT can be opened as a causal model too, but it was not trained as one
    saved = list(config.architectures or [])
    if saved and not set(saved) & set(causal_lm_names().values()):
        raise UnsupportedModelError(
            f"{checkpoint.folder} is not a causal language model ({saved[0]}): give one that AutoModelForCausalLM opens"
        )


def _without_weights(config: Any, extra: int, *, donor: bool) -> Any:
    """The model on the meta device, its vocabulary enlarged by ``extra``: what grows with it depends on it."""
    import copy

    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from quickmerge.models.console import transformers_silenced

    settings = copy.deepcopy(config)
    text = settings.get_text_config()
    if not isinstance(getattr(text, "vocab_size", None), int):
        raise UnsupportedModelError(f"{type(config).__name__} says not how many tokens there are (vocab_size)")
    for part in {id(one): one for one in (text, settings)}.values():
        for key, value in part.to_dict().items():
            # some families size a second table for each token by a name of its own
            if "vocab_size" in key and isinstance(value, int):
                setattr(part, key, value + extra)
    with transformers_silenced(), torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
        except ValueError as error:
            if not donor:
                kind = type(config).__name__
                raise UnsupportedModelError(
                    f"{kind} is not a causal language model ({first_sentence(error)})"
                ) from None
            return AutoModel.from_config(settings, trust_remote_code=False)


def _parameters(model: Any) -> dict[str, str]:
    """Role -> name of the parameter in the model."""
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for role, module in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        if module is not None and id(module) in names and getattr(module, "weight", None) is not None:
            found[role] = f"{names[id(module)]}.weight"
            if role == "output" and getattr(module, "bias", None) is not None:
                found["bias"] = f"{names[id(module)]}.bias"
    return found


def _is_tied(model: Any) -> bool:
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def _by_name(name: str, prefix: str, entries: dict[str, Entry], rows: int) -> Entry | None:
    # Checkpoints of the bare model lack the prefix that the class with a head puts before its names, and the reverse.
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        entry = entries.get(candidate)
        if entry is not None and entry.shape[0] == rows:
            return entry
    return None


def _left_over(role: str, shape: Any, entries: dict[str, Entry], found: dict[str, Entry]) -> Entry | None:
    """The one tensor of the right shape that nobody has claimed: some families are saved under older names."""
    taken = set(found.values())
    ends = ".bias" if role == "bias" else ".weight"
    fitting = [e for e in entries.values() if e.shape == tuple(shape) and e.name.endswith(ends) and e not in taken]
    return fitting[0] if len(fitting) == 1 else None


def _equal(checkpoint: Checkpoint, one: Entry, other: Entry) -> bool:
    import torch

    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    left: Tensor = checkpoint.read(one.name)
    return torch.equal(left, checkpoint.read(other.name))
