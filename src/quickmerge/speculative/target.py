"""The cache after a step: what was accepted moves in front, the rest is dropped, and rows may leave."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from quickmerge.errors import QuickmergeError
from quickmerge.models.columns import is_tight, keeps_columns, reading, room, slide, slide_table, take_tail, widest
from quickmerge.models.compat import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    cache_argument,
    cache_name,
    cache_trait,
)
from quickmerge.models.decoder import layer_window
from quickmerge.models.moved import onto
from quickmerge.speculative.tree import Packed, Tree, masks_by_window, pack

__all__ = ["Columns", "Target", "commit", "compact", "last_hidden", "lay_out", "plain_cache", "select"]


WASTE = 4
"""Rows are compacted when that leaves at least one column in so many out: as much work as reading one more token,
since a dynamic cache copies itself whenever something is added."""


@dataclass(frozen=True)
class Columns:
    """What the n columns of a cache hold, as its first layer does. All layers hold the same behind the prompt.

    Attributes:
        valid: ``(B, n)`` bool, whether a column holds a token of its row's text.
        place: ``(B, n)`` long, which one: its column in ``generate``'s sequences; anything where it holds none.
        length: ``(B,)`` long, the place of the next token to be read, the root of the next tree.
        offset: ``(B,)`` long, what is added to a place to get the position that the model is told; ``(k, B)`` where
            it counts in k directions.
        holes: whether any column of any row holds none.
        prompt: so many columns in front stay as they are, since in some layers fewer entries stand for them.
        shift: for each row, how many columns its text was moved to the right; empty where rows aren't moved.
        counts: for each row, how many columns hold a token, those of the prompt apart; None where the host has to ask.
    """

    valid: Tensor
    place: Tensor
    length: Tensor
    offset: Tensor
    holes: bool
    prompt: int = 0
    shift: Sequence[int] = ()
    counts: tuple[int, ...] | None = None

    @property
    def behind(self) -> Columns:
        """The same with its ``counts``."""
        if self.counts is not None:
            return self
        return replace(self, counts=tuple(self.valid[:, self.prompt :].sum(1).tolist()))

    @property
    def width(self) -> int:
        """Columns of the cache."""
        return self.valid.shape[1]


def commit(cache: Cache, columns: Columns, paths: Sequence[Sequence[int]], read: int) -> Columns:
    """Keep the accepted nodes of the trees that were just read behind ``columns``.

    They move to the columns right behind the old ones; a row that accepted fewer than another leaves holes. Only
    columns of trees are moved: the text before them is not touched.

    Args:
        cache: holds the columns and, behind them, those of the trees.
        columns: what it held before.
        paths: for each row the nodes on the accepted path from the root on, none for a row that takes nothing.
        read: how many columns the trees take.

    Returns:
        What the cache holds now.
    """
    device = columns.valid.device
    most = max(len(path) for path in paths)
    told = [[len(path), *path, *[0] * (most - len(path))] for path in paths]
    moved = onto(torch.tensor(told, dtype=torch.long), device)
    count, index = moved[:, 0], moved[:, 1:]
    step = torch.arange(most, device=device)
    there = step < count[:, None]
    even = len({len(path) for path in paths}) == 1
    # Before a row ends nothing changes. Before a node has to move keys and values don't: a hole keeps what was read.
    fixed = min(_in_place(path, most) for path in paths)
    still = min(fixed, *(len(path) for path in paths))
    holes = None if even else there[:, still:]
    take_tail(cache, read - still, (index[:, still:] - still).clamp_min(0), holes, fixed - still)
    return replace(
        columns,
        valid=torch.cat([columns.valid, there], 1),
        place=torch.cat([columns.place, columns.length[:, None] + step], 1),
        length=columns.length + count,
        holes=columns.holes or not even,
        counts=None
        if columns.counts is None
        else tuple(old + len(path) for old, path in zip(columns.counts, paths, strict=True)),
    )


def compact(cache: Cache, columns: Columns) -> Columns:
    """Close the holes that no row needs, if that makes the cache shorter by a quarter at least."""
    if not columns.holes:
        return columns
    counts = columns.behind.counts
    assert counts is not None
    inside, longest = columns.valid[:, columns.prompt :], max(counts)
    if (inside.shape[1] - longest) * WASTE < columns.width:
        return columns
    index = (~inside).long().argsort(dim=1, stable=True)[:, :longest]
    there = inside.gather(1, index)
    take_tail(cache, inside.shape[1], index, there)
    front = slice(columns.prompt)
    valid = torch.cat([columns.valid[:, front], there], 1)
    place = torch.cat([columns.place[:, front], columns.place[:, columns.prompt :].gather(1, index)], 1)
    # Of a merged prompt it isn't asked whether there is padding in front: its masks are made anyway.
    holes = min(counts) < longest or columns.prompt > 0
    return replace(columns, valid=valid, place=place, holes=holes, counts=counts)


def tighten(cache: Cache, columns: Columns, missing: Sequence[int]) -> Columns:
    """Move each row to the right by as many columns as its newest ones are ``missing``: no hole is left in between.

    Columns that no row needs in front are cut off once they are a quarter of all.
    """
    if any(missing):
        slide(cache, missing)
        columns = _slid(columns, missing)
    spare = min(columns.shift)
    if spare * WASTE < columns.width:
        return columns
    back = [-spare] * len(columns.shift)
    slide(cache, back)
    return _cut(cache, _slid(columns, back), columns.width - spare)


def select(cache: Cache, columns: Columns, index: Tensor) -> Columns:
    """Go on with the rows ``index (R,)`` alone."""
    keep, index = index.tolist(), onto(index, columns.valid.device)
    cache.batch_select_indices(index)
    valid, counts = columns.valid[index], columns.counts
    counts = None if counts is None else tuple(counts[row] for row in keep)
    whole = not columns.prompt and counts is not None
    return replace(
        columns,
        valid=valid,
        place=columns.place[index],
        length=columns.length[index],
        offset=columns.offset[..., index],
        holes=columns.holes and (min(counts or ()) < columns.width if whole else not bool(valid.all())),
        shift=[columns.shift[row] for row in keep] if columns.shift else [],
        counts=counts,
    )


def lay_out(cache: Cache, columns: Columns, width: int) -> Columns:
    """Put every token in the column of its place, as ``generate`` would have: ``width`` columns, zeros between them."""
    if columns.shift:
        back = [-step for step in columns.shift]
        slide(cache, back)
        return _cut(cache, _slid(columns, back), width)
    # What was merged can't be laid out, and lies where it belongs.
    first, inside = columns.prompt, columns.valid[:, columns.prompt :]
    place, width = columns.place[:, first:] - first, width - first
    source = place.new_full((len(place), width + 1), -1)
    # Whatever has no place in the new cache goes to a column more, which is cut off.
    target = torch.where(inside & (place < width), place, width)
    source.scatter_(1, target, torch.arange(inside.shape[1], device=target.device).expand_as(target))
    source = source[:, :width]
    there = source >= 0
    take_tail(cache, inside.shape[1], source.clamp_min(0), there)
    valid = torch.cat([columns.valid[:, :first], there], 1)
    return replace(
        columns,
        valid=valid,
        place=torch.arange(first + width, device=target.device).expand(len(there), -1),
        length=columns.length.clamp_max(first + width),
        holes=not bool(valid.all()),
        counts=None,
    )


def _slid(columns: Columns, by: Sequence[int]) -> Columns:
    valid = slide_table(columns.valid, by, False)
    return replace(
        columns,
        valid=valid,
        place=slide_table(columns.place, by),
        holes=not bool(valid.all()),
        shift=[old + step for old, step in zip(columns.shift, by, strict=True)],
    )


def _cut(cache: Cache, columns: Columns, width: int) -> Columns:
    """Cut off all columns behind the first ``width``."""
    none = columns.length.new_zeros(len(columns.length), 0)
    take_tail(cache, columns.width - width, none)
    valid = columns.valid[:, :width]
    return replace(
        columns,
        valid=valid,
        place=columns.place[:, :width],
        length=columns.length.clamp_max(width),
        holes=not bool(valid.all()),
        counts=None,
    )


def _in_place(path: Sequence[int], most: int) -> int:
    """How many nodes of a path come before the first one that has to move, ``most`` if none has to."""
    return next((i for i, node in enumerate(path) if node != i), most)


# The model whose text is written: one pass reads the trees of a whole batch behind a cache.


class Target:
    """A model, the cache of a batch that it has read, and what the columns of the cache hold.

    Args:
        model: one that `check_target` lets pass.
        cache: of plain layers, filled.
        columns: what it holds.
        features: whether passes also give the last hidden states.
        longest: the largest of the columns' lengths; None has it looked up.

    Attributes:
        passes: of the model.
        widest: the most nodes of a tree; None for any number.
        why: the trait for which it reads one path of each tree alone (`quickmerge.speculative.chains`); empty here.
    """

    why = ""

    def __init__(
        self, model: PreTrainedModel, cache: Cache, columns: Columns, features: bool = False, longest: int | None = None
    ) -> None:
        self.passes = 0
        self.model = model
        self.cache = cache
        self.columns = columns
        self.features = features
        config = model.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.windows = {kind: layer_window(config, i) for i, kind in enumerate(kinds)}
        self.dtype = next(layer.keys.dtype for layer in cache.layers if layer.is_initialized)
        # Runs that stand between take the new tokens' places and what they see from here, and nowhere else.
        self.told = any(type(layer) is not DynamicLayer for layer in cache.layers)
        self.widest = widest(cache)
        if is_tight(cache) and not columns.shift:
            self.columns = replace(columns, shift=[0] * len(columns.valid))
        self.columns = self.columns.behind
        # The longest row, kept on this side so that no step waits for a device to tell.
        self._longest = int(columns.length.max()) if longest is None else longest
        self._nodes = 0

    def read(self, packed: Packed) -> tuple[Tensor, Tensor | None]:
        """Read the trees of the batch.

        Returns:
            ``(B, T, V)`` logits, and the last hidden states ``(B, T, H)`` behind the final norm if wanted.
        """
        columns = self.columns
        nodes, longest = packed.tokens.shape[1], self._longest + packed.tokens.shape[1]
        mask: Tensor | dict[str, Tensor] | None = None
        if nodes > 1 or columns.holes or self.told:
            mask = masks_by_window(
                self.windows, columns.valid, columns.place, columns.length, packed, self.dtype, longest
            )
        places = columns.length[:, None] + packed.depth
        with last_hidden(self.model, self.features) as found, reading(places):
            out = self.model(
                input_ids=packed.tokens,
                attention_mask=mask,
                position_ids=(columns.length + columns.offset)[..., None] + packed.depth,
                **cache_argument(self.model, self.cache),
                use_cache=True,
                return_dict=True,
            )
        self._nodes = nodes
        self.passes += 1
        return out.logits, found[0] if self.features else None

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes on these paths, for each row from the root on."""
        most = max(len(path) for path in paths)
        columns = commit(self.cache, self.columns, paths, self._nodes)
        if columns.shift:
            self.columns = tighten(self.cache, columns, [most - len(path) for path in paths])
        else:
            self.columns = compact(self.cache, columns)
        self._longest += most

    def room(self) -> list[int] | None:
        """For each row how deep a tree may be for what the cache holds; None for any depth."""
        return room(self.cache)

    def narrowed(self, tree: Tree) -> Tree:
        """What is read of a tree: all of it."""
        return tree

    def rest(self, row: int, last: int, pad: int) -> None:
        """A row that is done stays in the cache; what is read behind it is moved away again."""

    def finish(self, sequences: Tensor) -> None:
        """Make the cache what ``generate`` would leave of ``sequences (B, L)``: every token but the last ones."""
        width = sequences.shape[1] - 1
        lengths = self.columns.length.tolist()
        # Rows that were done early lack their last token and the padding behind it.
        missing = [sequences[i, length:width].tolist() for i, length in enumerate(lengths)]
        while any(missing):
            left, most = self.room(), self.widest or width
            steps = [most if left is None else min(most, 1 + left[i]) for i in range(len(missing))]
            now = [tokens[:some] for tokens, some in zip(missing, steps, strict=True)]
            self.read(pack([Tree.chain(tokens or [0]) for tokens in now], sequences.device))
            self.commit([range(len(tokens)) for tokens in now])
            missing = [tokens[some:] for tokens, some in zip(missing, steps, strict=True)]
        self.lay_out(width)

    def lay_out(self, width: int) -> None:
        """Put every token in the column that ``generate`` would have put it in."""
        if self.columns.holes or self.columns.width != width or any(self.columns.shift):
            self.columns = lay_out(self.cache, self.columns, width)

    def select(self, index: Tensor) -> None:
        """Go on with the rows ``index (R,)`` alone."""
        self.columns = select(self.cache, self.columns, index)


@contextmanager
def last_hidden(model: PreTrainedModel, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Collect the last hidden states, behind the final norm, of this thread's passes inside the block.

    Another thread may run the same model meanwhile, and its passes go through the hook too.
    """
    found: list[Tensor] = []
    mine = threading.get_ident()
    if not wanted:
        yield found
        return

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        if threading.get_ident() == mine:
            found.append(out[0])

    hook = model.base_model.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def plain_cache(cache: Any) -> Cache:
    """The cache with layers that keep every column, so that columns can be moved and dropped.

    An empty cache is changed in place; None makes a new one.

    Raises:
        QuickmergeError: if it is of another kind, or a sliding layer has already dropped something.
    """
    if cache is None:
        return DynamicCache()
    layers = getattr(cache, "layers", [])
    sliding = [layer for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    odd = sorted({type(layer).__name__ for layer in layers if layer not in sliding and not keeps_columns(layer)})
    if not isinstance(cache, DynamicCache) or cache.offloading or odd:
        what = f"one with {odd[0]} in a {cache_trait(cache)}" if odd else cache_trait(cache)
        raise QuickmergeError(
            f"{cache_name()} must be a DynamicCache with keys and values of every token, got {what}: "
            f"leave {cache_name()} and cache_implementation out"
        )
    if cache.get_seq_length() == 0:
        cache.layers = [DynamicLayer() for _ in cache.layers]
    elif sliding:
        raise QuickmergeError(f"{cache_name()} must hold every token, got one with sliding layers: use DynamicCache()")
    return cache
