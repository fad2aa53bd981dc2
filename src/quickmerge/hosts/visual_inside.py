"""What a reducer is told of visual tokens inside the language model: by the attention of the block below."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quickmerge.hosts.tower_tokens import Seen
from quickmerge.hosts.visual import Image
from quickmerge.tokens.saliency import AttentionTrace, attention_from, times_value_norm
from quickmerge.tokens.view import TokenView


def told_inside(
    trace: AttentionTrace | None, view: TokenView, visual: Tensor, asks: frozenset[str]
) -> Callable[[Image], Seen | None]:
    """A function that tells of a picture, by the attention of the block below the merge.

    Saliency is what the text behind the picture pays to each token, mean over heads and voters; for ``"norm"`` the root
    mean square length of what each adds to their outputs. Keys are means over heads.

    Args:
        trace: of the block below; None where nobody asked.
        view: the sequence in front of the merge.
        visual: ``(B, N)`` bool, its visual tokens.
        asks: what the reducer wants to know.
    """

    @torch.no_grad()
    def told(image: Image) -> Seen | None:
        if trace is None:
            return None
        row, at = slice(image.row, image.row + 1), image.now
        assert at is not None
        key = trace.key[row].to(torch.promote_types(trace.key.dtype, torch.float32)).mean(1)[0, at]
        saliency = None
        kind = next(iter(asks & {"attention", "norm"}), None)
        if kind is not None:
            own = AttentionTrace(trace.query[row], trace.key[row], trace.value[row], trace.scaling, trace.window)
            valid, position = view.valid[row], view.position[row]
            voters = _voters(valid[0], visual[row][0], int(at[-1]))
            share = attention_from(own, voters, valid, position, 2 if kind == "norm" else 1)
            if kind == "norm":
                share = times_value_norm(share, own.value)
            saliency = share.mean(1)[0, at]
        return Seen(len(at), image.grid, None, saliency, key if "key" in asks else None)

    return told


def _voters(valid: Tensor, visual: Tensor, last: int) -> Tensor:
    """``(1, w)``: the text tokens of a row behind column ``last``, or its very last token where there are none."""
    there = (valid & ~visual).nonzero().flatten()
    behind = there[there > last]
    return (behind if len(behind) else valid.nonzero().flatten()[-1:])[None]
