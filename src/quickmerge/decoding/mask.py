"""What the nodes of a tree see: the text before them, and their own ancestors."""

from __future__ import annotations

import torch
from torch import Tensor

from quickmerge.decoding.tree import Packed

__all__ = ["masks_by_window", "tree_mask"]


def tree_mask(
    valid: Tensor, place: Tensor, length: Tensor, packed: Packed, dtype: torch.dtype, window: int | None = None
) -> Tensor:
    """An additive mask ``(B, 1, T, n + T)`` over n cache columns and the T nodes that are read behind them.

    Node i sees a column that holds a token of its row's text, and itself and its ancestors among the nodes. With a
    sliding window it sees only what is less than ``window`` tokens before it, where a node's place in the text is the
    root's plus its depth. Hidden places get the most negative number rather than minus infinity, with which a row
    that sees nothing would not be a number.

    Args:
        valid: ``(B, n)`` bool, which columns hold a token of the text.
        place: ``(B, n)`` long, which token of the text that is; anything where it is none.
        length: ``(B,)`` long, the place of the root.
        packed: the trees.
        dtype: of the queries.
        window: in tokens; None for full attention.
    """
    before = valid[:, None].expand(-1, packed.tokens.shape[1], -1)
    see = torch.cat([before, packed.see], -1)
    if window is not None:
        own = length[:, None] + packed.depth
        near = own[:, :, None] - torch.cat([place, own], 1)[:, None] < window
        see = see & near
    return torch.zeros((), dtype=dtype, device=see.device).where(see, torch.finfo(dtype).min)[:, None]


def masks_by_window(
    windows: dict[str, int | None],
    valid: Tensor,
    place: Tensor,
    length: Tensor,
    packed: Packed,
    dtype: torch.dtype,
    longest: int,
) -> Tensor | dict[str, Tensor]:
    """One mask where all blocks see equally far, else one for each type of block, as transformers takes them.

    Args:
        windows: the sliding window of every type of block, None for full attention.
        valid, place, length, packed, dtype: see `tree_mask`.
        longest: tokens of the longest row and its tree; a window of at least so many hides nothing.
    """
    made: dict[int | None, Tensor] = {}
    for window in windows.values():
        some = None if window is None or window >= longest else window
        if some not in made:
            made[some] = tree_mask(valid, place, length, packed, dtype, some)
    if len(made) == 1:
        return next(iter(made.values()))
    return {kind: made[None if w is None or w >= longest else w] for kind, w in windows.items()}
