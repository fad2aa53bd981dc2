"""What a prefill costs, before running it: FLOPs and cache bytes, counted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quickmerge.errors import UnsupportedModelError
from quickmerge.merge.cache.evictor import Evictor
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.reducers.reread import Reread
from quickmerge.merge.tokens.budget import Count, Ratio, Remaining, Schedule, Stage, as_budget, round_half_up
from quickmerge.models.traits import BlockTraits, not_plain


@dataclass(frozen=True)
class Shape:
    """What of a model the cost depends on. ``weights`` are the matrix entries a token passes, per block."""

    weights: tuple[int, ...]
    width: int
    heads: int
    key_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    bytes_per_value: int = 4

    def prefill_flops(self, tokens: Sequence[float]) -> float:
        """FLOPs of a prefill in which block i reads ``tokens[i]`` tokens; the head is left out.

        Per block ``2 n P`` for the matrices and ``2 n^2 H d`` for causal attention (half of ``4 n^2 H d``), less
        where a sliding window cuts it.
        """
        return sum(map(self._block_flops, range(len(self.weights)), tokens))

    def _block_flops(self, block: int, n: float) -> float:
        window = self.windows[block]
        pairs = n * n / 2 if window is None or n <= window else window * window / 2 + (n - window) * window
        return 2 * n * self.weights[block] + 4 * pairs * self.heads * self.head_dim

    def cache_bytes(self, tokens: Sequence[float]) -> float:
        """Bytes of keys and values when block i holds ``tokens[i]`` tokens."""
        each = 2 * self.key_heads * self.head_dim * self.bytes_per_value
        held = (n if w is None else min(n, w - 1) for n, w in zip(tokens, self.windows, strict=True))
        return sum(held) * each

    def reducer_flops(self, reducer: Reducer, tokens: Sequence[float], prompt: float | None = None) -> float:
        """FLOPs of the reducer itself in a prefill in which block i reads ``tokens[i]`` tokens.

        For every merge, ``2 w n H d`` for the scores of its w voters in each probed block, and ``2 n D`` to merge;
        for the first one also what a trained method adds. Of a method that reads a prompt twice, the blocks that its
        scout passes with all ``prompt`` tokens (None: as many as the first block reads), the projections of the block
        where it ends, and the votes.
        """
        if isinstance(reducer, Reread):
            return self._scout_flops(reducer, tokens[0], tokens[0] if prompt is None else prompt)
        total, first = 0.0, True
        for before, after in itertools.pairwise(tokens):
            if after < before:
                total += self._votes(reducer, before) + 2 * before * self.width
                total += reducer.align_flops(before, after) if first else 0.0
                first = False
        return total

    def _votes(self, reducer: Reducer, tokens: float) -> float:
        return reducer.needs.layers * 2 * min(reducer.needs.rows, tokens) * tokens * self.heads * self.head_dim

    def _scout_flops(self, reducer: Reread, read: float, prompt: float) -> float:
        if read >= prompt:  # nobody had to look
            return 0.0
        passed = sum(self._block_flops(block, prompt) for block in range(reducer.scout(len(self.weights))))
        projected = 2 * prompt * self.width * self.head_dim * (self.heads + 2 * self.key_heads)
        return passed + projected + self._votes(reducer, prompt)

    def flops_ratio(
        self, reducer: Reducer | None, tokens: Sequence[float], prompt: float | None = None,
        evictor: Evictor | None = None,
    ) -> float:  # fmt: skip
        """FLOPs of a prefill by a method, its own inside, over those of a full one.

        Args:
            reducer: merges the prompt; None where nothing is merged.
            tokens: what each block reads of the prompt.
            prompt: tokens of it; None says that the first block reads them all.
            evictor: makes the cache smaller behind the last block, or None.
        """
        whole = tokens[0] if prompt is None else prompt
        full = self.prefill_flops([whole] * len(tokens))
        ratio = 1.0
        if reducer is not None:
            ratio = (self.prefill_flops(tokens) + self.reducer_flops(reducer, tokens, whole)) / full
        return ratio if evictor is None else ratio + evictor.flops(self, tokens) / full


def _uncounted(block: BlockTraits) -> str | None:
    """The trait for which the FLOPs of a block aren't known; None if they are."""
    return "keys that are wider than values" if block.latent else not_plain(block)


def model_shape(model: nn.Module | Any) -> Shape:
    """The shape of a supported language model, or of that in a vision-language model; one on the meta device does.

    Raises:
        UnsupportedModelError: for a model that no reducer can be attached to, or whose blocks are not counted here:
            those without plain attention, of latent attention, and with experts.
    """
    from quickmerge.models.decoder import find_decoder
    from quickmerge.models.vlm import find_vlm_decoder, holds_vlm

    decoder = find_vlm_decoder(model) if holds_vlm(model) else find_decoder(model, shared=True)
    decoder.need("a count of FLOPs", _uncounted)
    for i, block in enumerate(decoder.layers):
        if any(p.ndim == 3 for p in block.parameters()):
            raise UnsupportedModelError(
                f"a count of FLOPs can't be served for {type(model).__name__}, whose block {i} has experts, of whose "
                "weights a token reads a part"
            )
    config = decoder.config
    heads = config.num_attention_heads
    # Of whatever class a linear layer is, its weights are the matrices of a block.
    weights = tuple(sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in decoder.layers)
    return Shape(
        weights=weights,
        width=config.hidden_size,
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        windows=decoder.windows,
        bytes_per_value=torch.empty(0, dtype=next(decoder.base.parameters()).dtype).element_size(),
    )


@dataclass(frozen=True)
class Cost:
    """A plan's price: tokens per block, FLOPs and cache bytes, each beside the unreduced model's."""

    tokens_per_layer: tuple[float, ...]
    flops: float
    flops_full: float
    cache_bytes: float
    cache_bytes_full: float

    @property
    def flops_ratio(self) -> float:
        """FLOPs, the reducer's own included, over those of the unreduced prefill."""
        return self.flops / self.flops_full

    @property
    def cache_ratio(self) -> float:
        """Cache bytes over those of the unreduced cache."""
        return self.cache_bytes / self.cache_bytes_full

    @property
    def speedup(self) -> float:
        """Prefill speed-up if time goes as FLOPs."""
        return self.flops_full / self.flops


def plan_cost(shape: Shape, reducer: Reducer, schedule: Schedule, tokens: int, protected: int = 20) -> Cost:
    """The cost of a prefill of ``tokens`` tokens in ``prefix`` mode.

    Raises:
        ValueError: if the reducer's budget depends on the text (entropy, mass), so that nothing can be said before.
    """
    depth = len(shape.weights)
    # What is read twice is read by all blocks, the second time.
    twice = isinstance(reducer, Reread)
    stages = [Stage(0, reducer.keep)] if twice else schedule.stages(reducer.keep, depth)
    per_layer = [float(tokens)] * depth
    for stage in stages:
        budget, before = as_budget(stage.keep), per_layer[stage.layer]
        if isinstance(budget, Ratio):
            kept = _half_up(tokens * budget.keep)
        elif isinstance(budget, Remaining):
            kept = _half_up(before * budget.share)
        elif isinstance(budget, Count):
            kept = float(budget.tokens)
        else:
            raise ValueError(f"keep must be a share or a count to plan ahead, got {reducer.keep!r}")
        kept = min(max(kept, float(min(protected, tokens))), before)
        per_layer[stage.layer :] = [kept] * (depth - stage.layer)
    full = [float(tokens)] * depth
    own = shape.reducer_flops(reducer, per_layer, float(tokens))
    return Cost(
        tokens_per_layer=tuple(per_layer),
        flops=shape.prefill_flops(per_layer) + own,
        flops_full=shape.prefill_flops(full),
        cache_bytes=shape.cache_bytes(per_layer),
        cache_bytes_full=shape.cache_bytes(full),
    )


def _half_up(x: float) -> float:
    """`quickmerge.merge.tokens.budget.round_half_up` of one number."""
    return float(round_half_up(torch.tensor(x, dtype=torch.float64)))


def break_even(shape: Shape, reducer: Reducer, schedule: Schedule, protected: int = 20) -> int | None:
    """Fewest prompt tokens at which the reducer saves more FLOPs than it spends; None if never below 2^20."""
    low, high = protected + 1, 2**20
    if plan_cost(shape, reducer, schedule, high, protected).flops_ratio >= 1:
        return None
    while low < high:
        middle = (low + high) // 2
        if plan_cost(shape, reducer, schedule, middle, protected).flops_ratio < 1:
            high = middle
        else:
            low = middle + 1
    return low
