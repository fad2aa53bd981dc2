"""Which blocks a prompt can be merged in front of, and what is kept of the attention of those below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from quickmerge.errors import UnsupportedModelError
from quickmerge.merge.tokens.saliency import AttentionTrace
from quickmerge.models.decoder import Decoder
from quickmerge.models.traits import CHUNKED, COMPRESSED, SLIDING, SPARSE, BlockTraits

__all__ = ["check_blocks", "merge_range", "trace_of"]

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


def merge_range(decoder: Decoder) -> tuple[int, int]:
    """The lowest and the highest block in front of which all tokens of a prompt can be merged.

    The lowest block with attention reads every token: its layer of the cache tells how long the text is, and its
    attention what matters. A block that borrows the keys and values of another one reads what that one read.
    """
    own = [i for i in decoder.attending if decoder.traits[i].owns]
    lent = {t.entries for t in decoder.traits if t.shares}
    lenders = [i for i in own if decoder.traits[i].entries in lent]
    return own[0] + 1, min([len(decoder) - 1, *lenders])


def check_blocks(decoder: Decoder, layers: Sequence[int]) -> None:
    """Refuse a model, or blocks of it, that can't be merged in front of.

    Raises:
        UnsupportedModelError: naming the block and the trait.
    """
    decoder.need(_WHAT, not_mergeable)
    low, high = merge_range(decoder)
    name = type(decoder.model).__name__
    for layer in layers:
        if layer < low:
            raise UnsupportedModelError(
                f"layer must be at least {low} for {name}, whose block {low - 1} is the lowest with attention, which "
                f"reads every token (block 0 is {decoder.traits[0].declared}), got {layer}"
            )
        if layer > high:
            raise UnsupportedModelError(
                f"layer must be at most {high} for {name}, since blocks above read the keys and values that block "
                f"{high} made, and must read as many tokens, got {layer}"
            )


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
