"""What is done at one place of a model: a reducer, and how its host is to use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from quickmerge.errors import QuickmergeError, as_index, near_match
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.text.modes import BlockCausal, Mode, Prefix
from quickmerge.merge.tokens.budget import Schedule, layers_of
from quickmerge.merge.tokens.removal import Removal

__all__ = ["PLACES", "POSITIONS", "Merge", "Place", "as_merge", "shown"]

Place = Literal["text", "visual", "tower"]

PLACES: dict[Place, str] = {
    "text": "the prompt of a language model",
    "visual": "the visual tokens behind the projector of a vision-language model",
    "tower": "a vision transformer, or the vision tower of a vision-language model",
}
"""Where in a model tokens become fewer, and what each place is called in messages."""

POSITIONS = ("kept", "consecutive")

_REDUCERS: dict[Place, str] = {"text": "text", "visual": "vision", "tower": "vision"}
"""Which of `Reducer.places` each place asks for."""

_EXAMPLES: dict[Place, str] = {
    "text": "QuickMerge(keep=0.4)",
    "visual": "SCOPE(keep=0.25)",
    "tower": "ToMe(keep=0.5)",
}


@dataclass(frozen=True)
class Merge:
    """A reducer at one place of a model, with the settings of its host. Arguments are as in `quickmerge.reduce`.

    Args:
        reducer: the method, with its ``keep``.
        layer: the block or blocks that read fewer tokens: a block, a list of them, a `Schedule` (text) or a `Removal`
            (tower). None leaves it to the host.
        mode: `Prefix` or `BlockCausal` for the text; None elsewhere, and for the text ``Prefix()``.
        positions: ``"kept"`` or ``"consecutive"``, for visual tokens.
        unmerge: give back every patch of a tower at full length.

    Raises:
        QuickmergeError: naming the setting that is none of these.
    """

    reducer: Reducer
    layer: int | Sequence[int] | Schedule | Removal | None = None
    mode: Mode | None = None
    positions: str = "kept"
    unmerge: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.reducer, Reducer):
            raise QuickmergeError(f"reducer must be a quickmerge reducer such as QuickMerge(keep=0.4), got "
                                  f"{self.reducer!r:.200}")  # fmt: skip
        object.__setattr__(self, "layer", _as_layer(self.layer))
        if self.mode is not None and not isinstance(self.mode, (Prefix, BlockCausal)):
            raise QuickmergeError(f"mode must be Prefix(...), BlockCausal(...) or None, got {self.mode!r:.200}")
        if self.positions not in POSITIONS:
            hint = near_match(str(self.positions), POSITIONS)
            raise QuickmergeError(f"positions must be one of {', '.join(POSITIONS)}, got {self.positions!r:.200}{hint}")
        if not isinstance(self.unmerge, bool):
            raise QuickmergeError(f"unmerge must be True or False, got {self.unmerge!r:.200}")

    @property
    def label(self) -> str:
        """The reducer's label with its ``keep``, and the settings of the host that are not the defaults."""
        kept = f"{self.reducer.keep:g}" if isinstance(self.reducer.keep, float) else shown(self.reducer.keep)
        own = [(f.name, getattr(self, f.name), f.default) for f in fields(self) if f.name != "reducer"]
        told = [f"{name} {_short(value)}" for name, value, usual in own if value != usual]
        return ", ".join([f"{self.reducer.label} keep {kept}", *told])

    def check(self, place: Place, named: str = "") -> None:
        """Raise unless the reducer and every setting may stand at ``place``, whatever the model.

        Args:
            place: one of `PLACES`.
            named: what the place is called by whoever asks, as the argument ``merge`` of a recipe; default: its name.

        Raises:
            QuickmergeError: naming the setting, what was given and what is allowed.
        """
        named = named or place
        if _REDUCERS[place] not in self.reducer.places:
            raise QuickmergeError(
                f"{named} must be a reducer for {PLACES[place]}, such as {_EXAMPLES[place]}, got {self.reducer.name}"
            )
        if place != "text" and self.mode is not None:
            raise QuickmergeError(f"mode is for the text and must be left out of {named}, got {self.mode!r}")
        if place != "visual" and self.positions != "kept":
            raise QuickmergeError(f"positions is for visual tokens and must be 'kept' in {named}, got 'consecutive'")
        if place != "tower" and self.unmerge:
            raise QuickmergeError(f"unmerge is for vision transformers and must be False in {named}, got True")
        kinds = {"text": Schedule, "tower": Removal}
        for at, kind in kinds.items():
            if at != place and isinstance(self.layer, kind):
                allowed = f", a list of blocks or a {kinds[place].__name__}" if place in kinds else " or a list of them"
                raise QuickmergeError(f"layer must be a block{allowed} in {named}, got a {kind.__name__}")
        if isinstance(self.mode, BlockCausal) and not (self.layer is None or isinstance(self.layer, int)):
            raise QuickmergeError(f"layer must be one block in {named} in block_causal mode, got {self.layer!r}")


def as_merge(given: Reducer | Merge, name: str) -> Merge:
    """What a user gave for a place: a `Merge` as it is, a reducer with the host's defaults.

    Raises:
        QuickmergeError: it is something else; the message names the argument.
    """
    if isinstance(given, Merge):
        return given
    if isinstance(given, Reducer):
        return Merge(given)
    raise QuickmergeError(f"{name} must be a reducer such as QuickMerge(keep=0.4), or Merge(reducer, ...), got "
                          f"{given!r:.200}")  # fmt: skip


def _as_layer(layer: Any) -> Any:
    if layer is None or isinstance(layer, (Schedule, Removal)):
        return layer
    if isinstance(layer, Sequence) and not isinstance(layer, str):
        found = layers_of(layer)
        if found and all(as_index(each) is not None and each >= 0 for each in found):
            return found
    elif (index := as_index(layer)) is not None and index >= 0:
        return index
    raise QuickmergeError(
        f"layer must be a block of at least 0, a list of them, a Schedule, a Removal or None, got {layer!r:.200}"
    )


def shown(value: Any) -> str:
    """A setting as one would write it: of an object what is not its default, of a reducer always its ``keep``."""
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    own = [f for f in fields(value) if f.init and f.repr and (f.name == "keep" or getattr(value, f.name) != f.default)]
    return f"{type(value).__name__}({', '.join(f'{f.name}={shown(getattr(value, f.name))}' for f in own)})"


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else shown(value).strip("'")
