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
from quickmerge.multipole.ahead import Ahead
from quickmerge.multipole.clusters import Clusters
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


def next_due(start: int, end: int, settings: Multipole) -> int:
    """How many columns there must be for more of a row to be clustered than those from ``start`` to ``end``.

    Clusters that were cut may end within a group.
    """
    step = settings.interval
    due = start + (end - start) // step * step + 2 * step
    return due if end > start else max(due, start - settings.sink + settings.min_tokens)


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
    ``ahead``: what was clustered before it is due.
    ``place``: which one it is of the layers of its cache that hold clusters, and how many there are: they take turns.

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
        self.ahead = Ahead()
        self.place = (0, 1)
        self._rooms: list[Tensor | None] = [None, None]
        self._facts: Facts | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys ``(B, H, q, D)`` and values ``(B, H, q, Dv)``; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self._rooms[0] = _append(self.keys, self._rooms[0], key_states, self.place)
        self.values, self._rooms[1] = _append(self.values, self._rooms[1], value_states, self.place)
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
        self.ahead.drop()

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
        facts = self.facts
        if facts is None:
            return max(settings.sink + 2 * settings.interval, settings.min_tokens)
        return min(next_due(start, end, settings) for start, end in zip(facts.start, facts.end, strict=True))

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
        self.ahead.crop(length)
        if left is not self.clusters:
            self.clusters, self.coarse, self.stale = left, None, True
            self.ahead.drop()
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
        if self.ahead.parts:
            self.ahead.select_rows(index.tolist(), self.clusters)
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
        first, step, past, facts = self.first or [0] * rows, settings.interval, stored(self), self.facts
        behind = [past - column - settings.sink for column in first]
        # Tokens are clustered once there are two groups of them, and then with each further group.
        least = [max(2 * step, settings.min_tokens - settings.sink)] * rows
        if facts is not None:
            least = [2 * step if a < b else n for a, b, n in zip(facts.start, facts.end, least, strict=True)]
        return [(m if n < m else (n // step + 1) * step) - 1 - n for n, m in zip(behind, least, strict=True)]

    def widest(self) -> int | None:
        """How many tokens are read by clusters at once."""
        return None if self.reading is None else self.reading.queries

    def take_tail(self, tail: int, index: Tensor, there: Tensor | None, still: int = 0) -> None:
        """See `quickmerge.models.columns.take_tail`; the columns may not be clustered yet."""
        self.ahead.crop(stored(self) - tail)
        take_tail_of_layer(self, tail, index, there, still)
        if self.position is not None:
            self.position = take_tail_of_table(self.position, tail, index)

    def slide(self, by: Sequence[int]) -> None:
        """See `quickmerge.models.columns.slide`; clusters move with their columns."""
        slide_layer(self, by)
        step = torch.tensor(list(by), device=self.keys.device)
        if self.clusters is not None:
            start, end = self.clusters.start + step, self.clusters.end + step
            self.clusters = replace(self.clusters, start=start, end=end)
        self.ahead.slide(by, self.clusters)
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


def _append(
    held: Tensor, room: Tensor | None, new: Tensor, place: tuple[int, int] = (0, 1)
) -> tuple[Tensor, Tensor | None]:
    """``held`` with ``new`` behind it, and the buffer that both are in; None if there is none.

    Layers have as much room to spare as their ``place`` says, from half up to all of it, so that they don't all copy
    their past for the same token.
    """
    if torch.is_grad_enabled() and (new.requires_grad or held.requires_grad):
        return torch.cat([held, new], -2), None
    past = held.shape[2] if held.ndim == 4 else 0
    need = past + new.shape[2]
    # A tensor that was made in inference mode may not be written to outside.
    closed = room is not None and room.is_inference() and not torch.is_inference_mode_enabled()
    if room is None or closed or room.shape[2] < need or not _views(held, room):
        which, layers = place
        spare = max(need // SPARE, LEAST) * (layers + which + 1) // (2 * layers)
        room = new.new_empty(*new.shape[:2], need + spare, new.shape[3])
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
        self._stats = MultipoleStats(
            settings=settings.label, min_tokens=settings.min_tokens, blocks=blocks, blocks_all=blocks_all
        )
        self._queries = 0
        self._dense = self._others = 0.0
        self._kept: Tensor | float = 0.0
        self._worked = 0.0

    def clustered(self, held: MultipoleLayer, before: Clusters | None, seconds: float) -> None:
        """A layer that had the clusters ``before`` got others in front of a token, or some of those to come."""
        self._worked += held.ahead.take()
        if before is None and held.clusters is not None:
            self._stats.clustering_seconds += seconds
            return
        self._stats.updates += (held.clusters is not before) / self._stats.blocks
        self._stats.update_seconds += seconds

    def prepared(self, held: MultipoleLayer, seconds: float, anew: bool) -> None:
        """What a layer will read behind a prompt was clustered with it, ``anew`` or behind what there was."""
        held.ahead.take()
        self._stats.prompt_seconds += seconds
        if anew:
            self._stats.clustering_seconds += seconds
        else:
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
            stats.most_at_once = max(stats.most_at_once, self._worked)
            self._worked = 0.0
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
