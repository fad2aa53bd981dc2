"""The cache as a place: when a prompt has been read, entries leave each layer, of every key head others."""

from ast import literal_eval
from dataclasses import fields
from typing import Any

from quickmerge.errors import QuickmergeError, near_match
from quickmerge.merge.cache.by_keys import KeyDiff, LagKV, StreamingLLM
from quickmerge.merge.cache.evictor import Evictor
from quickmerge.merge.cache.expected import ExpectedAttention
from quickmerge.merge.cache.kvzip import KVzip
from quickmerge.merge.cache.observed import ObservedAttention
from quickmerge.merge.cache.snapkv import AttentionNorm, SnapKV

EVICTORS: dict[str, type[Evictor]] = {
    cls.name: cls
    for cls in (ObservedAttention, AttentionNorm, SnapKV, ExpectedAttention, LagKV, KeyDiff, KVzip, StreamingLLM)
}
"""Every method by the name that the command line knows it by."""


def make_evictor(name: str, **settings: Any) -> Evictor:
    """A method by name; ``name`` may carry settings itself: ``"snapkv:keep=0.3:heads=adaptive"``.

    Args:
        name: one of `EVICTORS`.
        settings: of the method, such as ``keep``.

    Raises:
        QuickmergeError: for a name that is not known, with the nearest that is; a setting that the method does not
            have, or one out of range.
    """
    if not isinstance(name, str):
        raise QuickmergeError(f"cache must be a name such as observed, got {name!r:.80}")
    name, *parts = name.split(":")
    if name not in EVICTORS:
        raise QuickmergeError(f"cache must be one of {', '.join(EVICTORS)}, got {name!r}{near_match(name, EVICTORS)}")
    allowed = [f.name for f in fields(EVICTORS[name])]
    given = dict(settings)
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in allowed:
            raise QuickmergeError(
                f"{name} takes settings as name=value with a name of {', '.join(allowed)}, got "
                f"{part!r}{near_match(key, allowed)}"
            )
        try:
            given[key] = literal_eval(value)
        except (ValueError, SyntaxError):
            given[key] = value
    for key in given:
        if key not in allowed:
            raise QuickmergeError(f"{key} is no setting of {name}: {', '.join(allowed)}{near_match(key, allowed)}")
    return EVICTORS[name](**given)


def as_evictor(given: Evictor | float | str | None) -> Evictor | None:
    """What a user gave for the cache: a method, a share for the default one, or a name with settings.

    Raises:
        QuickmergeError: it is none of these.
    """
    if given is None or isinstance(given, Evictor):
        return given
    if isinstance(given, str):
        return make_evictor(given)
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return AttentionNorm(given)
    raise QuickmergeError(
        f"cache must be a method such as AttentionNorm(keep=0.3), a share in (0, 1] or None, got {given!r:.200}"
    )


__all__ = [
    "EVICTORS",
    "AttentionNorm",
    "Evictor",
    "ExpectedAttention",
    "KVzip",
    "KeyDiff",
    "LagKV",
    "ObservedAttention",
    "SnapKV",
    "StreamingLLM",
    "as_evictor",
    "make_evictor",
]
