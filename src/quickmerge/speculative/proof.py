"""Which models can speculate, and how: tried out once for each, on a few tokens."""

from __future__ import annotations

import inspect
import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.models.adapters import check_adapters, check_rows, generating_wrapper
from quickmerge.models.attachment import aside
from quickmerge.models.compat import (
    DynamicLayer,
    attention_implementation,
    cache_argument,
    cache_name,
    device_of,
    fresh_cache,
    takes_cache,
)
from quickmerge.models.decoder import IMPLEMENTATIONS, PREFIX, check_chains, check_trees, layer_window
from quickmerge.models.quantized import reads_together
from quickmerge.speculative.chains import Chains, behind
from quickmerge.speculative.target import Columns, Target
from quickmerge.speculative.tree import Tree, pack

__all__ = ["check_target"]

_PROVEN: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""For each model that passed why it reads no trees but chains; empty for one that reads trees."""

NEAR, EXACT, FAR = 0.1, 1e-3, 0.6
"""How far logits may be apart, of how far they differ among themselves. Rounding differs between two ways of reading,
but what is read wrongly differs by about as much as logits do. In half precision `NEAR` is widened, up to `FAR`, to
`NOISES` times what two ways differ by that are right for certain: without instructions for it, and for a text of a few
tokens, that may be a fifth."""
NOISES = 2.0
BEFORE = 18
"""Tokens that are read first: the fewer, the more rounding matters."""

FAILURES = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError, QuickmergeError)
"""What models raise over what they can't read."""


def check_target(model: PreTrainedModel) -> str:
    """How a model reads what was drafted.

    Whether it reads a tree as it reads text is tried out once for each model: two siblings are read in one pass, and
    the second one's logits must be those of reading it alone. One that doesn't must read a chain behind a cache as it
    reads text, and again after what its cache holds was put back (`quickmerge.speculative.chains`).

    Returns:
        Empty if it reads trees, else the trait for which it reads one path of each.

    Raises:
        UnsupportedModelError: it reads neither, or is inside a run in which it doesn't.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"speculative decoding needs a decoder with a language-model head, got a {name}")
    if not takes_cache(model):
        raise UnsupportedModelError(f"{name} takes no {cache_name()}, which reading several tokens at once needs")
    check_trees(model)
    config = model.config.get_text_config(decoder=True)
    implementation = attention_implementation(config).removeprefix(PREFIX)
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{name} runs attention as {implementation!r}, which does not take the mask of a tree: "
            f"set attn_implementation to one of {', '.join(IMPLEMENTATIONS)}"
        )
    wrapper = generating_wrapper(model)
    check_adapters(model if wrapper is None else wrapper)
    check_rows(model, "speculative decoding")
    if (together := reads_together(model)) is not None:
        raise UnsupportedModelError(
            f"speculative decoding can't be served for {name}, which reads a token otherwise beside others than alone, "
            f"so that it would write another text: {together}"
        )
    if model not in _PROVEN:
        with aside():  # what a run makes of a text is for the run to prove
            why = _why_no_trees(model, config)
            if why:
                _prove_chains(model, config.vocab_size, why)
            _PROVEN[model] = why
    if _PROVEN[model]:
        check_chains(model, _PROVEN[model])
    return _PROVEN[model]


def _why_no_trees(model: PreTrainedModel, config: object) -> str:
    """The trait for which a model can't read trees; empty if it can."""
    try:
        for i in range(config.num_hidden_layers):  # type: ignore[attr-defined]
            layer_window(config, i)
    except UnsupportedModelError as error:
        return str(error).split(";")[0]
    taken = inspect.signature(model.forward).parameters
    for wanted in ("attention_mask", "position_ids"):
        if wanted not in taken:
            return f"it takes no {wanted}"
    return _prove_trees(model, config.vocab_size)  # type: ignore[attr-defined]


@torch.no_grad()
def _prove_trees(model: PreTrainedModel, vocabulary: int) -> str:
    text = _text(model, BEFORE, vocabulary)
    a, b, c = 1 % vocabulary, 2 % vocabulary, 3 % vocabulary
    alone = torch.cat([text, text.new_tensor([[b, c]])], 1)
    try:
        wanted = model(input_ids=alone, use_cache=False).logits[0, -1].float()
        cache = DynamicCache()
        columns = _read(model, cache, text[:, :-1])
        if (
            any(type(layer) is not DynamicLayer or layer.get_seq_length() != columns.width for layer in cache.layers)
            or len(cache.layers) != model.config.get_text_config(decoder=True).num_hidden_layers
        ):
            return "not every block keeps keys and values of every token"
        tree = pack([Tree([int(text[0, -1]), a, b, c], [0, 0, 0, 2], [1.0] * 4)], text.device)
        given = Target(model, cache, columns).read(tree)[0][0, -1].float()
    except FAILURES as error:
        return f"it can't read a mask of four dimensions ({_first_line(error)})"
    near = _near(model, text)
    return "" if _alike(given, wanted, near) else "it heeds no positions of its own and no mask of four dimensions"


@torch.no_grad()
def _prove_chains(model: PreTrainedModel, vocabulary: int, why: str) -> None:
    text, n = _text(model, BEFORE + 6, vocabulary), BEFORE
    name = type(model).__name__
    try:
        wanted = model(input_ids=text, use_cache=False).logits[0].float()
        cache = fresh_cache(model)
        columns = _read(model, cache, text[:, :n])
        target = Chains(model, cache, columns, why=why)
        # Two wrong tokens behind two right ones are taken back; then what is right is read again, and more.
        wrong = [int(token) for token in (text[0, n + 2 : n + 4] + 1) % vocabulary]
        first = target.read(pack([Tree.chain([*text[0, n : n + 2].tolist(), *wrong])], text.device))[0][0, :2]
        target.commit([[0, 1]])
        second = target.read(pack([Tree.chain(text[0, n + 2 : n + 3].tolist())], text.device))[0][0]
        target.commit([[0]])
        third = target.read(pack([Tree.chain(text[0, n + 3 :].tolist())], text.device))[0][0]
        target.commit([[0, 1, 2]])
        found = torch.cat([first, second, third]).float()
        cache = fresh_cache(model)
        target = Chains(model, cache, _read(model, cache, text[:, :n]), why=why)
        steps = []
        for token in text[0, n:].tolist():
            steps.append(target.read(pack([Tree.chain([token])], text.device))[0][0, 0])
            target.commit([[0]])
    except FAILURES as error:
        raise UnsupportedModelError(
            f"{name} can't read several tokens behind a cache ({_first_line(error)}), and trees neither: {why}"
        ) from error
    near = _near(model, text)
    if not all(_alike(a, b, near) for a, b in zip(found, wanted[n:], strict=True)):
        needed = "call eval() on it" if model.training else f"trees neither: {why}"
        raise UnsupportedModelError(
            f"{name} reads several tokens behind a cache otherwise than text, so speculation would change what it "
            f"writes; {needed}"
        )
    # Some have a formula of their own for one token, that does not quite agree with theirs for several.
    near = near if _is_half(model) else EXACT
    if not all(_alike(a, b.float(), near) for a, b in zip(found, steps, strict=True)):
        raise UnsupportedModelError(
            f"{name} reads one token otherwise than several at once, so speculation would change what it writes; trees "
            f"neither: {why}"
        )


def _text(model: PreTrainedModel, length: int, vocabulary: int) -> Tensor:
    """Tokens from the middle of the vocabulary, away from those that stand for something in a template."""
    return ((vocabulary // 3 + 7 * torch.arange(length, device=device_of(model))) % vocabulary)[None]


def _read(model: PreTrainedModel, cache: Cache, ids: Tensor) -> Columns:
    """Read the first tokens of a text; what the cache holds then."""
    width = ids.shape[1]
    given = behind(model, torch.ones_like(ids), ids.new_zeros(1, 1), width)
    model(input_ids=ids, **given, **cache_argument(model, cache), use_cache=True)
    place = torch.arange(width, device=ids.device)[None]
    return Columns(place >= 0, place, ids.new_tensor([width]), ids.new_zeros(1), False)


def _is_half(model: PreTrainedModel) -> bool:
    return next(model.parameters()).dtype not in (torch.float32, torch.float64)


def _near(model: PreTrainedModel, text: Tensor) -> float:
    """How far logits of the same tokens of a text may be apart."""
    if not _is_half(model):
        return NEAR
    whole = model(input_ids=text, use_cache=False).logits[0].float()
    cache, noise = fresh_cache(model), 0.0
    for i in range(text.shape[1]):
        step = model(input_ids=text[:, i : i + 1], **cache_argument(model, cache), use_cache=True).logits[0, -1].float()
        noise = max(noise, _apart(step, whole[i]))
    for pad in (1, 2, 3):  # as a row of a batch, which other kernels may read
        ids = torch.cat([text[:, :1].expand(-1, pad), text], 1)
        mask = torch.arange(ids.shape[1], device=ids.device)[None] >= pad
        given = behind(model, mask.long(), ids.new_full((1, 1), -pad), ids.shape[1])
        given = {name: each.clamp_min(0) for name, each in given.items()}
        noise = max(noise, _apart(model(input_ids=ids, **given, use_cache=False).logits[0, -1].float(), whole[-1]))
    return min(FAR, max(NEAR, NOISES * noise))


def _apart(found: Tensor, wanted: Tensor) -> float:
    """How far logits are apart, of how far the wanted ones differ among themselves."""
    scale = float((wanted - wanted.mean()).abs().mean())
    apart = float((found - wanted).abs().mean())
    return apart / scale if scale else math.inf if apart else 0.0


def _alike(found: Tensor, wanted: Tensor, near: float) -> bool:
    return _apart(found, wanted) <= near


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
