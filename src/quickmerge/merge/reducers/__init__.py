"""The methods: one file each, one frozen dataclass each."""

from ast import literal_eval
from dataclasses import fields
from typing import Any

from quickmerge.errors import QuickmergeError, UnknownReducerError, near_match
from quickmerge.merge.reducers.attention import Attention
from quickmerge.merge.reducers.base import Reducer, ScoreReducer, select_visual_tokens
from quickmerge.merge.reducers.baselines import Random, TopNorm, Truncate, Uniform
from quickmerge.merge.reducers.dynamicvit import DynamicViT
from quickmerge.merge.reducers.gemfilter import GemFilter
from quickmerge.merge.reducers.pooling import Pool
from quickmerge.merge.reducers.quickmerge import QuickMerge, QuickMergeVision
from quickmerge.merge.reducers.scope import SCOPE
from quickmerge.merge.reducers.specprefill import SpecPrefill
from quickmerge.merge.reducers.tofu import ToFu
from quickmerge.merge.reducers.tome import ToMe
from quickmerge.merge.reducers.trimtokenator import TrimTokenator

REDUCERS: dict[str, type[Reducer]] = {
    cls.name: cls for cls in (QuickMerge, Attention, ToMe, TopNorm, Uniform, Truncate, Random, GemFilter, SpecPrefill)
}
"""Every reducer for language models by the name the command line knows it by."""

VISION_REDUCERS: dict[str, type[Reducer]] = {
    cls.name: cls for cls in (QuickMergeVision, ToMe, ToFu, SCOPE, Attention, TopNorm, Uniform, Random, Pool)
}
"""Every untrained reducer for vision transformers by name; ``quickmerge`` is another class than in a language model.
`DynamicViT` is loaded from the folder that its training wrote."""

VISUAL_TOKEN_REDUCERS: dict[str, type[Reducer]] = VISION_REDUCERS | {TrimTokenator.name: TrimTokenator}
"""Every untrained reducer for the visual tokens that a language model is given, where the question is known too."""

PRESETS = ("paper",)
"""Ways to make a reducer that have a name; each is a class method of those that have it."""

PLACES = {"text": REDUCERS, "vision": VISION_REDUCERS, "visual": VISUAL_TOKEN_REDUCERS}


def make_reducer(name: str, *, place: str = "text", **settings: Any) -> Reducer:
    """A reducer by name, with its settings; ``name`` may carry some itself: ``"quickmerge:recency=0.5:pool=31"``.

    The setting ``preset`` names a way to make one, such as ``"quickmerge:preset=paper"`` for `QuickMerge.paper`; other
    settings stand in place of the preset's.

    Args:
        name: one of `REDUCERS`, of `VISION_REDUCERS` or of `VISUAL_TOKEN_REDUCERS`.
        place: ``"text"`` for a language model, ``"vision"`` for a vision transformer, ``"visual"`` for the
            visual tokens in front of one.
        settings: of the reducer, such as ``keep``.

    Raises:
        UnknownReducerError: for a name that is not known at this place, with the nearest that is.
        QuickmergeError: for a setting that the reducer does not have.
        ValueError: for a setting out of range, or another place.
    """
    if place not in PLACES:
        raise ValueError(f"place must be one of {', '.join(PLACES)}, got {place!r}")
    table = PLACES[place]
    name, *parts = name.split(":")
    if name not in table:
        raise UnknownReducerError(f"reducer must be one of {', '.join(table)}, got {name!r}{near_match(name, table)}")
    kind = table[name]
    presets = [preset for preset in PRESETS if hasattr(kind, preset)]
    allowed = [*(f.name for f in fields(kind) if f.name != "keep"), *(["preset"] if presets else [])]
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in allowed:
            raise QuickmergeError(
                f"{name} takes settings as name=value with a name of {', '.join(allowed) or '(none)'}, "
                f"got {part!r}{near_match(key, allowed)}"
            )
        settings[key] = _value(value)
    preset = settings.pop("preset", None)
    if preset is None:
        return kind(**settings)
    if preset not in presets:
        raise QuickmergeError(f"preset must be one of {', '.join(presets) or '(none)'} for {name}, got {preset!r}")
    made: Reducer = getattr(kind, preset)(**settings)
    return made


def _value(text: str) -> Any:
    """A setting as written on a command line: a number or a truth value where it is one, else the text."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


__all__ = [
    "REDUCERS",
    "SCOPE",
    "VISION_REDUCERS",
    "VISUAL_TOKEN_REDUCERS",
    "Attention",
    "DynamicViT",
    "GemFilter",
    "Pool",
    "QuickMerge",
    "QuickMergeVision",
    "Random",
    "Reducer",
    "ScoreReducer",
    "SpecPrefill",
    "ToFu",
    "ToMe",
    "TopNorm",
    "TrimTokenator",
    "Truncate",
    "Uniform",
    "make_reducer",
    "select_visual_tokens",
]
