"""The methods: one file each, one frozen dataclass each."""

from typing import Any

from quickmerge.errors import UnknownReducerError, near_match
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
    """A reducer by name, with its settings.

    Raises:
        UnknownReducerError: for a name that is not in `REDUCERS`, with the nearest that is.
    """
    if name not in REDUCERS:
        raise UnknownReducerError(
            f"reducer must be one of {', '.join(REDUCERS)}, got {name!r}{near_match(name, REDUCERS)}"
        )
    return REDUCERS[name](**settings)


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
