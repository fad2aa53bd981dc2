"""The methods: one file each, one frozen dataclass each."""

from ast import literal_eval
from dataclasses import fields
from typing import Any

from quickmerge.errors import QuickmergeError, UnknownReducerError, near_match
from quickmerge.reducers.attention import Attention
from quickmerge.reducers.base import Reducer, ScoreReducer
from quickmerge.reducers.quickmerge import QuickMerge
from quickmerge.reducers.random import Random
from quickmerge.reducers.tome import ToMe
from quickmerge.reducers.topnorm import TopNorm
from quickmerge.reducers.truncate import Truncate
from quickmerge.reducers.uniform import Uniform

REDUCERS: dict[str, type[Reducer]] = {
    cls.name: cls for cls in (QuickMerge, Attention, ToMe, TopNorm, Uniform, Truncate, Random)
}
"""Every reducer by the name the command line knows it by."""


def make_reducer(name: str, **settings: Any) -> Reducer:
    """A reducer by name, with its settings; ``name`` may carry some itself: ``"quickmerge:recency=0.5:pool=31"``.

    Raises:
        UnknownReducerError: for a name that is not in `REDUCERS`, with the nearest that is.
        QuickmergeError: for a setting that the reducer does not have.
        ValueError: for a setting out of range.
    """
    name, *parts = name.split(":")
    if name not in REDUCERS:
        raise UnknownReducerError(
            f"reducer must be one of {', '.join(REDUCERS)}, got {name!r}{near_match(name, REDUCERS)}"
        )
    allowed = [f.name for f in fields(REDUCERS[name]) if f.name != "keep"]
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in allowed:
            raise QuickmergeError(
                f"{name} takes settings as name=value with a name of {', '.join(allowed) or '(none)'}, "
                f"got {part!r}{near_match(key, allowed)}"
            )
        settings[key] = _value(value)
    return REDUCERS[name](**settings)


def _value(text: str) -> Any:
    """A setting as written on a command line: a number or a truth value where it is one, else the text."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


__all__ = [
    "REDUCERS",
    "Attention",
    "QuickMerge",
    "Random",
    "Reducer",
    "ScoreReducer",
    "ToMe",
    "TopNorm",
    "Truncate",
    "Uniform",
    "make_reducer",
]
