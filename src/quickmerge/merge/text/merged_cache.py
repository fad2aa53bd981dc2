"""A segment: the blocks between one merge and the next, with the slots they see and how they may attend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.cache.heads import HeadTables
from quickmerge.merge.cache.packed import Held, Packed, pack, shape_of, unpack
from quickmerge.merge.run import RunStats
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.models.columns import slide_layer, slide_table, take_tail_of_layer, take_tail_of_table
from quickmerge.models.compat import (
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    cache_name,
    cache_trait,
)
from quickmerge.models.decoder import Decoder, decoder_mask
from quickmerge.models.traits import CHUNKED

FAR = 2**62
"""A position before and behind all others."""


_NOTHING = {"position": 0, "valid": False, "size": 1, "votes": 1}
"""The tables of a segment, and what stands in each where there is no token."""


@dataclass(frozen=True)
class Segment:
    """What the blocks above one merge read: slots first, then whatever came after the prompt.

    ``slots`` is K, the entries that stand for the prompt. ``position (B, K + t)``, ``valid (B, K + t)`` and ``size (B,
    K + t)`` are tables over the entries of these blocks' cache. ``counts`` are the valid slots of each row, and
    ``reach`` bounds for the place of the first and the last entry of any row, where the host knows them. ``votes``, of
    the same shape as the tables, says as how many tokens
    each entry counts in attention, which adds log(votes) to its scores; None for one each. A segment is never changed:
    what comes after the prompt makes a new one, so that a forward keeps its own.
    """

    slots: int
    position: Tensor
    valid: Tensor
    size: Tensor
    padded: bool
    votes: Tensor | None = None
    counts: tuple[int, ...] | None = None
    reach: tuple[int, int] | None = None

    @classmethod
    def of(
        cls, plan: MergePlan, below: Segment | None, proportional: bool, reach: tuple[int, int] | None = None
    ) -> Segment:
        """The segment that a merge starts.

        Args:
            plan: of the merge.
            below: the segment whose slots it merged; None for single tokens.
            proportional: whether a slot counts in attention as all of its members together (ToMe, arXiv 2210.09461).
                Else it counts as they do on average: where merges of several methods lie above one another, what one
                of them leaves alone goes on counting as it did.
            reach: the first and the last place of any slot, where they are known.
        """
        before = None if below is None or below.votes is None else below.votes[:, : plan.slot.shape[1]]
        votes = None if before is None else plan.merge(before.to(plan.weight.dtype))
        if proportional:
            before = torch.ones_like(plan.slot) if before is None else before
            votes = before.new_zeros(plan.size.shape)
            votes = votes.scatter_add(1, plan.slot.clamp_min(0), before * (plan.slot >= 0))
        counts = plan.counted().counts
        assert counts is not None
        padded = any(count != plan.slots for count in counts)
        return cls(plan.slots, plan.position, plan.valid, plan.size, padded, votes, counts, reach)

    def extended(
        self, position: Tensor, valid: Tensor, stored: int | None = None, *, whole: bool | None = None,
        high: int | None = None,
    ) -> Segment:  # fmt: skip
        """With ``t`` new tokens ``(B, t)`` after the first ``stored`` entries, all of them for None.

        They are fewer than there were if a cache was cropped. ``whole`` says whether all are valid, None has it looked
        up; ``high`` is where the last of any row stands, None for behind those that are there.
        """
        new = {"position": position, "valid": valid}

        def longer(name: str, table: Tensor) -> Tensor:
            behind = new[name] if name in new else table.new_ones(position.shape)
            return torch.cat([table[:, :stored], behind], 1)

        reach = self.reach
        if reach is not None:
            last = reach[1] + position.shape[1] if high is None else high
            reach = (min(reach[0], last - position.shape[1] + 1), max(reach[1], last))
        padded = self.padded or not (bool(valid.all()) if whole is None else whole)
        return replace(self._each_table(longer), padded=padded, reach=reach)

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Segment:
        """The segment of a cache whose rows were picked, moved or repeated by ``change``."""
        return self._each_table(lambda name, table: change(table))

    def take_tail(self, tail: int, index: Tensor, there: Tensor | None) -> Segment:
        """The segment of a cache in which columns were moved; see `quickmerge.models.columns.take_tail`."""
        moved = self._each_table(lambda name, table: take_tail_of_table(table, tail, index))
        if there is None:
            return moved
        moved.valid[:, moved.valid.shape[1] - index.shape[1] :] &= there
        return replace(moved, padded=True)

    def slide(self, by: Sequence[int]) -> Segment:
        """The segment of a cache whose rows were moved; see `quickmerge.models.columns.slide`."""
        return replace(self._each_table(lambda name, table: slide_table(table, by, _NOTHING[name])), padded=True)

    def _each_table(self, change: Callable[[str, Tensor], Tensor]) -> Segment:
        """The segment with every table changed, which is told by its name."""
        tables = {name: table for name in _NOTHING if (table := getattr(self, name)) is not None}
        changed: dict[str, Any] = {name: change(name, table) for name, table in tables.items()}
        return replace(self, **changed)

    def tree_mask(self, see: Tensor, window: int | None) -> Tensor:
        """The attention mask of the newest tokens, where they are no text in a row but a tree.

        Args:
            see: ``(B or 1, 1, q, q)``, bool or what is added to logits: what each of them sees of the others.
            window: of the block, in positions; None for full attention.

        Returns:
            ``(B, 1, q, n)`` of the same kind, over all entries.
        """
        q = see.shape[-1]
        there = self.valid[:, None, :-q].expand(-1, q, -1)
        if window is not None:
            there = there & (self.position[:, -q:, None] - self.position[:, None, :-q] < window)
        before = there[:, None]
        if see.dtype != torch.bool:
            zero = torch.zeros((), dtype=see.dtype, device=see.device)
            before = zero.where(before, torch.finfo(see.dtype).min)
        return torch.cat([before, see.expand(len(before), -1, -1, -1)], -1)

    def mask(
        self, decoder: Decoder, layer: int, queries: int, hidden: Tensor, cache: Cache | None, skip: bool = True
    ) -> Any:
        """The attention mask of a block for ``queries`` tokens ``hidden``, built by the model's own mask builder.

        Plain causal order over the cache's entries; a sliding window and chunks are measured in original positions,
        since entries are fewer than positions above a merge. ``skip``: whether there may be none where it says no more
        than causal order.
        """
        traits, q = decoder.traits[layer], queries
        window, held = decoder.windows[layer], traits.entries or 0
        past = cache.get_seq_length(held) if cache is not None else 0
        kv, offset = cache.get_mask_sizes(q, held) if cache is not None else (q, 0)
        function, exotic = None, False
        if traits.attention == CHUNKED:
            first = torch.where(self.valid, self.position, FAR).amin(-1, keepdim=True)
            chunk = (self.position - first).div(traits.window or FAR, rounding_mode="floor")
            exotic = bool((chunk != 0).any())
            if exotic:

                def function(b: Any, h: Any, i: Any, j: Any) -> Any:
                    return (j <= i) & (chunk[b, i] == chunk[b, j])

        if window is not None:
            place = self.position
            if self.reach is not None:
                exotic = self.reach[1] - self.reach[0] >= window
            else:
                span = torch.where(self.valid, place, place.amax()).amin()
                exotic = int(place.max() - span) >= window
            if exotic:

                def function(b: Any, h: Any, i: Any, j: Any) -> Any:
                    return (j <= i) & (place[b, i] - place[b, j] < window)

        return decoder_mask(
            decoder,
            rows=len(self.valid),
            queries=q,
            keys=kv,
            query_offset=past,
            key_offset=offset,
            sees=function,
            valid=self.valid if self.padded else None,
            skip=skip and not exotic,
            dtype=hidden.dtype,
            device=hidden.device,
        )


def columns_at(position: Tensor, valid: Tensor, wanted: Tensor) -> Tensor:
    """``(B, K)`` long: the column at which each position ``wanted (B, K)`` stands; any column for one that is nowhere.

    Args:
        position: ``(B, N)``, rising over the valid tokens of a row, which stand side by side.
        valid: ``(B, N)`` bool.
        wanted: ``(B, K)``.
    """
    behind = valid.long().cumsum(-1) > 0
    place = torch.where(valid, position, torch.where(behind, FAR, -FAR))
    return torch.searchsorted(place.contiguous(), wanted.contiguous()).clamp_max(position.shape[1] - 1)


def pick_columns(x: Tensor, source: Tensor, axis: int = -1) -> Tensor:
    """The columns ``source (B, K)`` of ``x``: columns lie along ``axis``, the rows, B or 1, along the axis before.

    ``(..., N, d)`` with axis -2, as rotary tables are, or ``(..., N)`` with axis -1, as positions are.
    """
    rows = axis - 1
    x = x.expand(*x.shape[:rows], len(source), *x.shape[rows + 1 :])
    index = source if axis == -1 else source[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(axis, index.expand(*x.shape[: x.ndim + rows], *index.shape))


# What a cache knows of the prompt that was merged into it: its layers carry it, and move it with their rows.
#
# A prompt's merges leave tables: which position, how many tokens and whether any at all stand behind each entry. They
# belong to the cache, since a cache is copied, cropped, and has its rows picked, moved and repeated by whoever holds
# it, long after the run that filled it was left. So the layers of a cache that a run fills become layers of the classes
# below, which do everything that they did before and carry a `PromptState` besides.


@dataclass
class PromptState:
    """Of a prompt that was read: its segments by first block.

    ``segments`` is empty where nothing was merged, for whatever reason; ``evicted`` says whether entries left its cache
    afterwards. ``stats`` count what was read and written with
    this cache. ``tail`` tokens at the end of the prompt stand alone in every row and every block, so that they can be
    taken back. ``seats (B, K)`` are the columns of the prompt at which the entries of the last block stand. ``short``
    says that it was shortened in front of the first block.
    """

    short: ClassVar[bool] = False
    stats: RunStats
    segments: dict[int, Segment] = field(default_factory=dict)
    tail: int = 0
    seats: Tensor | None = None
    evicted: bool = False

    @property
    def merged(self) -> bool:
        """Whether some block reads fewer entries than there were tokens."""
        return bool(self.segments) or self.evicted

    def first(self, layer: int) -> int | None:
        """The block that the segment of a block begins with; None below the first merge."""
        below = [first for first in self.segments if first <= layer]
        return max(below) if below else None

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Rows of the cache were picked, moved or repeated."""
        self.each_segment(lambda segment: segment.each_row(change))
        self.seats = None if self.seats is None else change(self.seats)

    def each_segment(self, change: Callable[[Segment], Segment]) -> None:
        """The cache was changed, and its tables are to follow."""
        self.segments = {first: change(segment) for first, segment in self.segments.items()}


def moving_rows(kind: Any) -> Any:
    """A class of cache layers of ``kind`` that have more to move than keys and values.

    Whenever the rows of a layer are picked, moved or repeated, `each_row` is handed what does so to any tensor whose
    first axis they are. There is one base class alone, so that a layer of ``kind`` can become one of these while it
    stays the object that others hold.
    """

    class Moving(kind):  # type: ignore[misc]
        """See `quickmerge.merge.text.merged_cache.moving_rows`."""

        def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
            """Move what goes with the rows."""
            raise NotImplementedError

        def reorder_cache(self, beam_idx: Tensor) -> None:
            """Rows follow their beams."""
            super().reorder_cache(beam_idx)
            self.each_row(lambda t: t.index_select(0, beam_idx.to(t.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            """Repeat every row."""
            super().batch_repeat_interleave(repeats)
            self.each_row(lambda t: t.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            """Keep some rows: their numbers, or a mask of all rows."""
            super().batch_select_indices(indices)
            self.each_row(lambda t: t[indices.to(t.device)])

    return Moving


def _carrying(kind: Any, name: str) -> Any:
    """A class of cache layers that are of ``kind`` and carry what is known of their prompt.

    ``prompt`` is shared by the layers of a cache, and moved by the lowest one, whose ``moves`` is set. ``floor`` is how
    many entries stand for the prompt, ``gone`` how many more tokens there were, where a prompt was shortened in front
    of the first block, and ``shift`` how far each row was moved to the right. A layer tells its length with what is
    gone, so that a further turn is read behind a prompt as long as it was given. ``expected`` is set by a run that is
    about to have keys and values of a forward written, since outside of any run entries would be taken for tokens.
    ``heads`` are the layer's own tables where entries have ``left`` it, of every key head others. It tells its length
    with these, too, and the tables of a prompt know nothing of it.
    """

    class Merged(moving_rows(kind)):  # type: ignore[misc]
        """See `quickmerge.merge.text.merged_cache`."""

        prompt: PromptState | None = None
        moves = False
        floor = gone = left = 0
        shift: Sequence[int] = ()
        expected = False
        heads: HeadTables | None = None
        packed: dict[str, Packed] = {}  # noqa: RUF012  (never changed: a layer that packs gets one of its own)
        keys, values = Held(), Held()
        movable = kind is DynamicLayer or getattr(kind, "movable", False)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Append keys and values ``(B, H, q, D)``; returns all of them.

            Raises:
                QuickmergeError: outside of a run, if something was merged.
            """
            expected, self.expected = self.expected, False
            if self.prompt is not None and self.prompt.merged and not expected:
                raise QuickmergeError(
                    f"{cache_name()} holds a prompt that was merged inside quickmerge.reduce(...): go on with it in "
                    "such a block, of any reducer, or start with an empty cache"
                )
            if not self.packed:
                return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
            new = {"keys": key_states, "values": value_states}
            self.packed = {name: held.grown(new[name]) for name, held in self.packed.items()}
            return self.keys, self.values

        def get_seq_length(self) -> int:
            """Tokens seen; those that were gone in front of the first block count too, and entries that have left."""
            held = shape_of(self)[2] if self.packed else int(super().get_seq_length())
            return held + self.gone + self.left if held else 0

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            """Entries and the new ones; and where the first of them stands, by which length and entries agree."""
            with self._as_held():
                length, offset = super().get_mask_sizes(query_length)
            return int(length), int(offset) + (self.gone + self.left if self.is_initialized else 0)

        @contextmanager
        def _as_held(self) -> Iterator[None]:
            """Within the block the layer counts what it holds, as its own code does."""
            (gone, self.gone), (left, self.left) = (self.gone, 0), (self.left, 0)
            try:
                yield
            finally:
                self.gone, self.left = gone, left

        def crop(self, tokens_to_remove: int) -> None:
            """Take back the last tokens, ``-tokens_to_remove`` of them.

            Raises:
                QuickmergeError: if a prompt that was merged would be cut where tokens were merged.
            """
            if self.prompt is not None and self.prompt.merged and tokens_to_remove != 0:
                held = self.get_seq_length() - self.gone - self.left
                since = held - self.floor - max(self.shift, default=0) + self.prompt.tail
                if tokens_to_remove > 0:
                    raise QuickmergeError(
                        f"crop must be told how many tokens to take back, as a negative number, where tokens were "
                        f"merged, got {tokens_to_remove}"
                    )
                if -tokens_to_remove > since:
                    raise QuickmergeError(
                        f"crop can take back {since} tokens here, those read since the prompt was merged and those at "
                        f"its end that stayed alone, got {tokens_to_remove}: what was merged can't be cut; read the "
                        "shorter prompt into an empty cache"
                    )
            with self._as_held():
                super().crop(tokens_to_remove)
            if self.heads is not None:
                self.heads = self.heads.first(self.heads.count + tokens_to_remove).last(self.keys.shape[2])
                pack(self)

        def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
            """Move the prompt's tables, once for all layers of a cache."""
            if self.shift:
                self.shift = change(torch.tensor(self.shift)).tolist()
            if self.heads is not None:
                self.heads = self.heads.each_row(change)
                pack(self)
            if self.moves and self.prompt is not None:
                self.prompt.each_row(change)

        def take_tail(self, tail: int, index: Tensor, there: Tensor | None, still: int = 0) -> None:
            """See `quickmerge.models.columns.take_tail`."""
            unpack(self)
            move = getattr(super(), "take_tail", None)
            (partial(take_tail_of_layer, self) if move is None else move)(tail, index, there, still)
            if self.heads is not None:
                self.heads = self.heads.take_tail(tail, index, there)
                pack(self)
            if self.moves and self.prompt is not None:
                self.prompt.each_segment(lambda segment: segment.take_tail(tail, index, there))

        def slide(self, by: Sequence[int]) -> None:
            """See `quickmerge.models.columns.slide`."""
            unpack(self)
            move = getattr(super(), "slide", None)
            slide_layer(self, by) if move is None else move(by)
            if self.heads is not None:
                self.heads = self.heads.slide(by)
                pack(self)
            if self.prompt is not None:
                self.shift = [a + b for a, b in zip(self.shift or [0] * len(by), by, strict=True)]
                if self.moves:
                    self.prompt.each_segment(lambda segment: segment.slide(by))

        def seats(self) -> tuple[Tensor, Tensor] | None:
            """See `quickmerge.models.columns.seats`; meant for a prompt that has just been read."""
            prompt = self.prompt
            if prompt is None or prompt.seats is None:
                return None
            segment = prompt.segments[max(prompt.segments)]
            return prompt.seats, segment.valid[:, : prompt.seats.shape[1]]

        def reset(self) -> None:
            """Forget everything: a layer as it was before anything was merged."""
            super().reset()
            for name in ("prompt", "moves", "floor", "gone", "left", "shift", "expected", "heads", "packed"):
                self.__dict__.pop(name, None)
            self.__class__ = kind

    Merged.__name__ = Merged.__qualname__ = name
    return Merged


MergedLayer = _carrying(DynamicLayer, "MergedLayer")
"""A layer for full attention of a cache that a run has filled."""

MergedSlidingLayer = _carrying(DynamicSlidingWindowLayer, "MergedSlidingLayer")
"""A layer for sliding-window attention of a cache that a run has filled; its window counts entries."""

_OURS: dict[type, Any] = {DynamicLayer: MergedLayer, DynamicSlidingWindowLayer: MergedSlidingLayer}
_MORE = (DynamicIndexedLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
"""Layers that keep more than keys and values, and move that themselves: keys of an indexer, or a memory beside them."""


def _ours(kind: type) -> Any:
    """The class that layers of a kind become when a run fills them; None if they can't be filled.

    Besides transformers' own layers those can be whose class says so by ``fillable``, as that of multipole attention.
    """
    known = kind in _MORE or getattr(kind, "fillable", False)
    if kind not in _OURS and known and kind not in _OURS.values():
        _OURS[kind] = _carrying(kind, "Merged" + kind.__name__)
    return _OURS.get(kind)


def _carries(layer: Any) -> bool:
    return type(layer) in _OURS.values()


def holding(cache: Cache) -> list[Any]:
    """The layers of a cache that are for entries of tokens, and not for a memory of fixed size alone, nor for nothing.

    Of a cache that was filled those that hold some.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    return [layer for layer in layers if layer.is_initialized] or layers


def check_fillable(cache: Any) -> None:
    """Raise QuickmergeError unless an empty cache is of a kind that a run can fill; None is."""
    if cache is None:
        return
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        raise QuickmergeError(
            f"{cache_name()} must be a DynamicCache inside a quickmerge run, got {_one(cache_trait(cache))}"
        )
    for layer in holding(cache):
        if not _carries(layer) and _ours(type(layer)) is None:
            raise QuickmergeError(
                f"{cache_name()} must be a DynamicCache inside a quickmerge run, got layers of type "
                f"{type(layer).__name__} in {_one(cache_trait(cache))}"
            )


def _one(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


def fill(cache: Cache, index: int, state: PromptState, floor: int, gone: int = 0, *, moves: bool) -> None:
    """Say that a layer is about to be given the first ``floor`` entries of a prompt, which ``state`` is of.

    ``gone`` tokens of the prompt have left in front of the first block, and this one is still of those that read it so.
    ``moves``: whether it is the one layer that moves what all of them share.

    The layer stays the object that it is, since others may hold it too.
    """
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if not _carries(layer):
        ours = _ours(type(layer))
        if ours is None:
            raise UnsupportedModelError(
                f"{cache_name()} must hold layers of full or sliding attention inside a quickmerge run, got a "
                f"{type(layer).__name__} for block {index}"
            )
        layer.__class__ = ours
    layer.prompt, layer.floor, layer.gone, layer.moves, layer.expected = state, floor, gone, moves, True


def expect(cache: Cache, index: int) -> None:
    """Say that a layer of a cache that was filled inside a run is about to be given further tokens."""
    cache.layers[index].expected = True


def tables_of(cache: Cache, index: int) -> HeadTables | None:
    """The tables that a layer has of its own, where entries left it; else None."""
    return getattr(cache.layers[index], "heads", None)


def extend_heads(
    cache: Cache, index: int, position: Tensor, valid: Tensor, whole: bool | None = None, high: int | None = None
) -> HeadTables:
    """Let the tables of a layer go on with tokens ``(B, t)`` that are about to be read, and return them.

    ``whole`` and ``high`` are of `HeadTables.extended`.
    """
    layer = cache.layers[index]
    # A sliding window has lost the first entries meanwhile.
    layer.heads = layer.heads.last(shape_of(layer)[2]).extended(position, valid, whole, high)
    return layer.heads  # type: ignore[no-any-return]


def state_of(cache: Cache) -> PromptState | None:
    """What a filled cache knows of its prompt; None if it was filled outside of any run in prefix mode."""
    layers = holding(cache) if getattr(cache, "layers", None) else []
    if not layers or not all(map(_carries, layers)):
        return None
    state: PromptState | None = layers[0].prompt
    return state


def rows_in(cache: Cache) -> int:
    """How many rows a filled cache holds."""
    return shape_of(holding(cache)[0])[0]
