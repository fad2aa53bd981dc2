"""The ingredients of a recipe: what may stand where, when two are the same, and what they are called."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass, fields
from typing import Any

import torch

from quickmerge.errors import QuickmergeError
from quickmerge.merge.cache import Evictor, as_evictor
from quickmerge.merge.place import Merge, Place, as_merge, shown
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.text.modes import BlockCausal
from quickmerge.multipole.settings import Multipole
from quickmerge.recipe.plain import TRAINED, TYPES, Held, encode, settings_of, state_of
from quickmerge.recipe.speculation import Speculation
from quickmerge.speculative.drafter import Drafter
from quickmerge.speculative.engine import SpeculativeDecoding

__all__ = ["NAMES", "PLACES", "Ingredients", "shown_ingredient"]

PLACES: dict[str, Place] = {"merge": "text", "visual": "visual", "tower": "tower"}
"""The arguments that name a place where tokens become fewer, and that place."""

NAMES = (*PLACES, "cache", "attention", "decoding")
"""Every ingredient, in the order in which a model meets them."""


@dataclass(frozen=True, eq=False, repr=False)
class Ingredients:
    """What a `quickmerge.Recipe` holds. Each is checked against its place, and none against a model.

    Raises:
        QuickmergeError: naming the argument, what was given and what is allowed.
    """

    merge: Reducer | Merge | None = None
    visual: Reducer | Merge | None = None
    tower: Reducer | Merge | None = None
    attention: Multipole | None = None
    decoding: Drafter | Speculation | None = None
    cache: Evictor | float | None = None

    def __post_init__(self) -> None:
        for name, place in PLACES.items():
            given = getattr(self, name)
            if given is not None:
                merge = as_merge(given, name)
                merge.check(place, name)
                object.__setattr__(self, name, merge)
        object.__setattr__(self, "cache", as_evictor(self.cache))
        if self.attention is not None and not isinstance(self.attention, Multipole):
            raise QuickmergeError(
                f"attention must be a Multipole such as Multipole(budget=512), or None, got {self.attention!r:.200}"
            )
        if isinstance(self.decoding, Drafter):
            object.__setattr__(self, "decoding", Speculation(self.decoding))
        elif isinstance(self.decoding, SpeculativeDecoding):
            raise QuickmergeError(
                "decoding must be a Drafter or Speculation(drafter, nodes=..., tree=...), got a SpeculativeDecoding: "
                "give its drafter"
            )
        elif self.decoding is not None and not isinstance(self.decoding, Speculation):
            raise QuickmergeError(
                f"decoding must be a Drafter such as PromptLookup(), or Speculation(drafter, ...), or None, got "
                f"{self.decoding!r:.200}"
            )

        self._check_together()

    def _check_together(self) -> None:
        """Raise for ingredients that exclude one another on any model."""
        own = getattr(self.merge.reducer, "cache", None) if isinstance(self.merge, Merge) else None
        if self.cache is not None and own is not None:
            raise QuickmergeError(
                f"cache must be said once, of merge or beside it, got {own!r:.80} and {self.cache!r:.80}"
            )
        if self.evictor is not None and self.attention is not None:
            raise QuickmergeError(
                "attention must be left out beside cache, of which every head holds entries of its own, while clusters "
                "are of all entries: give one of the two"
            )
        if not isinstance(self.merge, Merge) or not isinstance(self.merge.mode, BlockCausal):
            return
        if self.evictor is not None:
            raise QuickmergeError(
                "cache must be left out beside merge in block_causal mode, whose cache holds slots of chunks already: "
                "use Prefix mode, or give one of the two"
            )
        if self.attention is not None:
            raise QuickmergeError(
                "attention must be left out beside merge in block_causal mode, whose cache holds slots of chunks where "
                "clusters would stand: use Prefix mode, or give one of the two"
            )
        if self.decoding is not None:
            raise QuickmergeError(
                "decoding must be left out beside merge in block_causal mode, which merges drafted tokens for good: "
                "use Prefix mode, or give one of the two"
            )

    @property
    def merges(self) -> dict[str, Merge]:
        """What is merged, by the argument that named the place."""
        return {name: each for name in PLACES if isinstance(each := getattr(self, name), Merge)}

    @property
    def evictor(self) -> Evictor | None:
        """What the cache of a prompt loses, said by ``cache`` or by the reducer of the text; None for nothing."""
        own = getattr(self.merge.reducer, "cache", None) if isinstance(self.merge, Merge) else None
        return self.cache if isinstance(self.cache, Evictor) else as_evictor(own)

    @property
    def speculation(self) -> Speculation | None:
        """How text is decoded; None for the model's own way."""
        return self.decoding if isinstance(self.decoding, Speculation) else None

    @property
    def empty(self) -> bool:
        """Whether nothing is done to a model."""
        return all(getattr(self, name) is None for name in NAMES)

    # What it is called, and when it is the same ---------------------------------------------------------------------

    @property
    def label(self) -> str:
        """One line for tables: the ingredients, each with what is not its default; ``"nothing"`` for none."""
        told = [each.label if name == "merge" else f"{name} {each.label}" for name, each in self.merges.items()]
        if isinstance(self.cache, Evictor):
            told.append(f"cache {self.cache.label} keep {self.cache.keep:g}")
        if self.attention is not None:
            told.append(self.attention.label)
        if self.speculation is not None:
            told.append(_drafts(self.speculation))
        return " + ".join(told) or "nothing"

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        return f"{type(self).__name__}({', '.join(f'{k}={shown_ingredient(v)}' for k, v in given.items())})"

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Ingredients) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.label)

    def _key(self) -> list[Any]:
        """Equal for two recipes of which all settings and weights are the same."""
        return [encode(getattr(self, name), name, _print_of, lambda _, value: value) for name in NAMES]


def _print_of(where: str, part: Held) -> str:
    """What tells trained parts from each other: a hash of all that they hold."""
    state, config = state_of(part)
    digest = hashlib.sha256(config.encode())
    for name, tensor in sorted(state.items()):
        values = tensor.detach().cpu()
        # weights are read back in float32, whatever they were stored in
        values = (values.float() if values.is_floating_point() else values).contiguous().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {values.dtype}\n".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def shown_ingredient(value: Any) -> str:
    """An ingredient as one would write it, a `Merge` or a `Speculation` without settings as what it holds."""
    if isinstance(value, Merge) and value == Merge(value.reducer):
        return shown(value.reducer)
    if isinstance(value, Speculation):
        drafter = _drafter(value.drafter)
        if (value.nodes, value.tree) == (Speculation.nodes, Speculation.tree):
            return drafter
        return f"Speculation({drafter}, nodes={value.nodes}, tree={value.tree!r})"
    return shown(value)


def _drafter(drafter: Drafter) -> str:
    kind = type(drafter)
    if TYPES.get(kind.__name__) is not kind:
        return f"{kind.__name__}(...)"
    usual = inspect.signature(kind).parameters
    held = {name: getattr(drafter, name) for name in settings_of(kind) if TRAINED.get(kind) != name}
    told = {name: _drafter(each) if isinstance(each, Drafter) else repr(each) for name, each in held.items()}
    own = [f"{name}={told[name]}" for name, value in held.items() if value != usual[name].default]
    return f"{kind.__name__}({', '.join(own)})"


def _drafts(settings: Speculation) -> str:
    own = [(f.name, getattr(settings, f.name), f.default) for f in fields(settings) if f.name != "drafter"]
    told = [f"{name} {value}" for name, value, usual in own if value != usual]
    return ", ".join([_drafter(settings.drafter), *told])
