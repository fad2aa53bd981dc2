"""The columns of a cache, moved and dropped in all of its layers at once, whatever these keep beside keys and values.

Drafted tokens are read into a cache before it is known which of them are true. What is right moves in front, the rest
goes. Layers may hold different numbers of columns, as those of a merged prompt do; they have the newest ones in common,
so columns are counted from the end. A layer that keeps something for each column, such as the tables of a merged prompt
or the clusters of its keys, has `take_tail` and `slide` of its own, which change that too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import Cache

from quickmerge.models.compat import DynamicLayer
from quickmerge.models.moved import onto

__all__ = [
    "Moves",
    "is_tight",
    "keeps_columns",
    "places_read",
    "reading",
    "room",
    "seats",
    "slide",
    "slide_layer",
    "slide_table",
    "stored",
    "take",
    "take_tail",
    "take_tail_of_layer",
    "take_tail_of_table",
    "widest",
]


@runtime_checkable
class Moves(Protocol):
    """A cache layer that moves its own columns, because it keeps more of each than a key and a value."""

    def take_tail(self, tail: int, index: Tensor, there: Tensor | None, still: int = 0) -> None:
        """See `take_tail`."""
        ...

    def slide(self, by: Sequence[int]) -> None:
        """See `slide`."""
        ...


_PLACES: ContextVar[Tensor | None] = ContextVar("quickmerge_places", default=None)


@contextmanager
def reading(places: Tensor) -> Iterator[None]:
    """Within the block this thread's forward reads tokens that stand at ``places (B, q)`` of their rows' texts."""
    token = _PLACES.set(places)
    try:
        yield
    finally:
        _PLACES.reset(token)


def places_read() -> Tensor | None:
    """``(B, q)``, see `reading`; None outside of it, where tokens stand one behind the other."""
    return _PLACES.get()


def stored(layer: Any) -> int:
    """The length of a layer without what is gone of its prompt, which a layer may count as if it were there.

    A prompt that was shortened in front of the first block is told as long as it was, since that is how much of a text
    has been read.
    """
    length = int(layer.get_seq_length())
    return length - getattr(layer, "gone", 0) if length else 0


def keeps_columns(layer: Any) -> bool:
    """Whether a layer holds every column that it was given, and lets columns be moved."""
    return type(layer) is DynamicLayer or bool(getattr(layer, "movable", False))


def is_tight(cache: Cache) -> bool:
    """Whether some layer needs the tokens of each row side by side, without holes between them."""
    return any(getattr(layer, "tight", False) for layer in cache.layers)


def room(cache: Cache) -> list[int] | None:
    """For each row how many tokens may be read behind the next one, in one pass, as they would be read one by one.

    None where no layer cares: those whose view of the past changes at certain lengths do, since a pass that reads
    tokens on both sides of such a length would show some of them another past.
    """
    found = [told for layer in cache.layers if (told := _told(layer, "room")) is not None]
    return [min(row) for row in zip(*found, strict=True)] if found else None


def widest(cache: Cache) -> int | None:
    """The most tokens that one pass may read behind a filled cache; None for any number."""
    found = [told for layer in cache.layers if (told := _told(layer, "widest")) is not None]
    return min(found) if found else None


def seats(cache: Cache) -> tuple[Tensor, Tensor] | None:
    """Which columns of the prompt the entries of the last block stand at; None where it was read in full.

    Returns:
        ``(B, K)`` long and ``(B, K)`` bool: the columns, and which entries stand for anything.
    """
    found: tuple[Tensor, Tensor] | None = _told(cache.layers[-1], "seats")
    return found


def _told(layer: Any, name: str) -> Any:
    tell: Callable[[], Any] | None = getattr(layer, name, None)
    return None if tell is None else tell()


def take_tail(cache: Cache, tail: int, index: Tensor, there: Tensor | None = None, still: int = 0) -> None:
    """Put some of the last columns of every layer in the place of all of these.

    Args:
        cache: of layers that `keeps_columns` lets pass.
        tail: how many columns are looked at, from the end.
        index: ``(B, k)`` long, which of them stand there afterwards, counted from the first of them.
        there: ``(B, k)`` bool; where False there is no token, and zeros are put there. Default: everywhere.
        still: so many of the k stand where they are put already, in every row that has them. Nothing is moved for
            these, and where there is no token, what was read is left in its place.
    """
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        if isinstance(layer, Moves):
            layer.take_tail(tail, index, there, still)
        else:
            take_tail_of_layer(layer, tail, index, there, still)


def slide(cache: Cache, by: Sequence[int]) -> None:
    """Move the columns of each row to the right by so many, or to the left; as many columns as before are left.

    What moves over the end is lost, and nothing is where a row moved away from: the caller's masks say so.
    """
    if not any(by):
        return
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        if isinstance(layer, Moves):
            layer.slide(by)
        else:
            slide_layer(layer, by)


# For keys and values (B, H, n, D), and for tables (B, n).


def take_tail_of_layer(layer: Any, tail: int, index: Tensor, there: Tensor | None, still: int = 0) -> None:
    """`take_tail` for the keys and values of one layer."""
    if still and still == index.shape[1]:
        end = layer.keys.shape[2] - tail + still
        layer.keys, layer.values = layer.keys[:, :, :end], layer.values[:, :, :end]
        return
    if still:
        tail, index = tail - still, (index[:, still:] - still).clamp_min(0)
        there = None if there is None else there[:, still:]
    layer.keys = _take_tail(layer.keys, tail, index, there)
    layer.values = _take_tail(layer.values, tail, index, there)


def _take_tail(x: Tensor, tail: int, index: Tensor, there: Tensor | None) -> Tensor:
    front, k = x.shape[2] - tail, index.shape[1]
    if not k:
        return x[:, :, :front]
    taken = take(x[:, :, front:], index)
    if there is not None:
        taken = taken.masked_fill(~there.to(x.device)[:, None, :, None], 0)
    if not front:
        return taken
    if k > tail:
        return torch.cat([x[:, :, :front], taken], 2)
    # The layer made this tensor when the tokens were read, so it is nobody else's.
    x[:, :, front : front + k] = taken
    return x[:, :, : front + k]


def take_tail_of_table(x: Tensor, tail: int, index: Tensor) -> Tensor:
    """`take_tail` for a table ``(B, n)``."""
    front = x.shape[1] - tail
    return torch.cat([x[:, :front], x[:, front:].gather(1, index.to(x.device))], 1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Columns ``index (B, K)`` of keys or values ``(B, H, n, D)``, wherever these are."""
    index = index.to(x.device)
    if len(x) == 1:
        return x.index_select(2, index[0])
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def slide_layer(layer: Any, by: Sequence[int]) -> None:
    """`slide` for the keys and values of one layer, row by row and in place."""
    for x in (layer.keys, layer.values):
        for row, step in enumerate(by):
            if step > 0:
                x[row, :, step:] = x[row, :, :-step].clone()
            elif step < 0:
                x[row, :, :step] = x[row, :, -step:].clone()


def slide_table(x: Tensor, by: Sequence[int], fill: Any = 0) -> Tensor:
    """`slide` for a table ``(B, n)``; ``fill`` stands where a row moved away from."""
    step = onto(torch.tensor(list(by)), x.device)[:, None]
    source = torch.arange(x.shape[1], device=x.device) - step
    inside = (source >= 0) & (source < x.shape[1])
    return torch.where(inside, x.gather(1, source.clamp(0, x.shape[1] - 1)), fill)
