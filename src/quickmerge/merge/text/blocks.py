"""Which blocks a prompt can be merged in front of, and what is kept of the attention of those below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from quickmerge.errors import UnsupportedModelError
from quickmerge.merge.tokens.budget import Schedule
from quickmerge.merge.tokens.saliency import AttentionTrace
from quickmerge.models.decoder import Decoder
from quickmerge.models.traits import CHUNKED, COMPRESSED, FULL, INDEXED, SLIDING, SPARSE, BlockTraits

__all__ = ["check_blocks", "mergeable", "not_chunked", "not_mergeable", "schedule_of", "trace_of"]

_WHAT = "prefix merging"


def not_mergeable(block: BlockTraits) -> str | None:
    """The trait for which a block can't read slots in the place of tokens; None if it can."""
    if not block.registered:
        return "attention that asks no function of transformers' registry, so that queries and keys can't be seen"
    if block.tied:
        return "an attention module that other blocks run too"
    if block.attention is not None and not block.shares and (block.entries is None or block.entries < 0):
        return "an attention module that knows no layer of the cache as its own"
    if block.attention == COMPRESSED:
        return "compressed attention, whose entries each stand for several tokens already"
    if block.attention == SPARSE:
        return "block-sparse attention, which goes by the numbers of tokens where there are slots"
    if block.attention is not None and block.positions == "bias":
        return "a bias on its attention by distances, which are counted in tokens and not in slots"
    return None


def not_chunked(block: BlockTraits) -> str | None:
    """The trait for which the cache of a block can't be merged chunk by chunk; None if it can."""
    if block.attention != FULL:
        return (
            f"{block.attention} attention" if block.attention else f"{block.memory or 'nothing'} in place of attention"
        )
    if block.latent:
        return "keys and values of one latent vector in the cache, which can't be merged each in its own way"
    if block.shares or block.lends:
        return "keys and values that several blocks read"
    return None


def mergeable(decoder: Decoder) -> list[int]:
    """The blocks in front of which all tokens of a prompt can be merged.

    The lowest block with attention reads every token: its layer of the cache tells how long the text is, and its
    attention what matters. A block that borrows the keys and values of another one reads what that one read, and one
    that goes by what the indexer of a block below chose can't be the first to read slots.
    """
    own = [i for i in decoder.attending if decoder.traits[i].owns]
    lent = {t.entries for t in decoder.traits if t.shares}
    lenders = [i for i in own if decoder.traits[i].entries in lent]
    high = min([len(decoder) - 1, *lenders])
    blocks = range(own[0] + 1, high + 1)
    return [i for i in blocks if decoder.traits[i].attention != INDEXED or decoder.traits[i].picks]


def schedule_of(decoder: Decoder, layer: int | Sequence[int] | Schedule | None) -> Schedule:
    """The schedule a user means by ``layer``; the default one is moved to blocks that can be merged in front of.

    Raises:
        ValueError: if a block lies outside 1..depth-1.
        UnsupportedModelError: if there is none.
    """
    if layer is not None:
        return layer if isinstance(layer, Schedule) else Schedule.of(layer, len(decoder))
    found, blocks = Schedule.of(None, len(decoder)), mergeable(decoder)
    if not blocks:
        check_blocks(decoder, found.layers)
    moved = [min(blocks, key=lambda i, wanted=wanted: (abs(i - wanted), i)) for wanted in found.layers]  # type: ignore[misc]
    return Schedule(tuple(dict.fromkeys(moved)), found.decay) if tuple(moved) != found.layers else found


def check_blocks(decoder: Decoder, layers: Sequence[int]) -> None:
    """Refuse a model, or blocks of it, that can't be merged in front of.

    Raises:
        UnsupportedModelError: naming the block and the trait.
    """
    decoder.need(_WHAT, not_mergeable)
    blocks, name = mergeable(decoder), type(decoder.model).__name__
    for layer in layers:
        if layer in blocks:
            continue
        traits = decoder.traits[layer]
        if layer <= decoder.attending[0]:
            why = f"block {decoder.attending[0]} is the lowest with attention and must read every token"
        elif traits.attention == INDEXED and not traits.picks:
            why = f"block {layer} goes by the keys that the indexer of a block below chose"
        else:
            why = "a block above it reads the keys and values of one below it, and must read as many tokens"
        allowed = ", ".join(map(str, blocks)) or "nowhere"
        raise UnsupportedModelError(f"layer can't be {layer} for {name}, since {why}; it can be {allowed}")


def trace_of(
    query: Tensor, key: Tensor, value: Tensor, kwargs: Mapping[str, Any], block: BlockTraits
) -> AttentionTrace:
    """What one call of attention computes with, as reducers read it.

    Args:
        query, key, value: ``(B, H, N, d)``, ``(B, G, N, d)`` and ``(B, G, N, e)``.
        kwargs: the others of its arguments.
        block: whose attention it is.
    """
    scaling = kwargs.get("scaling")
    return AttentionTrace(
        query, key, value,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        block.window if block.attention == SLIDING else None,
        chunk=block.window if block.attention == CHUNKED else None,
        sinks=kwargs.get("s_aux"),
        softcap=kwargs.get("softcap"),
    )  # fmt: skip
