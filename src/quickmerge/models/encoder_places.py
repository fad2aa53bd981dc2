"""What a block of a vision transformer is told of the places of its tokens, for tokens that stand at other places.

Blocks are given rotary tables with a row for every token (or every patch), or the places themselves as numbers. When
tokens have been merged each image has slots at places of its own, so what was one table for a batch becomes one for
each image, in the form that the block's attention can broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

PLACES = ("position_mask", "position_ids")
"""Arguments by which a block that counts its tokens itself can be told where they stand, patches counted from 0."""

FORMS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda table: table[:, None],
    lambda table: table,
    lambda table: table[:, :, None],
)
"""How rows of a table ``(N, d)`` for each image, ``(B, K, d)``, are handed on: beside heads in front of the tokens,
beside no heads, or beside heads behind them."""


@dataclass(frozen=True)
class Layout:
    """How a block is built, as `quickmerge.models.encoder_probe` found it by trying it.

    Args:
        prefix: how many tokens stand in front of the patches.
        form: which of `FORMS` its attention takes tables in.
        told: which of `PLACES` it must be told them by; None for a block that does not count its tokens.
        norm: name in the block of what reads the residual stream behind attention; None where the block is not
            ``y = x + attention(norm(x))`` and then ``y + feed_forward(norm(y))``, so that tokens merge behind it.
        feed: name in the block of the feed-forward part; None where ``norm`` is.
        adds_residual: whether ``feed`` is given ``y`` too and adds it itself.
        traits: what of this is told to users.
    """

    prefix: int
    form: int = 0
    told: str | None = None
    norm: str | None = None
    feed: str | None = None
    adds_residual: bool = False
    traits: tuple[str, ...] = ()


def at_places(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    position: Tensor,
    *,
    tokens: int,
    prefix: int,
    form: int,
    told: int | str | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block behind its first one, for tokens that stand at ``position (B, K)``.

    Args:
        args: positional arguments behind the first.
        kwargs: the others.
        position: the place of each slot among the ``tokens`` original ones, those of the prefix first.
        tokens: how many there were.
        prefix: how many of them stand in front of the patches.
        form: see `Layout`.
        told: where the block is told places: an index in ``args``, or a name; None for nowhere.
    """
    args = tuple(_at(value, position, tokens, prefix, form) for value in args)
    changed = {name: _at(value, position, tokens, prefix, form) for name, value in kwargs.items()}
    if told is not None:
        place = position[:, prefix:] - prefix if prefix else position
        if isinstance(told, int):
            args = (*args[:told], place, *args[told + 1 :])
        else:
            changed[told] = place
    return args, changed


def _at(value: Any, position: Tensor, tokens: int, prefix: int, form: int) -> Any:
    if isinstance(value, (tuple, list)) and value and all(isinstance(each, Tensor) for each in value):
        return type(value)([_at(each, position, tokens, prefix, form) for each in value])
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    axis = token_axis(value, tokens, prefix)
    if axis is None:
        return value
    index = position if value.shape[axis] == tokens else position[:, prefix:] - prefix
    if axis == 0:
        flat = value.flatten(1) if value.ndim == 3 else value
        return FORMS[form](flat[index])
    rows = value.expand(index.shape[0], *value.shape[1:])
    shape = [1] * value.ndim
    shape[0], shape[axis] = index.shape
    where = index.reshape(shape)
    return rows.gather(axis, where.expand(*(index.shape[1] if i == axis else n for i, n in enumerate(rows.shape))))


def token_axis(value: Tensor, tokens: int, prefix: int) -> int | None:
    """Which axis of a table has a row for each token or patch: of ``(N, d)``, ``(N, 1, d)``, ``(B, N, d)`` or
    ``(B, H, N, d)``; None for anything else, a mask ``(.., N, N)`` among it."""
    long = (tokens, tokens - prefix)
    if value.ndim == 2 and value.shape[0] in long and value.shape[1] != value.shape[0]:
        return 0
    if value.ndim == 3 and value.shape[0] in long and value.shape[1] == 1:
        return 0
    if value.ndim == 3 and value.shape[1] in long:
        return 1
    if value.ndim == 4 and value.shape[2] in long and value.shape[3] != value.shape[2]:
        return 2
    return None


def has_tables(values: Iterable[Any], tokens: int, prefix: int) -> bool:
    """Whether there is a table among arguments that `at_places` would change."""
    for value in values:
        if isinstance(value, (tuple, list)) and has_tables(value, tokens, prefix):
            return True
        real = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        if real and token_axis(value, tokens, prefix) is not None:
            return True
    return False
