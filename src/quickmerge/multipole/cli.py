"""What ``--attention`` and ``--budget`` say on the command line: the settings of multipole attention."""

from __future__ import annotations

import re
from ast import literal_eval
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from quickmerge.console.options import one_sentence
from quickmerge.errors import QuickmergeError, near_match

if TYPE_CHECKING:
    from quickmerge.multipole import Multipole

NAME = "multipole"


def parse_attention(text: str, budget: int | None) -> Multipole:
    """Settings of multipole attention by what ``--attention`` and ``--budget`` say: ``multipole:ratio=0.125:sink=4``.

    Settings may also be parted by commas.

    Raises:
        QuickmergeError: it is another attention, or a setting is unknown, given twice, or out of range.
    """
    from quickmerge.multipole import Multipole

    name, *parts = re.split("[:,]", text)
    if name != NAME:
        raise QuickmergeError(f"--attention must be {NAME}, got {name!r}{near_match(name, [NAME])}")
    allowed = [f.name for f in fields(Multipole)]
    settings: dict[str, Any] = {} if budget is None else {"budget": budget}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in allowed:
            raise QuickmergeError(
                f"--attention {NAME} takes settings as name=value with a name of {', '.join(allowed)}, "
                f"got {part!r}{near_match(key, allowed)}"
            )
        if key in settings:
            raise QuickmergeError(f"{key} must be given once, got {settings[key]!r} and {value}")
        settings[key] = _value(value)
    with one_sentence():
        return Multipole(**settings)


def _value(text: str) -> Any:
    """A setting as written on a command line: a number or a truth value where it is one, else the text."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text
