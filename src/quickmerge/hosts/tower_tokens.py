"""From the patches of a vision tower to the visual tokens that they become: attention received, squares, windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quickmerge.tokens.saliency import AttentionTrace, bidirectional_attention, times_value_norm

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Seen:
    """What the tower told of one picture, tile or video whose tokens it made; None where nobody asked.

    ``grid`` (T, H, W) of the ``count`` visual tokens, where they form one; ``features (n, D)``, ``saliency (n,)`` and
    ``key (n, d)``.
    """

    count: int
    grid: Grid | None
    features: Tensor | None = None
    saliency: Tensor | None = None
    key: Tensor | None = None

    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Features, saliency and keys."""
        return self.features, self.saliency, self.key


def received(trace: AttentionTrace, kind: str, *, class_token: bool, mask: Tensor | None = None) -> Tensor:
    """How much attention every token of a tower receives, ``(B, N)`` in float32 at least.

    From the class token, the first one: the sum over heads of its row, ``a_j = sum_h p_h0j`` (SCOPE, arXiv 2510.24214).
    From all tokens where there is none: mean over heads, sum over queries, ``a_j = sum_i mean_h p_hij``. With ``kind``
    ``"norm"`` the length of what it adds to the outputs instead, mean over heads of
    ``sqrt(mean_i ||p_hij v_hj||^2)``, i over the tokens that vote.

    Args:
        trace: the layer.
        kind: ``"attention"`` or ``"norm"``.
        class_token: whether the first token alone votes.
        mask: the tower's own, ``(B, 1, 1 or N, N)``, bool or added to the scores; what it hides does not vote.
    """
    b, _, n, _ = trace.query.shape
    rows = torch.zeros(b, 1, dtype=torch.long, device=trace.query.device)
    bias = None
    if not class_token:
        rows = torch.arange(n, device=trace.query.device).expand(b, n)
    if mask is not None:
        line = mask[:, 0, 0].expand(b, n)
        hidden = ~line if line.dtype == torch.bool else line < torch.finfo(line.dtype).min / 2
        bias = torch.zeros(b, n, device=rows.device).masked_fill(hidden, -torch.inf)
        rows = rows if class_token else torch.where(hidden, -1, rows)
    if kind == "norm":
        share = bidirectional_attention(trace, rows, bias, moment=2)
        return times_value_norm(share, trace.value).mean(1)
    share = bidirectional_attention(trace, rows, bias)
    out: Tensor = share.sum(1) if class_token else share.mean(1) * (rows >= 0).sum(-1, keepdim=True)
    return out


def window_order(grid: Grid, merge: int, window: int) -> Tensor:
    """The place that each visual token of a picture has in a tower that reads it window by window: ``(n,)`` long.

    Frames stay apart. Windows of ``window`` x ``window`` tokens follow one another line by line, those at the right and
    lower edges smaller, and so do the tokens in each.
    """
    frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across = -(-width // window)
    rank = ((y // window * across + x // window) * window + y % window) * window + x % window
    order = rank.flatten().argsort().argsort()
    return (order + torch.arange(frames)[:, None] * height * width).flatten()


def squares(x: Tensor, grid: Grid, merge: int, raster: bool) -> Tensor:
    """Patches ``(T H W, ...)`` by the ``merge`` x ``merge`` squares that become one token: ``(n, merge^2, ...)``."""
    rest = x.shape[1:]
    if not raster:
        return x.reshape(-1, merge * merge, *rest)
    t, h, w = grid
    lines = x.reshape(t, h // merge, merge, w // merge, merge, *rest)
    return lines.transpose(2, 3).reshape(-1, merge * merge, *rest)


def seen_of(
    grid: Grid,
    merge: int,
    raster: bool,
    features: Tensor | None,
    saliency: Tensor | None,
    key: Tensor | None,
    order: Tensor | None = None,
) -> Seen:
    """Of patches, what is to be known of the tokens that squares of them make: means, and sums of saliency."""

    def pooled(x: Tensor | None, how: str) -> Tensor | None:
        if x is None:
            return None
        by_square = squares(x, grid, merge, raster)
        out = by_square.sum(1) if how == "sum" else by_square.to(torch.promote_types(x.dtype, torch.float32)).mean(1)
        return out if order is None else out[order.to(out.device)]

    shape = (grid[0], grid[1] // merge, grid[2] // merge)
    count = shape[0] * shape[1] * shape[2]
    return Seen(count, shape, pooled(features, "mean"), pooled(saliency, "sum"), pooled(key, "mean"))


def joined(parts: Sequence[Seen], index: Tensor) -> Seen:
    """The tokens ``index`` of several crops taken one after another; they form no grid."""
    given = list(zip(*(each.parts() for each in parts), strict=True))
    told = [None if t[0] is None else torch.cat(t)[index.to(t[0].device)] for t in given]
    return Seen(len(index), None, *told)
