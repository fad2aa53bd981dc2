"""Views of images and video for the property tests: a prefix, a grid of patches, attention in both directions."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from random import Random

import torch
from hypothesis import strategies as st
from strategies import KINDS, generator, numbers, seeds, up_to
from torch import Tensor

from quickmerge.merge.tokens import AttentionTrace, Evidence, TokenView

LENGTHS = (2, 3, 16, 17, 197, 198, 257)
PREFIXES = (0, 1, 2, 5)


def make(
    batch: int,
    tokens: int,
    prefix: int,
    seed: int,
    *,
    kind: str = "normal",
    dtype: torch.dtype = torch.float32,
    merged: bool = False,
    layer: int = 6,
) -> TokenView:
    """``tokens`` tokens, those of the prefix among them, on a grid that holds all patches; ``merged`` leaves gaps."""
    rng, draws = Random(seed), generator(seed)
    patches = tokens - prefix
    t, h = rng.choice((1, 1, 2)), rng.randint(1, 5)
    grid = (t, h, max(1, -(-patches // (t * h))) + (rng.randint(0, 2) if merged else 0))
    if not merged:
        grid = (1, 1, max(1, patches)) if patches % (t * h) else grid
    cells = torch.stack(
        [torch.randperm(math.prod(grid), generator=draws)[:patches].sort().values for _ in range(batch)]
        if merged
        else [torch.arange(patches)] * batch
    )
    position = torch.cat([torch.arange(prefix).expand(batch, -1), cells + prefix], 1)
    size = torch.randint(1, 5, (batch, tokens), generator=draws) if merged else torch.ones_like(position)
    size[:, :prefix] = 1
    heads, groups = rng.choice(((2, 2), (3, 3), (4, 2)))

    def drawn(h: int, d: int) -> Tensor:
        return numbers((batch, h, tokens, d), kind, draws, dtype)

    trace = AttentionTrace(drawn(heads, 5), drawn(groups, 5), drawn(groups, 3), 0.5)
    return TokenView(
        numbers((batch, tokens, rng.choice((1, 4, 7))), kind, draws, dtype),
        position=position,
        size=size,
        grid=grid,
        prefix=prefix,
        evidence=Evidence(attention=(trace,), layer=layer, depth=12),
    )


@st.composite
def prefix_views(
    draw: st.DrawFn,
    max_batch: int = 3,
    max_patches: int = 30,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16),
    kinds: tuple[str, ...] = KINDS,
    prefixes: tuple[int, ...] = PREFIXES,
    merged: bool | None = None,
    layer: int = 6,
) -> TokenView:
    return make(
        draw(up_to(max_batch)),
        draw(up_to(max_patches)) + (prefix := draw(st.sampled_from(prefixes))),
        prefix,
        draw(seeds),
        kind=draw(st.sampled_from(kinds)),
        dtype=draw(st.sampled_from(dtypes)),
        merged=draw(st.booleans()) if merged is None else merged,
        layer=layer,
    )


def as_masks(view: TokenView) -> TokenView:
    """The same tokens, where masks say what the prefix said."""
    index = torch.arange(view.hidden.shape[1]).expand(view.position.shape)
    return replace(view, valid=torch.ones_like(index).bool(), protected=index < (view.prefix or 0), prefix=None)


def ragged(view: TokenView, seed: int, junk: float = 1e30) -> TokenView:
    """Masks again, with some rows cut short on the right and nonsense where they ended; one row stays whole."""
    rng = Random(seed)
    masks = as_masks(view)
    b, n = view.position.shape
    prefix = view.prefix or 0
    lengths = torch.tensor([[rng.randint(prefix + 1, n)] for _ in range(b)])
    lengths[rng.randrange(b)] = n
    valid = torch.arange(n) < lengths
    pad = ~valid

    def spoilt(x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, torch.full_like(x, junk), x)

    trace = view.evidence.attention[-1]
    heads = pad[:, None, :, None]
    return replace(
        masks,
        hidden=spoilt(view.hidden, pad[..., None]),
        valid=valid,
        protected=masks.protected & valid,
        size=view.size * valid,
        length=(view.size * valid).sum(-1),
        evidence=replace(
            view.evidence,
            attention=(
                replace(
                    trace,
                    query=spoilt(trace.query, heads),
                    key=spoilt(trace.key, heads),
                    value=spoilt(trace.value, heads),
                ),
            ),
        ),
    )


def one_row(view: TokenView, row: int) -> TokenView:
    """One row of a view of masks, without its padding."""
    n = int(view.valid[row].sum())
    part = slice(row, row + 1)
    return replace(
        view,
        hidden=view.hidden[part, :n],
        valid=view.valid[part, :n],
        protected=view.protected[part, :n],
        position=view.position[part, :n],
        size=view.size[part, :n],
        length=view.length[part],
        evidence=replace(
            view.evidence,
            attention=tuple(
                replace(t, query=t.query[part, :, :n], key=t.key[part, :, :n], value=t.value[part, :, :n])
                for t in view.evidence.attention
            ),
        ),
    )


def slow_pairs(
    metric: list[list[float]], prefix: int, remove: int, weight: list[float] | None = None
) -> list[tuple[int, int]]:
    """ToMe's matching of one row, pair by pair: even positions against odd ones, the prefix in neither."""

    length = [math.hypot(*vector) for vector in metric]

    def cosine(i: int, j: int) -> float:
        dot = math.fsum(map(operator.mul, metric[i], metric[j]))
        return dot / (length[i] * length[j]) if length[i] and length[j] else 0.0

    pairs = []
    for i in range(prefix, len(metric)):
        if i % 2 == 0:
            alike = {j: cosine(i, j) for j in range(prefix, len(metric)) if j % 2}
            if alike:
                j = max(alike, key=lambda j: (alike[j], -j))
                cost = 1 - alike[j] if weight is None else weight[i] * (1 - alike[j])
                pairs.append((cost, i, j))
    pairs.sort(key=lambda pair: (pair[0], pair[1]))
    return [(i, j) for _, i, j in pairs[:remove]]
