"""Ingredients as plain data, JSON's own types alone, and back: each by the name of its type, with all its settings."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

import torch

from quickmerge.errors import QuickmergeError, first_sentence, near_match
from quickmerge.merge.cache import EVICTORS
from quickmerge.merge.place import Merge
from quickmerge.merge.prior import Prior, QuickMergePrior
from quickmerge.merge.reducers import REDUCERS, VISUAL_TOKEN_REDUCERS, DynamicViT
from quickmerge.merge.text.modes import BlockCausal, Prefix
from quickmerge.merge.tokens.budget import Count, Entropy, Mass, Ratio, Schedule
from quickmerge.merge.tokens.removal import Removal
from quickmerge.multipole.settings import Multipole
from quickmerge.recipe.speculation import Speculation
from quickmerge.speculative.best_of import BestOf
from quickmerge.speculative.gumiho import Gumiho, GumihoNetwork
from quickmerge.speculative.lookup import PromptLookup
from quickmerge.speculative.suffix import SuffixDecoding

__all__ = ["TRAINED", "TYPES", "Held", "UnknownEntryError", "decode", "encode", "settings_of", "state_of"]

_KINDS: tuple[type, ...] = (
    *REDUCERS.values(), *VISUAL_TOKEN_REDUCERS.values(), QuickMergePrior, DynamicViT,
    Ratio, Count, Mass, Entropy, Schedule, Removal, Prefix, BlockCausal, Merge, *EVICTORS.values(),
    Multipole, PromptLookup, SuffixDecoding, Gumiho, BestOf, Speculation,
)  # fmt: skip
TYPES: dict[str, type] = {kind.__name__: kind for kind in _KINDS}
"""Everything that a recipe may hold, by the name under which it is written."""

TRAINED: dict[type, str] = {QuickMergePrior: "prior", DynamicViT: "predictors", Gumiho: "network"}
"""Types that hold weights, and the setting that does. That of `DynamicViT` stands for its ``layers`` too."""

_INSIDE: dict[type, tuple[str, ...]] = {DynamicViT: ("layers", "trained_for")}
"""Settings that are written with the weights."""

DEPTH = 8
"""More types than that are never inside of each other."""

Written = Callable[[str, Any], Any]
"""Makes data of what is no plain data, given where it stands and what it is."""

Held = Prior | GumihoNetwork | DynamicViT
"""What has weights that are written as a folder of its own."""


class UnknownEntryError(QuickmergeError):
    """There is no such type or setting, here and now."""


def settings_of(kind: type) -> list[str]:
    """The names of the settings of one of `TYPES`, as they are written."""
    return [name for name in inspect.signature(kind).parameters if name not in _INSIDE.get(kind, ())]


def encode(value: Any, where: str, part: Written, other: Written) -> Any:
    """An ingredient, or a setting of one, as plain data.

    Args:
        value: what is written.
        where: its name in the recipe, such as ``merge.reducer``.
        part: writes what has weights: a `Prior`, a `GumihoNetwork`, or a `DynamicViT` for its predictors.
        other: writes what is in none of `TYPES`, such as a reducer of a user's own.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (tuple, list)):
        return [encode(each, where, part, other) for each in value]
    kind = type(value)
    if TYPES.get(kind.__name__) is not kind:
        return other(where, value)
    out: dict[str, Any] = {"type": kind.__name__}
    for name in settings_of(kind):
        inner = f"{where}.{name}"
        if TRAINED.get(kind) == name:
            out[name] = part(inner, value if isinstance(value, DynamicViT) else getattr(value, name))
        else:
            out[name] = encode(getattr(value, name), inner, part, other)
    return out


def decode(data: Any, where: str, part: Callable[[str, type, Any], Any], depth: int = 0) -> Any:
    """The inverse of `encode`.

    Args:
        data: what was read.
        where: its name in the recipe.
        part: loads what has weights, given where it stands, its type and what was written of it.
        depth: how deep it lies.

    Raises:
        QuickmergeError: naming what stands there and what may.
    """
    if depth > DEPTH:
        raise QuickmergeError(f"{where} is nested too deeply")
    if isinstance(data, list):
        return tuple(decode(each, where, part, depth + 1) for each in data)
    if isinstance(data, float) and not math.isfinite(data):
        raise QuickmergeError(f"{where} must be a finite number, got {data}")
    if not isinstance(data, dict):
        return data
    name = data.get("type")
    if not isinstance(name, str) or name not in TYPES:
        hint = near_match(name, TYPES) if isinstance(name, str) else ""
        raise UnknownEntryError(f"{where} must be of a known type, got {name!r:.80}{hint}")
    kind = TYPES[name]
    allowed = settings_of(kind)
    given: dict[str, Any] = {}
    for key, value in data.items():
        if key == "type":
            continue
        if key not in allowed:
            raise UnknownEntryError(f"{where} has the unknown setting {key!r:.80} of {name}{near_match(key, allowed)}")
        inner = f"{where}.{key}"
        given[key] = part(inner, kind, value) if TRAINED.get(kind) == key else decode(value, inner, part, depth + 1)
    if kind in TRAINED and TRAINED[kind] not in given:
        raise QuickmergeError(f"{where}.{TRAINED[kind]} is missing, and {name} can't do without it")
    if missing := [f.name for f in _fields(kind) if _needed(f) and f.name not in given]:
        raise QuickmergeError(f"{where}.{missing[0]} is missing, and {name} can't do without it")
    try:
        return _make(kind, given)
    except Exception as error:  # a value of the wrong kind leads to errors of any kind
        raise QuickmergeError(f"{where}: {first_sentence(error)}") from error


def _make(kind: type, given: Mapping[str, Any]) -> Any:
    if kind is QuickMergePrior:
        # settings that were left out are those that the prior was trained with
        return QuickMergePrior.from_prior(**given)
    if kind is DynamicViT:
        trained: DynamicViT = given["predictors"]
        keep = given.get("keep", trained.keep)
        return DynamicViT(keep, trained.predictors, trained.layers, trained.trained_for)
    return kind(**given)


def _fields(kind: type) -> tuple[Field[Any], ...]:
    return fields(kind) if hasattr(kind, "__dataclass_fields__") else ()


def _needed(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def state_of(part: Held) -> tuple[Mapping[str, torch.Tensor], str]:
    """The weights of what has some, and everything else that says what it is, as JSON."""
    if isinstance(part, DynamicViT):
        layers = None if part.layers is None else list(part.layers)
        return part.predictors.state_dict(), json.dumps([layers, dict(part.trained_for)], sort_keys=True, default=str)
    return part.state_dict(), part.config.to_json()
