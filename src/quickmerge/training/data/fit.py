"""Sizes given as one number or two."""

from __future__ import annotations

from typing import TypeAlias

from quickmerge.errors import whole_number

Size: TypeAlias = int | tuple[int, int]


def height_and_width(size: Size, name: str = "size") -> tuple[int, int]:
    """``224`` or ``(224, 320)`` as height and width in pixels; ``name`` is what it was given for.

    Raises:
        ValueError: not one or two whole numbers of at least 1.
    """
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return whole_number(name, height), whole_number(name, width)
