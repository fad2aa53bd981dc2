"""Random caches with clusters, and multipole attention written out key by key."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from strategies import generator, seeds
from torch import Tensor

from quickmerge.multipole.attend import attend, attend_and_count
from quickmerge.multipole.clusters import Clusters
from quickmerge.multipole.settings import Multipole

GARBAGE = 1e30


@dataclass(frozen=True)
class Case:
    """One call of `attend`: rows padded on the left, each with a sink, clustered columns and a buffer.

    ``far`` is the query for centroids, where it is another one; ``softcap`` and ``sinks`` as in `attend`.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    size: Tensor | None
    clusters: Clusters
    settings: Multipole
    scaling: float | None
    far: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def run(self, **settings: Any) -> Tensor:
        """The output with other settings."""
        return self.run_and_count(**settings)[0]

    def run_and_count(self, **settings: Any) -> tuple[Tensor, Tensor]:
        chosen = replace(self.settings, **settings)
        return attend_and_count(
            self.query,
            self.keys,
            self.values,
            self.size,
            self.clusters,
            chosen,
            scaling=self.scaling,
            query_for_centroids=self.far,
            softcap=self.softcap,
            sinks=self.sinks,
        )

    def dense(self) -> Tensor:
        """Ordinary attention over everything that a row holds."""
        return literal_dense(self.query, self.keys, self.values, self.sizes(), self.scale, self.softcap, self.sinks)

    def sizes(self) -> Tensor:
        """``(B, n)``, with 0 in front of each row's sink."""
        first = (self.clusters.start - self.settings.sink).clamp_min(0)
        size = torch.ones(self.keys.shape[0], self.keys.shape[2]) if self.size is None else self.size
        return size.double() * (torch.arange(size.shape[1]) >= first[:, None])

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling

    def with_labels(self, labels: Tensor, clusters: int, spread: bool = False) -> Case:
        """The same cache, clustered otherwise."""
        made = Clusters.from_labels(
            self.keys, self.values, labels, self.clusters.start, clusters, self.size, spread=spread
        )
        return replace(self, clusters=made)

    def row(self, b: int) -> Case:
        """One row without its padding."""
        first = max(0, int(self.clusters.start[b]) - self.settings.sink)
        length = sum(block.length for block in self.clusters.blocks[b])
        keys, values = self.keys[b : b + 1, :, first:], self.values[b : b + 1, :, first:]
        size = None if self.size is None else self.size[b : b + 1, first:]
        start = self.clusters.start[b : b + 1] - first
        labels = self.clusters.labels[b : b + 1, :, :length]
        spread = self.clusters.spread is not None
        made = Clusters.from_labels(keys, values, labels, start, len(self.clusters), size, spread=spread)
        return replace(self, query=self.query[b : b + 1], keys=keys, values=values, size=size, clusters=made)


def random_case(
    seed: int,
    dtype: torch.dtype = torch.float64,
    heads: tuple[int, ...] = (1, 2, 3),
    groups: tuple[int, ...] = (1, 2, 3, 4),
    rows: tuple[int, ...] = (1, 2, 3),
    queries: tuple[int, ...] = (1, 1, 2, 3, 5),
    spread: bool = False,
    sizes: bool | None = None,
    temperature: float | None = None,
) -> Case:
    """Sizes and everything else follow from the seed."""
    rng, draws = Random(seed), generator(seed)
    b, h, g, q = rng.choice(rows), rng.choice(heads), rng.choice(groups), rng.choice(queries)
    d, dv = rng.choice((1, 3, 8, 13)), rng.choice((1, 2, 8))
    sink, even = rng.choice((0, 1, 3)), rng.random() < 0.4
    clustered = (
        [rng.randint(1, 24)] * b if even else [rng.randint(1, 24) if not r else rng.randint(0, 24) for r in range(b)]
    )
    buffer = [rng.randint(0, 6)] * b if even else [rng.randint(0, 6) for _ in range(b)]
    padding = rng.choice((0, 0, 4)) if even else rng.choice((0, 5))
    length = [sink + m + extra + q for m, extra in zip(clustered, buffer, strict=True)]
    n = max(length) + padding
    pad = [n - each for each in length]
    start = torch.tensor([p + sink for p in pad])
    count = rng.randint(1, 8)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, dtype=torch.float64)

    query = normal(b, h * g, q, d) * (rng.choice((0.3, 1.0, 3.0)) if temperature is None else temperature)
    keys, values = normal(b, h, n, d), normal(b, h, n, dv)
    size = torch.ones(b, n)
    if rng.random() < 0.5 if sizes is None else sizes:
        size = torch.randint(1, 5, (b, n), generator=draws).float()
        size[torch.rand(b, n, generator=draws) < 0.1] = 0
        size[:, n - q :] = 1
    column = torch.arange(n)
    for r, p in enumerate(pad):
        size[r, :p] = 0
        keys[r, :, :p], values[r, :, :p] = GARBAGE, GARBAGE
    given = None if bool((size[column >= torch.tensor(pad)[:, None]] == 1).all()) and rng.random() < 0.5 else size
    labels = torch.randint(count, (b, h, max(clustered)), generator=draws)
    for r, m in enumerate(clustered):
        labels[r, :, m:] = -1
    keys, values = keys.to(dtype), values.to(dtype)
    made = Clusters.from_labels(keys, values, labels, start, count, given, spread=spread)
    settings = Multipole(sink=sink, budget=rng.randint(0, 26), variance=spread)
    return Case(query.to(dtype), keys, values, given, made, settings, rng.choice((None, 0.3, 1.0)))


def cases(**options: Any) -> st.SearchStrategy[Case]:
    return seeds.map(lambda seed: random_case(seed, **options))


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def literal_dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    size: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the newest tokens, one query head after the other: ``(B, q, Hq, Dv)`` in float64."""
    b, hq, q, _ = query.shape
    h, n = keys.shape[1:3]
    out = torch.zeros(b, q, hq, values.shape[-1], dtype=torch.float64)
    for r in range(b):
        for i in range(hq):
            for j in range(q):
                seen = [c for c in range(n - q + j + 1) if size[r, c] > 0]
                k, v = keys[r, i // (hq // h), seen].double(), values[r, i // (hq // h), seen].double()
                logits = scale * (k @ query[r, i, j].double())
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                logits = logits + size[r, seen].double().log()
                if sinks is not None:
                    logits = torch.cat([logits, sinks[i : i + 1].double()])
                out[r, j, i] = logits.softmax(0)[: len(seen)] @ v if seen else 0
    return out


def literal_multipole(case: Case) -> tuple[Tensor, Tensor]:
    """Section 3 of the paper, one query head, one cluster and one key after the other, in Python's floats.

    Returns the output ``(B, q, Hq, Dv)`` and how many clustered columns were read exactly, ``(B, H, q)``.
    """
    b, hq, q, d = case.query.shape
    h, n = case.keys.shape[1:3]
    g, told, sizes = hq // h, case.settings, case.sizes().tolist()
    out = torch.zeros(b, q, hq, case.values.shape[-1], dtype=torch.float64)
    rows = torch.zeros(b, h, q, dtype=torch.long)
    for r in range(b):
        start = int(case.clusters.start[r])
        length = sum(block.length for block in case.clusters.blocks[r])
        for head in range(h):
            keys, values = case.keys[r, head].double().tolist(), case.values[r, head].double().tolist()
            label = case.clusters.labels[r, head].tolist()
            groups = [[start + m for m in range(length) if label[m] == i] for i in range(len(case.clusters))]
            centre = [mean(keys, members, sizes[r]) for members in groups]
            stand_in = [mean(values, members, sizes[r]) for members in groups]
            weight = [math.fsum(sizes[r][m] for m in members) for members in groups]
            radius = [
                math.fsum(sizes[r][m] * math.dist(keys[m], c) ** 2 for m in members) / w if w else 0.0
                for members, c, w in zip(groups, centre, weight, strict=True)
            ]
            real = [i for i, w in enumerate(weight) if w > 0]
            for j in range(q):
                own = [case.query[r, head * g + i, j].double().tolist() for i in range(g)]
                away = case.query if case.far is None else case.far
                far = [away[r, head * g + i, j].double().tolist() for i in range(g)]
                z = [[case.scale * dot(x, c) for c in centre] for x in far]
                bent = [[bend(a, case.softcap) for a in row] for row in z]
                z = [[each[0] for each in row] for row in bent]
                if told.variance:
                    z = [
                        [
                            a + (up**2 + curve) * case.scale**2 * dot(x, x) * rad / (2 * d)
                            for (a, up, curve), rad in zip(row, radius, strict=True)
                        ]
                        for x, row in zip(far, bent, strict=True)
                    ]
                total = [math.fsum(weight[i] * math.exp(row[i]) for i in real) for row in z]
                share = {i: math.fsum(math.exp(row[i]) / t for row, t in zip(z, total, strict=True)) for i in real}
                chosen: list[int] = []
                used, mass = 0, 0.0
                for i in sorted(real, key=lambda i: (-float(torch.tensor(share[i] / g).float()), i)):
                    if used + len(groups[i]) > told.budget or (told.select == "top_p" and mass >= told.top_p):
                        break
                    chosen.append(i)
                    used, mass = used + len(groups[i]), mass + weight[i] * share[i] / g
                rows[r, head, j] = used
                open_ = [c for c in range(n - q + j + 1) if c < start or c >= start + length]
                exactly = [c for c in [*open_, *(m for i in chosen for m in groups[i])] if sizes[r][c] > 0]
                for i in range(g):
                    terms = [
                        (sizes[r][c] * math.exp(bend(case.scale * dot(own[i], keys[c]), case.softcap)[0]), values[c])
                        for c in exactly
                    ]
                    if told.replacement:
                        terms += [(weight[a] * math.exp(z[i][a]), stand_in[a]) for a in real if a not in chosen]
                    sunk = [] if case.sinks is None else [math.exp(float(case.sinks[head * g + i]))]
                    whole = math.fsum([w for w, _ in terms] + sunk)
                    for a in range(out.shape[-1]):
                        out[r, j, head * g + i, a] = math.fsum(w * v[a] for w, v in terms) / whole if whole else 0.0
    return out, rows


def bend(x: float, softcap: float | None) -> tuple[float, float, float]:
    """``f(x) = c tanh(x / c)``, its slope, and its slope's slope (by the sech, unlike the code); x, 1, 0 without c."""
    if softcap is None:
        return x, 1.0, 0.0
    sech2 = 1 / math.cosh(x / softcap) ** 2
    return softcap * math.tanh(x / softcap), sech2, -2 * math.tanh(x / softcap) * sech2 / softcap


def mean(x: list[list[float]], members: list[int], size: list[float]) -> list[float]:
    weight = math.fsum(size[m] for m in members)
    if not weight:
        return [0.0] * len(x[0])
    return [math.fsum(size[m] * x[m][a] for m in members) / weight for a in range(len(x[0]))]


__all__ = ["Case", "attend", "cases", "dot", "literal_dense", "literal_multipole", "random_case"]
