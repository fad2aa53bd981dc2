"""Multipole attention of one new token on a GPU: what `attend` computes, by Triton kernels and without a large copy.

Five launches beside the selection, which is torch's: the centroids' logits; the clusters' shares; exact attention to
sink, buffer and selected members; attention to the centroids of all other clusters; the merge. None of them waits for
the device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from quickmerge.multipole.clusters import Clusters
from quickmerge.multipole.selection import Choice, choose, gather_index, spread_of
from quickmerge.multipole.settings import Multipole

__all__ = ["SWITCH", "attend_triton", "triton_serves"]

SWITCH = "QUICKMERGE_TRITON"
"""Environment variable: 0 leaves all attention to torch."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST, GROUPED = 256, 32
"""The most dimensions, and query heads of one key-value head, for which tiles fit into the shared memory of any GPU."""

PROGRAMS = 2
"""Programs that are started for each multiprocessor, if there is enough to read."""

RANKED = 256
"""Clusters whose shares one program computes."""

WARPS = {"num_warps": 4, "num_stages": 2}


def triton_serves(
    query: Tensor, keys: Tensor, values: Tensor, clusters: Clusters, coarse: Clusters | None = None
) -> bool:
    """Whether `attend_triton` can and may take a call of `attend` with these arguments.

    It can for one new token and one level of clusters, without gradients, in float32, float16 or bfloat16, with heads
    of up to 256 dimensions and at most 32 query heads for each key-value head, on a GPU, if Triton is installed. It may
    unless the environment has `SWITCH` at 0.
    """
    tensors = (query, keys, values, clusters.key, clusters.value)
    return (
        query.is_cuda
        and query.shape[2] == 1
        and coarse is None
        and len(clusters) > 0
        and query.shape[1] <= GROUPED * keys.shape[1]
        and all(t.dtype in DTYPES and t.stride(-1) == 1 and t.shape[-1] <= WIDEST for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch.compiler.is_compiling()
        and os.environ.get(SWITCH, "1") != "0"
        and _installed()
    )


def attend_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    size: Tensor | None,
    clusters: Clusters,
    settings: Multipole,
    *,
    scaling: float | None = None,
    query_for_centroids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend_and_count` of one new token, for calls that `triton_serves`; see there for arguments and results.

    Products of float16 and bfloat16 are summed in float32, and weights are rounded to the dtype of the values.
    """
    spread_of(clusters, settings.variance)  # raises if there is none
    # Triton launches on the current device, which need not be the one of a model spread over several.
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        step = _Step(query, keys, values, size, clusters, settings, scaling)
        if settings.select == "budget" and settings.budget >= clusters.width:
            return step.dense(), torch.where(clusters.count > 0, clusters.members, 0).sum(-1)[..., None]
        z, share = step.look_up(query if query_for_centroids is None else query_for_centroids)
        choice = choose(
            share[:, :, None], clusters.members, clusters.count, settings.budget, settings.select, settings.top_p
        )
        return step.sparse(z, choice), choice.rows.sum(-1)


class _Step:
    """The launches of one step: grids, splits, and the arguments that kernels share."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        size: Tensor | None,
        clusters: Clusters,
        settings: Multipole,
        scaling: float | None,
    ) -> None:
        from quickmerge.multipole import triton_kernels

        self.kernels = triton_kernels
        self.query, self.keys, self.values, self.clusters, self.settings = query, keys, values, clusters, settings
        self.size = None if size is None else size.contiguous()
        self.count = clusters.count.contiguous()
        self.rows, self.query_heads, _, D = query.shape
        self.heads, DV = keys.shape[1], values.shape[3]
        self.scaling = D**-0.5 if scaling is None else scaling
        group = self.query_heads // self.heads
        self.group = {"GROUP": group, "ROWS": max(16, _power(group))}
        self.deep = {"D": D, "WIDTH": max(16, _power(D))}
        self.wide = {"DV": DV, "WIDTH_V": max(16, _power(DV))}
        # 16 KB of keys and of values at a time, however wide and in whatever precision they are
        bytes_ = max(self.deep["WIDTH"], self.wide["WIDTH_V"]) * max(keys.element_size(), values.element_size())
        self.tile = {"TILE": min(128, max(16, 16384 // bytes_)), "DOT": self._dot()}

    def look_up(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``z (B, Hq, C)`` of the centroids, and the share of one key of each cluster ``(B, H, C)``."""
        C, key, spread = len(self.clusters), self.clusters.key, self.clusters.spread
        splits = self._splits(C)
        z, share = self._new(self.query_heads, C), self._new(self.heads, C)
        tops, totals = self._new(self.query_heads, splits), self._new(self.query_heads, splits)
        measured = self.settings.variance and spread is not None
        self.kernels.lookup[self.rows * self.heads, splits](
            query, *query.stride()[:2], key, *key.stride()[:3],
            self.count, spread.contiguous() if measured and spread is not None else self.count, z, tops, totals,
            self.heads, C, self.scaling, **self.group, **self.deep, **self.tile, SPREAD=measured, **WARPS,
        )  # fmt: skip
        self.kernels.rank[self.rows * self.heads, _pieces(C, RANKED)](
            z, tops, totals, share, C, splits, GROUP=self.group["GROUP"], TILE=RANKED, SPLITS=_power(splits), **WARPS
        )
        return z, share

    def dense(self) -> Tensor:
        """``(B, 1, Hq, DV)``: attention to all columns, clustered or not."""
        none = torch.zeros(self.rows, self.heads, dtype=torch.long, device=self.keys.device)
        splits = self._splits(self.keys.shape[2])
        parts = self._partials(splits)
        self._read(self.clusters.start, none, none[..., None], parts, splits)
        return self._combine(parts)

    def sparse(self, z: Tensor, choice: Choice) -> Tensor:
        """``(B, 1, Hq, DV)``: attention to what is chosen and what is not clustered, and to the other centroids."""
        clusters, C, n = self.clusters, len(self.clusters), self.keys.shape[2]
        width = min(self.settings.budget, clusters.width)
        kept = choice.rows.sum(-1)[..., 0]
        index = kept[..., None]
        if width:
            index = gather_index(clusters.order, clusters.offset, choice, width)[0][:, :, 0].contiguous()
        # No row reads more than what the row with the fewest clustered columns has outside, and the budget.
        outside = n - min(sum(block.length for block in row) for row in clusters.blocks)
        exact = self._splits(min(n, outside + width))
        others = self._splits(C) if self.settings.replacement else 0
        parts = self._partials(exact + others)
        self._read(clusters.end, kept, index, parts, exact)
        if others:
            self.kernels.replace[self.rows * self.heads, others](
                z, self.count, choice.mask(C)[:, :, 0].contiguous(), clusters.value, *clusters.value.stride()[:3],
                *parts, self.heads, C, exact, exact + others, **self.group, **self.wide, **self.tile, **WARPS,
            )  # fmt: skip
        return self._combine(parts)

    def _read(self, end: Tensor, kept: Tensor, index: Tensor, parts: Sequence[Tensor], splits: int) -> None:
        size, start = self.size, self.clusters.start
        self.kernels.read[self.rows * self.heads, splits](
            self.query, *self.query.stride()[:2], self.keys, *self.keys.stride()[:3],
            self.values, *self.values.stride()[:3],
            kept if size is None else size, 0 if size is None else size.stride(0), start, end, index, kept, *parts,
            self.heads, self.keys.shape[2], index.shape[2], self.settings.sink, parts[1].shape[2], self.scaling,
            **self.group, **self.deep, **self.wide, **self.tile, SIZE=size is not None, **WARPS,
        )  # fmt: skip

    def _combine(self, parts: Sequence[Tensor]) -> Tensor:
        out = torch.empty(
            self.rows, 1, self.query_heads, self.wide["DV"], dtype=self.query.dtype, device=self.query.device
        )
        slots = parts[1].shape[2]
        self.kernels.combine[(self.rows * self.query_heads,)](
            *parts, out, slots, **self.wide, SLOTS=_power(slots), **WARPS
        )
        return out

    def _partials(self, slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """Room for the sums, the largest logits and the totals of every split."""
        heads = self.query_heads
        return self._new(heads, slots, self.wide["DV"]), self._new(heads, slots), self._new(heads, slots)

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(self.rows, *shape, dtype=torch.float32, device=self.keys.device)

    def _splits(self, entries: int) -> int:
        """Into how many programs the reading of so many rows is split for each key-value head."""
        wanted = PROGRAMS * _processors(self.keys.device)
        return max(1, min(_pieces(entries, self.tile["TILE"]), _pieces(wanted, self.rows * self.heads)))

    def _dot(self) -> Any:
        """The dtype in which kernels multiply, as Triton calls it."""
        dtypes = {t.dtype for t in (self.query, self.keys, self.values, self.clusters.key, self.clusters.value)}
        # Triton's interpreter takes the bits of bfloat16 for whole numbers when it multiplies matrices.
        single = len(dtypes) > 1 or self.kernels.INTERPRETED
        return self.kernels.DTYPES[torch.float32 if single else dtypes.pop()]


def _pieces(entries: int, size: int) -> int:
    return -(-entries // size)


def _power(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (number - 1).bit_length()


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of anything else, where the kernels are interpreted, enough for several splits."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
