"""k-means of one block of columns after the other, for all rows of a batch that are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from quickmerge.multipole.clusters import Block, Clusters, Summary, join, side_by_side, summarise
from quickmerge.multipole.settings import Multipole
from quickmerge.multipole.weighted_kmeans import Draws, centred, group, lloyd, means, nearest, pick, remembered

__all__ = [
    "Columns",
    "Ready",
    "Source",
    "Task",
    "block_lengths",
    "bounds",
    "cluster",
    "extend",
    "newcomers",
    "solve",
    "tasks",
    "together",
]


Columns: TypeAlias = Tensor | Callable[[Sequence[int], Sequence[int], int, slice], Tensor]
"""``(B, H, n, D)``, or a function of rows, first columns, a length and some heads: ``(G, h, length, D)``.

It is asked for no column of a head twice but those of the open block, so a function may compute what it returns.
"""

Ready: TypeAlias = "Sequence[dict[tuple[Task, Block, int], Summary]]"
"""For each row what is known of blocks that it does not have yet, by task, block and first head; see `solve`."""


@dataclass(frozen=True)
class Source:
    """What is clustered: keys, in the space in which they are compared, values, sizes, and each row's first column."""

    keys: Columns
    values: Tensor
    size: Tensor | None
    start: Sequence[int]

    def span(self, rows: list[int], blocks: Sequence[Block], heads: slice) -> _Span:
        """The columns of a block of each row, blocks all alike, for some heads."""
        first = [self.start[row] + block.first for row, block in zip(rows, blocks, strict=True)]
        length = blocks[0].length
        size = None
        if self.size is not None:
            size = _take(self.size[:, None, :, None], rows, first, length, slice(None))[:, 0, :, 0]
        keys, values = (_take(x, rows, first, length, heads) for x in (self.keys, self.values))
        return _Span(keys, values, size)


class Task(NamedTuple):
    """A block that a row is to have: of ``length`` columns, of which ``held`` are in ``had`` clusters already.

    With ``held`` of 0 it is clustered from nothing. Rows whose tasks are equal are worked at together.
    """

    length: int
    held: int = 0
    had: int = 0

    def behind(self, last: Block | None, settings: Multipole) -> Block:
        """The block, by the ``last`` one of those that the row keeps."""
        first, cluster = (0, 0) if last is None else (last.first + last.length, last.cluster + last.clusters)
        wanted = settings.clusters(self.length)
        if self.held:
            wanted = self.had + min(max(0, wanted - self.had), self.length - self.held)
        return Block(first, self.length, cluster, wanted)


def tasks(row: Sequence[Block], columns: int, settings: Multipole) -> tuple[int, list[tuple[Task, Block]]]:
    """What is to be done for a row of these blocks to have ``columns`` clustered columns.

    Returns:
        How many of its blocks stay as they are, and what is made behind them, in order.

    Raises:
        ValueError: if it has more of them.
    """
    last = row[-1] if row else Block(0, 0, 0, 0)
    held = last.first + last.length
    if columns < held:
        raise ValueError(f"new_end must lie at or behind the end of the clusters, got {columns} columns of {held}")
    if columns == held:
        return len(row), []
    kept, lengths = len(row[:-1]), block_lengths(columns - last.first, settings.block)
    if len(lengths) == 1 and last.length:
        wanted = [Task(lengths[0], last.length, last.clusters)]
    else:
        wanted = [Task(length) for length in lengths]
    found: list[tuple[Task, Block]] = []
    before = row[kept - 1] if kept else None
    for task in wanted:
        before = task.behind(before, settings)
        found.append((task, before))
    return kept, found


def together(values: Tensor) -> list[slice]:
    """The key-value heads that are clustered at once: each alone, or on a device, which many small tasks keep waiting,
    all of them.

    Heads are clustered independently of one another. Those of other sizes of work would round differently, so this does
    not depend on when the work is done.
    """
    heads = values.shape[1]
    return [slice(h, h + 1) for h in range(heads)] if values.device.type == "cpu" else [slice(0, heads)]


def solve(
    source: Source,
    rows: list[int],
    task: Task,
    blocks: Sequence[Block],
    heads: slice,
    settings: Multipole,
    old: Clusters | None = None,
) -> Summary:
    """Cluster a block of some rows, all with the same ``task``, for some heads.

    Args:
        source: of keys and values.
        rows: G of them.
        task: what is to be done.
        blocks: the block of each row.
        heads: h of the key-value heads.
        settings: see `cluster` and `extend`.
        old: where the clusters are that a block of columns that are clustered already is grown from.
    """
    span = source.span(rows, blocks, heads)
    x, weight, draws = span.points(settings.seed)
    more = blocks[0].clusters - task.had
    if not task.held:
        first = pick(x, draws.first(more, x))
        label, settled = lloyd(x, first, settings.iterations, draws, weight)
    else:
        assert old is not None
        before, known = [], []
        for row, block in zip(rows, blocks, strict=True):
            before.append(old.labels[row, heads, block.first : block.first + task.held].long() - block.cluster)
            if old.settled is not None:
                known.append(old.settled[row, heads, block.cluster : block.cluster + task.had])
        none = torch.zeros(len(x), task.had, dtype=torch.bool, device=x.device)
        centroids, state = newcomers(x, weight, torch.cat(before), torch.cat(known) if known else none, draws, more)
        label, settled = lloyd(x, centroids, settings.update_iterations, draws, weight, state)
    shape = (len(rows), len(label) // len(rows), -1)
    part = summarise(*span, label.view(shape), blocks[0].clusters, settings.variance)
    part.settled = settled.view(shape)
    return part


class _Span(NamedTuple):
    """Some columns of G rows: keys ``(G, H, L, D)``, values ``(G, H, L, Dv)`` and sizes ``(G, L)`` or None."""

    keys: Tensor
    values: Tensor
    size: Tensor | None

    def points(self, seed: int) -> tuple[Tensor, Tensor | None, Draws]:
        """The keys as points to cluster, ``(G * H, L, D)``, their weights ``(G * H, L)`` or None, and draws of them."""
        x = self.keys.detach().to(torch.promote_types(self.keys.dtype, torch.float32)).flatten(0, 1)
        weight = None if self.size is None else self.size.repeat_interleave(self.keys.shape[1], 0)
        return centred(x, weight)[0], weight, Draws(x.shape[1], seed, weight)


def newcomers(
    x: Tensor, weight: Tensor | None, label: Tensor, settled: Tensor, draws: Draws, more: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Sequential k-means in one go: each new point joins the nearest of the old and ``more`` new centroids.

    Args:
        x: ``(R, L, D)`` old points and behind them the new ones.
        weight: ``(R, L)`` or None.
        label: ``(R, L0)`` long, of the old points.
        settled: ``(R, K0)`` bool, see `quickmerge.multipole.weighted_kmeans.lloyd`.
        draws: over the L points.
        more: how many of the new points begin a cluster.

    Returns:
        Centroids ``(R, K, D)``, and what `quickmerge.multipole.weighted_kmeans.nearest_again` wants to know.
    """
    held, had = label.shape[1], settled.shape[1]
    w = (None, None) if weight is None else (weight[:, :held], weight[:, held:])
    groups = group(label, had, w[0])
    empty = groups.count == 0
    centroids = torch.where(empty[..., None], pick(x, draws.any(had, x)), means(x[:, :held], groups, w[0]))
    first = draws.order[draws.order >= held].view(len(draws.order), -1)[:, :more].to(x.device)
    centroids = torch.cat([centroids, pick(x, first.expand(len(x), -1))], 1)
    old = remembered(x[:, :held], centroids, label, settled & ~empty)
    joined, least = nearest(x[:, held:], centroids)
    new = group(joined, had + more, w[1])
    # c <- (c n + the sum of the m new points) / (n + m)
    share = torch.where(new.count > 0, new.count / (pad(groups.count, (0, more)) + new.count), 0.0)[..., None]
    centroids = centroids + share.to(x.dtype) * (means(x[:, held:], new, w[1]) - centroids)
    moved = (new.members > 0) | pad(~settled | empty, (0, more))
    return centroids, (torch.cat([label, joined], 1), torch.cat([old, least], 1), moved)


def _take(x: Columns, rows: list[int], first: list[int], length: int, heads: slice) -> Tensor:
    """Columns of some rows and heads: ``(G, h, length, D)``."""
    if not isinstance(x, Tensor):
        return x(rows, first, length, heads)
    if len(rows) == 1:  # without a copy
        return x[rows[0], None, heads, first[0] : first[0] + length]
    return torch.stack([x[row, heads, at : at + length] for row, at in zip(rows, first, strict=True)])


# Clustering the keys of a layer: a whole prompt block by block, and new tokens a few at a time.
#
# Tokens are clustered in blocks of W consecutive ones, so cost grows with their number and not with its square, and
# what is done with the last block leaves the others alone (arXiv 2506.13059, section 3.3).


def bounds(first: Tensor, length: int, settings: Multipole) -> tuple[Tensor, Tensor]:
    """Which columns of a cache should be clustered: ``start`` and ``end``, each ``(B,)`` long.

    Not the sink, and not the newest tokens: ``interval`` of them up to twice as many, less one. In a row of fewer than
    ``min_tokens`` none are.

    Args:
        first: ``(B,)`` long, the first column that holds a token.
        length: n, how many columns there are.
        settings: ``sink``, ``interval`` and ``min_tokens``.
    """
    start = first + settings.sink
    steps = torch.div(length - start, settings.interval, rounding_mode="floor") - 1
    steps = torch.where(length - first < settings.min_tokens, 0, steps.clamp_min(0))
    return start, start + steps * settings.interval


def block_lengths(tokens: int, block: int) -> list[int]:
    """Cut tokens into blocks of ``block`` = W, the last of W/2 up to 3 W/2, or of less where there are no more."""
    if tokens == 0:
        return []
    full = max(0, (2 * tokens - block) // (2 * block))
    return [block] * full + [tokens - full * block]


def cluster(
    keys: Columns,
    values: Tensor,
    size: Tensor | None,
    start: Tensor,
    end: Tensor,
    settings: Multipole,
    ready: Ready | None = None,
) -> Clusters | None:
    """Cluster the columns ``start`` to ``end`` of each row.

    Args:
        keys: ``(B, H, n, D)``, in the space in which they are to be compared.
        values: ``(B, H, n, Dv)``.
        size: ``(B, n)`` how many tokens each column stands for, 0 for none; default: one each.
        start: ``(B,)`` first column.
        end: ``(B,)`` one past the last; a row with ``end`` equal to ``start`` has nothing to cluster.
        settings: ``ratio``, ``block``, ``iterations``, ``seed`` and ``variance``.
        ready: what `solve` found before, of these settings and columns. Default: nothing.

    Returns:
        The clusters, or None where no row has anything to cluster: then all keys have to be read.

    Raises:
        ValueError: if ``end`` lies before ``start``, or there are not so many columns.
    """
    lengths = _lengths(start, end, values)
    if not any(lengths):
        return None
    source = Source(keys, values, size, start.tolist())
    return _with(source, start, [[] for _ in lengths], lengths, settings, None, ready)


def extend(
    clusters: Clusters,
    keys: Columns,
    values: Tensor,
    size: Tensor | None,
    new_end: Tensor,
    settings: Multipole,
    ready: Ready | None = None,
) -> Clusters:
    """Let the columns behind the clustered ones join the last block of their row.

    A few of the new keys begin clusters of their own, each other one joins the nearest cluster, whose centroid follows,
    and ``update_iterations`` rounds of k-means over the whole block set that right. Where the block would become 3 W/2
    long or longer, it is cut into blocks of W instead, each clustered by itself from nothing, and the last one is open
    again. All blocks before it stay as they are, and their keys are not read.

    Args:
        clusters: as `cluster` or this function made them; they are not changed.
        keys: see `cluster`; also what was clustered before.
        values: as keys.
        size: see `cluster`.
        new_end: ``(B,)``, at least ``clusters.end``.
        settings: as for `cluster`, and ``update_iterations``.
        ready: see `cluster`; of these clusters, too.

    Raises:
        ValueError: if ``new_end`` lies before ``clusters.end``, or there are not so many columns.
    """
    lengths = _lengths(clusters.start, new_end, values)
    source = Source(keys, values, size, clusters.start.tolist())
    return _with(source, clusters.start, clusters.blocks, lengths, settings, clusters, ready)


def _with(
    source: Source,
    start: Tensor,
    rows: Sequence[list[Block]],
    lengths: Sequence[int],
    settings: Multipole,
    old: Clusters | None,
    ready: Ready | None,
) -> Clusters:
    """Clusters of rows with these blocks and so many columns, of which ``ready`` may hold some."""
    wanted = [tasks(row, length, settings) for row, length in zip(rows, lengths, strict=True)]
    if old is not None and not any(found for _, found in wanted):
        return old
    kept = [n for n, _ in wanted]
    blocks = [[*row[:n], *(block for _, block in found)] for row, (n, found) in zip(rows, wanted, strict=True)]
    pieces: list[tuple[int, Block, Summary]] = []
    parts: dict[tuple[int, Block], list[Summary]] = {}
    for alike in _alike([tuple(task for task, _ in found) for _, found in wanted]):
        for place, (task, _) in enumerate(wanted[alike[0]][1]):
            own = {row: wanted[row][1][place][1] for row in alike}
            for heads in together(source.values):
                known = {row: ready[row].get((task, own[row], heads.start)) for row in alike} if ready else {}
                found = {row: part for row, part in known.items() if part is not None}
                left = [row for row in alike if row not in found]
                if left:
                    part = solve(source, left, task, [own[row] for row in left], heads, settings, old)
                    found |= {row: part.row(i) for i, row in enumerate(left)}
                for row in alike:
                    parts.setdefault((row, own[row]), []).append(found[row])
    pieces = [(row, block, side_by_side(found)) for (row, block), found in parts.items()]
    return join(start, blocks, pieces, old, kept)


def _alike(jobs: Sequence[tuple[Task, ...]]) -> list[list[int]]:
    """Rows for which the same is to be done, so that it is done at once; not those for which nothing is."""
    rows: dict[tuple[Task, ...], list[int]] = {}
    for row, job in enumerate(jobs):
        if job:
            rows.setdefault(job, []).append(row)
    return list(rows.values())


def _lengths(start: Tensor, end: Tensor, values: Tensor) -> list[int]:
    """How many columns each row is to have clustered."""
    pairs = list(zip(start.tolist(), end.tolist(), strict=True))
    limit = values.shape[2]
    for first, last in pairs:
        if first < 0 or last < first or (last > limit and last > first):
            raise ValueError(
                f"columns {first} to {last} cannot be clustered: they must begin at 0 or later, end no earlier than "
                f"they begin, and lie within the cache of {limit}"
            )
    return [last - first for first, last in pairs]
