"""The weights of a model folder as they lie on disk: which tensor is in which file, and where in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.errors import DamagedWeightsError, QuickmergeError, UnsupportedModelError, first_sentence
from quickmerge.models.folder import weight_files
from quickmerge.models.weights import read_header

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CHUNK",
    "FLOATS",
    "INDEX",
    "WEIGHTS",
    "Checkpoint",
    "Entry",
    "Matrices",
    "Piece",
    "copy_piece",
    "file_sha256",
    "find_matrices",
    "open_checkpoint",
    "read_entries",
    "tensor_piece",
    "write_safetensors",
]


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHUNK = 16 * 2**20
"""Bytes that are held at once while a tensor is copied from file to file."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    """As safetensors writes it: ``F32``, ``BF16``..."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset of its first byte, from the start of the file."""
    end: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.start

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, as they lie in the file, at most ``CHUNK`` at a time."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left:
                data = file.read(min(left, CHUNK))
                if not data:
                    raise DamagedWeightsError(f"{self.file} ends before {self.name} does: copy or download it again")
                left -= len(data)
                yield data


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a model folder, none of them read."""

    folder: Path
    files: dict[str, tuple[Entry, ...]]
    """By file name; the tensors of a file in the order in which they lie in it."""
    sharded: bool
    """Whether an index lists the files."""

    def entries(self) -> Iterator[Entry]:
        """Every tensor."""
        for entries in self.files.values():
            yield from entries

    def find(self, name: str) -> Entry | None:
        """The tensor of this name, None if there is none."""
        return next((entry for entry in self.entries() if entry.name == name), None)

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype that it was saved in.

        Raises:
            QuickmergeError: there is none of this name.
        """
        from safetensors import safe_open

        entry = self.find(name)
        if entry is None:
            raise QuickmergeError(f"{self.folder} has no tensor {name}")
        with safe_open(entry.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def open_checkpoint(folder: Path) -> Checkpoint:
    """Look at the headers of a model folder's weights.

    transformers reads ``model.safetensors`` where there is one, and the files of the index otherwise; so does this.

    Raises:
        QuickmergeError: the weights are not safetensors.
        DamagedWeightsError: a file is missing, truncated or garbled.
    """
    paths = weight_files(folder)
    if not paths:
        raise QuickmergeError(
            f"{folder} must hold its weights as safetensors ({WEIGHTS} or {INDEX}): load the model with transformers "
            "and save it again with save_pretrained"
        )
    sharded = paths != [folder / WEIGHTS]
    return Checkpoint(folder, {path.name: read_entries(path) for path in paths}, sharded)


def read_entries(path: Path) -> tuple[Entry, ...]:
    """The tensors of one safetensors file, in the order in which they lie in it.

    Raises:
        DamagedWeightsError: the file is truncated or garbled.
    """
    entries = [Entry(name, at.dtype, at.shape, path, at.start, at.end) for name, at in read_header(path).items()]
    return tuple(sorted(entries, key=lambda entry: (entry.start, entry.end)))


# A safetensors file written tensor by tensor, in bounded memory, and hashed while it is written.


NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "uint8": "U8"}


@dataclass(frozen=True)
class Piece:
    """One tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    """In bytes."""
    chunks: Callable[[], Iterator[bytes]]
    """Its bytes, a part at a time."""


def copy_piece(entry: Entry) -> Piece:
    """A tensor of another file, whose bytes are taken over unread: whatever its dtype, it stays as it is."""
    return Piece(entry.name, entry.dtype, entry.shape, entry.size, entry.chunks)


def tensor_piece(name: str, tensor: Tensor) -> Piece:
    """A tensor in memory."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    raw = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(raw), CHUNK):
            yield raw[start : start + CHUNK].numpy().tobytes()

    dtype = NAMES[str(tensor.dtype).removeprefix("torch.")]
    return Piece(name, dtype, tuple(tensor.shape), len(raw), chunks)


def write_safetensors(path: Path, pieces: Sequence[Piece], advance: Callable[[int], None] | None = None) -> str:
    """Write a file; the caller sees to what happens when the disk is full.

    Args:
        path: the file.
        pieces: its tensors, which are written in this order. Whoever takes over the order of a safetensors file, in
            which the wider dtypes come first, keeps every tensor aligned.
        advance: told how many bytes were written, after each part.

    Returns:
        The sha256 of the file.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    at = 0
    for piece in pieces:
        header[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [at, at + piece.size]}
        at += piece.size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data begin at a multiple of eight
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(head).to_bytes(8, "little"), head):
            digest.update(part)
            file.write(part)
        for piece in pieces:
            for part in piece.chunks():
                digest.update(part)
                file.write(part)
                if advance is not None:
                    advance(len(part))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in parts."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


# Which tensors of a model hold a row for every token, found by asking the model and never by a list of names.


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

    from quickmerge.models.read import transformers_silenced

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
