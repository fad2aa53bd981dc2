"""A cache that grows in place, and keeps the clusters of its keys in step with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from quickmerge.bench.harness import settled
from quickmerge.errors import QuickmergeError
from quickmerge.models.columns import slide_layer, slide_table, stored, take_tail_of_layer, take_tail_of_table
from quickmerge.models.compat import DynamicLayer, cache_name
from quickmerge.multipole.clustering import Columns, bounds, cluster, extend
from quickmerge.multipole.clusters import Clusters
from quickmerge.multipole.exact import coarsen
from quickmerge.multipole.settings import Multipole, MultipoleStats

SPARE = 8
"""A buffer is made larger than what it must hold by a share of 1 / SPARE."""

LEAST = 256
"""And by so many tokens at least."""


class Facts(NamedTuple):
    """What is known of clusters without asking the device.

    For each row the first column that is clustered, one past the last, and how many clusters there are, fine and coarse
    ones; and the memory that they take.
    """

    clusters: Clusters
    coarse: Clusters | None
    start: list[int]
    end: list[int]
    fine: list[int]
    upper: list[int]
    bytes: int


class MultipoleLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer for full attention: every key and value it was ever given, and the clusters made of them.

    ``keys`` and ``values`` ``(B, H, n, D)`` are views of buffers with room to spare. New tokens are written behind the
    last one, so the past is copied only when the room is used up, which it is ever more rarely. Where gradients are
    recorded a copy is made for every update, as in any other layer.

    What changes rows or columns changes the clusters with them: cropping, beams, repeating and picking rows.

    ``clusters``: of the clustered columns; None where there are none yet.
    ``coarse``: the upper one of two levels; None where there is one.
    ``made_with``: the settings that the clusters were made with.
    ``stale``: whether a prompt was read, or clustered tokens were taken back, since the clusters were made.
    ``position (B, n)`` long: the place at which each key was rotated, if anybody noted it.
    ``reading``: the settings of the run that reads it; None outside of any.
    ``first``: the first column of each row that holds a token.

    Draft trees can be read from it (`quickmerge.models.columns`). Tokens are clustered by their places in a row, so
    there may be no holes between them, and no pass may go over the length at which the next ones are clustered.
    """

    movable = tight = True

    fillable = True
    """A run that merges a prompt may write it here; see `quickmerge.merge.text.merged_cache`."""

    keys: Any
    values: Any
    is_whole = True
    """Every token of the sequence has a column of its own here."""

    def __init__(self) -> None:
        super().__init__()
        self.clusters: Clusters | None = None
        self.coarse: Clusters | None = None
        self.made_with: Multipole | None = None
        self.stale = True
        self.position: Tensor | None = None
        self.reading: Multipole | None = None
        self.first: list[int] | None = None
        self._rooms: list[Tensor | None] = [None, None]
        self._facts: Facts | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys ``(B, H, q, D)`` and values ``(B, H, q, Dv)``; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self._rooms[0] = _append(self.keys, self._rooms[0], key_states)
        self.values, self._rooms[1] = _append(self.values, self._rooms[1], value_states)
        return self.keys, self.values

    def note_positions(self, position: Tensor) -> None:
        """Note the places ``(B or 1, q)`` at which the last ``q`` keys were rotated.

        Raises:
            QuickmergeError: if keys before them came without their places.
        """
        new = position.expand(len(self.keys), -1)
        past = stored(self) - new.shape[1]
        held = new[:, :0] if self.position is None else self.position
        if held.shape[1] < past:
            raise QuickmergeError(
                f"{cache_name()} was filled where nobody noted positions, which space='windowed' needs: fill it "
                "inside the run, or use space='rotated'"
            )
        self.position = torch.cat([held[:, :past], new], 1)

    def forget_clusters(self) -> None:
        """Drop the clusters; keys and values stay."""
        self.clusters = self.coarse = self.made_with = self._facts = None
        self.stale = True

    @property
    def facts(self) -> Facts | None:
        """See `Facts`; None where nothing is clustered."""
        clusters, coarse, known = self.clusters, self.coarse, self._facts
        if clusters is None:
            return None
        if known is None or known.clusters is not clusters or known.coarse is not coarse:
            # Looked up once, since on a GPU it means waiting.
            start = [int(column) for column in clusters.start.tolist()]
            end = [first + sum(b.length for b in row) for first, row in zip(start, clusters.blocks, strict=True)]
            fine = [sum(b.clusters for b in row) for row in clusters.blocks]
            upper = [] if coarse is None else [sum(b.clusters for b in row) for row in coarse.blocks]
            size = clusters.bytes + (0 if coarse is None else coarse.bytes)
            known = self._facts = Facts(clusters, coarse, start, end, fine, upper, size)
        return known

    def due(self, settings: Multipole) -> int:
        """How many columns there must be before the new tokens for another group to be clustered in some row."""
        facts, step = self.facts, settings.interval
        if facts is None:
            return settings.sink + 2 * step
        # Clusters that were cut may end within a group.
        return (
            min(start + (end - start) // step * step for start, end in zip(facts.start, facts.end, strict=True))
            + 2 * step
        )

    @property
    def bytes(self) -> int:
        """Memory of keys and values, with the room to spare."""
        pairs = zip((self.keys, self.values), self._rooms, strict=True)
        held = (room if _views(view, room) else view for view, room in pairs)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    # What transformers does to a layer ---------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, ``-tokens_to_remove`` of them, with whatever was clustered of them."""
        super().crop(tokens_to_remove)
        length = stored(self)
        left = None if self.clusters is None else self.clusters.crop(length)
        if left is not self.clusters:
            self.clusters, self.coarse, self.stale = left, None, True
        if self.position is not None:
            self.position = self.position[:, :length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        self._pick(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if stored(self) > 0:
            rows = torch.arange(len(self.keys), device=self.keys.device)
            self._pick(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows: their numbers, or a mask of all rows."""
        if stored(self) > 0:
            rows = torch.arange(len(self.keys), device=self.keys.device)
            self._pick(rows[indices.to(rows.device)])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.forget_clusters()
        self.position = self.first = None
        self._rooms = [None, None]

    def _pick(self, index: Tensor) -> None:
        length = stored(self)
        if not length:
            return
        for place, name in enumerate(("keys", "values")):
            held, room = getattr(self, name), self._rooms[place]
            # With its room, so that the next token needs no second copy.
            whole = room if room is not None and _views(held, room) else held
            picked = whole.index_select(0, index.to(whole.device))
            self._rooms[place] = picked if whole is room else None
            setattr(self, name, picked[:, :, :length])
        if self.clusters is not None:
            self.clusters = self.clusters.select_rows(index)
        if self.coarse is not None:
            self.coarse = self.coarse.select_rows(index)
        if self.position is not None:
            self.position = self.position.index_select(0, index.to(self.position.device))
        if self.first is not None:
            self.first = [self.first[row] for row in index.tolist()]

    # Draft trees -------------------------------------------------------------------------------------------------

    def room(self) -> list[int] | None:
        """For each row how many tokens behind the next one see the same clusters as that one."""
        settings, rows = self.reading, len(self.keys)
        if settings is None or not settings.update:
            return None
        first, step, past = self.first or [0] * rows, settings.interval, stored(self)
        behind = [past - column - settings.sink for column in first]
        # Tokens are clustered once there are two groups of them, and then with each further group.
        return [max(2, n // step + 1) * step - 1 - n for n in behind]

    def widest(self) -> int | None:
        """How many tokens are read by clusters at once."""
        return None if self.reading is None else self.reading.queries

    def take_tail(self, tail: int, index: Tensor, there: Tensor | None) -> None:
        """See `quickmerge.models.columns.take_tail`; the columns may not be clustered yet."""
        take_tail_of_layer(self, tail, index, there)
        if self.position is not None:
            self.position = take_tail_of_table(self.position, tail, index)

    def slide(self, by: Sequence[int]) -> None:
        """See `quickmerge.models.columns.slide`; clusters move with their columns."""
        slide_layer(self, by)
        step = torch.tensor(list(by), device=self.keys.device)
        if self.clusters is not None:
            start, end = self.clusters.start + step, self.clusters.end + step
            self.clusters = replace(self.clusters, start=start, end=end)
        if self.position is not None:
            self.position = slide_table(self.position, by)
        self.first = [a + b for a, b in zip(self.first or [0] * len(by), by, strict=True)]


class MultipoleCache(DynamicCache):  # type: ignore[misc]
    """A `transformers.DynamicCache` whose layers of full attention can hold clusters; sliding ones are as they were.

    Inside `quickmerge.multipole` every empty `DynamicCache` becomes such a one. Made by hand it may also be filled
    outside, in ``model(...)`` or ``generate``, where it is a plain cache, and then be read inside a run, or inside
    several with other settings: clusters are kept as long as they were made with the settings that are asked for.

    Args:
        config: the configuration of the model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = MultipoleLayer()


def _views(held: Tensor | None, room: Tensor | None) -> bool:
    """Whether ``held`` is the front part of ``room``."""
    if held is None or room is None or held.ndim != room.ndim:
        return False
    same = held.data_ptr() == room.data_ptr() and held.stride() == room.stride()
    return same and held.shape[:2] == room.shape[:2] and held.shape[2] <= room.shape[2]


def _append(held: Tensor, room: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor | None]:
    """``held`` with ``new`` behind it, and the buffer that both are in; None if there is none."""
    if torch.is_grad_enabled() and (new.requires_grad or held.requires_grad):
        return torch.cat([held, new], -2), None
    past = held.shape[2] if held.ndim == 4 else 0
    need = past + new.shape[2]
    # A tensor that was made in inference mode may not be written to outside.
    closed = room is not None and room.is_inference() and not torch.is_inference_mode_enabled()
    if room is None or closed or room.shape[2] < need or not _views(held, room):
        room = new.new_empty(*new.shape[:2], need + max(need // SPARE, LEAST), new.shape[3])
        if past:
            room[:, :, :past] = held
    room[:, :, past:need] = new
    return room[:, :, :need], room


# Counting what multipole attention reads, without making the device wait for it.


class Tally:
    """The sums behind a `MultipoleStats`; what is on the device stays there until somebody asks.

    Args:
        settings: of the run.
        blocks: how many blocks read clusters.
        blocks_all: how many the model has.
    """

    def __init__(self, settings: Multipole, blocks: int, blocks_all: int) -> None:
        self.settings = settings
        self._stats = MultipoleStats(settings=settings.label, blocks=blocks, blocks_all=blocks_all)
        self._queries = 0
        self._dense = self._others = 0.0
        self._kept: Tensor | float = 0.0

    def clustered(self, anew: bool, seconds: float) -> None:
        """Clusters of one block were made ``anew``, or new tokens joined them."""
        if anew:
            self._stats.clustering_seconds += seconds
        else:
            self._stats.updates += 1 / self._stats.blocks
            self._stats.update_seconds += seconds

    def read(self, held: MultipoleLayer, new: int, kept: Tensor | None, seconds: float) -> None:
        """One block read its cache for ``new`` tokens.

        Args:
            held: its layer.
            new: of the last columns.
            kept: ``(B, H, q)`` clustered columns that each of them read exactly; None if everything was.
            seconds: of attention.
        """
        self._stats.attention_seconds += seconds
        facts, repl = held.facts, 1 + self.settings.replacement
        # Of the new tokens the i-th sees i - 1 of the others.
        seen = stored(held) - (new - 1) / 2
        self._queries += new
        if facts is None or kept is None:
            self._dense += new * 2 * seen
            self._others += new * 2 * seen
            return
        rows = len(facts.start)
        whole = self.settings.select == "budget" and self.settings.budget >= facts.clusters.width
        for i, (start, end, fine) in enumerate(zip(facts.start, facts.end, facts.fine, strict=True)):
            valid = seen - max(0, start - self.settings.sink)
            looked = min(self.settings.budget, fine) + facts.upper[i] if facts.upper else fine
            centroids = 0 if whole else repl * looked
            self._dense += new * 2 * valid / rows
            self._others += new * (2 * (valid - (end - start)) + centroids) / rows
        self._kept = self._kept + kept.double().mean() * new

    def forward(self, seconds: float, short: bool, layers: Sequence[MultipoleLayer]) -> None:
        """One forward of the decoder: a ``short`` one, that may read clusters, or one that reads a prompt."""
        stats = self._stats
        if short:
            stats.decode_steps += 1
            stats.decode_seconds += seconds
        else:
            stats.prefill_seconds += seconds
        filled = [held for held in layers if stored(held)]
        if not filled:
            return
        stats.rows = len(filled[0].keys)
        stats.tokens = stats.clustered = stats.clusters = 0.0
        stats.cache_bytes = sum(held.bytes for held in filled)
        stats.cluster_bytes = 0
        for held in filled:
            facts, n = held.facts, stored(held)
            if facts is None:
                stats.tokens += n / len(filled)
                continue
            share = 1 / (len(filled) * len(facts.start))
            first = [max(0, start - self.settings.sink) for start in facts.start]
            stats.tokens += share * sum(n - column for column in first)
            stats.clustered += share * sum(e - s for s, e in zip(facts.start, facts.end, strict=True))
            stats.clusters += share * sum(facts.fine)
            stats.cluster_bytes += facts.bytes

    def stats(self) -> MultipoleStats:
        """Everything up to now."""
        stats, queries = self._stats, max(1, self._queries)
        settled(stats)
        stats.kept = float(self._kept) / queries
        stats.rows_dense = self._dense / queries
        stats.rows_read = self._others / queries + 2 * stats.kept
        return stats


# When the clusters of a cache layer are made, and when new tokens join them.


READING = ("budget", "select", "top_p", "replacement", "query_position", "update", "first", "queries")
"""Settings that are of no account for what the clusters are."""


def refresh(
    held: MultipoleLayer,
    new: int,
    size: Tensor | None,
    settings: Multipole,
    keys: Columns,
    values: Tensor | None = None,
) -> None:
    """Bring the clusters of a layer up to date, in front of the attention of ``new`` tokens that it already holds.

    How many tokens are clustered depends on how many there were before the new ones, and not on how they came. Where
    nothing is due it costs nothing. Clusters that were made with other settings are dropped first. No gradient goes
    through the centroids.

    Args:
        held: the layer; its ``clusters`` are changed, and ``coarse`` with them.
        new: how many of its last columns are the new tokens.
        size: ``(B, n)`` tokens that each column stands for, 0 for padding. Default: one each.
        settings: how to cluster.
        keys: in the space of the clusters, see `quickmerge.multipole.clustering.cluster`.
        values: ``(B, H, n, Dv)``, where attention reads others than the layer holds, as those that are made of a latent
            vector. Default: the layer's.
    """
    if held.made_with not in (None, settings) and _kind(held.made_with) != _kind(settings):
        held.forget_clusters()
    old, coarse = held.clusters, held.coarse
    with torch.no_grad():
        if held.stale or settings.update:
            held.clusters = _grown(
                held, stored(held) - new, size, settings, keys, held.values if values is None else values
            )
        held.stale, held.made_with = False, settings
        if held.clusters is None or settings.coarse is None:
            held.coarse = None
        elif coarse is None or held.clusters is not old:
            before = None if old is None or coarse is None else (old, coarse)
            held.coarse = coarsen(held.clusters, settings, before)


def _grown(
    held: MultipoleLayer, past: int, size: Tensor | None, settings: Multipole, keys: Columns, values: Tensor
) -> Clusters | None:
    """The clusters with every group in them that is due; the very same where none is."""
    old = held.clusters
    if past < held.due(settings):
        return old
    if old is None:
        start, end = bounds(_first(size, held.keys), past, settings)
        return cluster(keys, values, size, start, end, settings)
    start, end = bounds(old.start - settings.sink, past, settings)
    return extend(old, keys, values, size, torch.maximum(end, old.end), settings)


def _first(size: Tensor | None, keys: Tensor) -> Tensor:
    """``(B,)`` long: the first column of each row that holds a token."""
    if size is None:
        return torch.zeros(len(keys), dtype=torch.long, device=keys.device)
    return (size > 0).to(torch.uint8).argmax(-1)


def _kind(settings: Multipole) -> Multipole:
    usual = Multipole()
    return replace(settings, **{name: getattr(usual, name) for name in READING})
