"""How a language model is made to read fewer tokens: the two modes, each an object with its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypedDict

from torch import Tensor

from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.models.spans import check_tokenizer

__all__ = [
    "LITERALS",
    "MIN_TOKENS",
    "BlockCausal",
    "Mode",
    "ModeSettings",
    "Prefix",
    "Protect",
    "as_mode",
    "protecting",
]

MIN_TOKENS = 256
"""Rows of fewer tokens are read in full: merging them costs more than it saves."""

LITERALS = "literals"
"""What ``protect`` may name: numbers, identifiers, paths and the like, see `quickmerge.models.literals`."""

Mask = Callable[[Tensor], Tensor]
"""From ``input_ids (B, N)`` to a bool mask ``(B, N)``."""

Protect = str | Mask | Sequence[str | Mask] | None
"""What ``protect`` may be."""


@dataclass(frozen=True)
class Prefix:
    """Merges the residual stream of a fully known prompt: blocks above read slots, and so do their caches.

    Args:
        sinks: tokens at the start of every sequence that stay alone.
        recent: tokens at the end of every prompt that stay alone; at least 1, since the last one predicts the next
            token. The last four BOS and EOS tokens of a prompt stay alone too: where a chat template marks turns with
            them, those are the marks of the last turn.
        protect: further tokens that stay alone: ``"literals"``, every token of a number, identifier, path, address or
            quoted text, see `quickmerge.models.literals`; or a function from ``input_ids (B, N)`` to a bool mask ``(B,
            N)``; or several of these. They come on top of ``keep``, which counts the other tokens alone: a long system
            prompt that is protected takes nothing from the rest. Where entries leave the cache, theirs stay, on top as
            well.
        min_tokens: rows of a prompt that have fewer tokens are read in full, as are rows all of whose tokens stay
            alone; the summary says how many. 0 reduces every row that it can.
        tokenizer: that of the prompts, for methods that go by words or lines, and for literals. None: the one that
            `quickmerge.load` gave with the model, or that lies in the model's own folder.

    Raises:
        ValueError: naming the setting that is out of range.
    """

    name: ClassVar[str] = "prefix"
    sinks: int = 4
    recent: int = 16
    protect: Protect = None
    min_tokens: int = MIN_TOKENS
    tokenizer: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sinks", whole_number("sinks", self.sinks, 0))
        object.__setattr__(self, "recent", whole_number("recent", self.recent, 1))
        object.__setattr__(self, "min_tokens", whole_number("min_tokens", self.min_tokens, 0))
        object.__setattr__(self, "protect", _as_protect(self.protect))
        object.__setattr__(self, "tokenizer", check_tokenizer(self.tokenizer))

    @property
    def keeps_literals(self) -> bool:
        """Whether literals stay alone."""
        return LITERALS in _several(self.protect)

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The functions that say what else does."""
        return tuple(each for each in _several(self.protect) if not isinstance(each, str))


@dataclass(frozen=True)
class BlockCausal:
    """Merges keys and values of every finished chunk once it has left the recent window.

    The budget comes from the chunk alone, its saliency from the chunk and the window that follows, all read before the
    merge is first seen: the mode is exact for scoring. `QuickMerge` neither pools nor merges here
    unless it is told to, since both do harm.

    Args:
        sinks: tokens at the start of every sequence that stay alone.
        chunk: tokens per chunk, at least 2.
        window: recent tokens that are never merged, at least 1.
        protect: ``"literals"``, and every token of a number, identifier, path, address or quoted text stays alone, on
            top of the budget, as in `Prefix`. Of a chunk they are looked for in the chunk, in a few tokens in front of
            it and in the window behind it, so that nothing later says what is merged.
        tokenizer: that of the text, for literals; None as for `Prefix`.

    Raises:
        ValueError: naming the setting that is out of range.
    """

    name: ClassVar[str] = "block_causal"
    sinks: int = 4
    chunk: int = 128
    window: int = 64
    protect: str | None = None
    tokenizer: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sinks", whole_number("sinks", self.sinks, 0))
        object.__setattr__(self, "chunk", whole_number("chunk", self.chunk, 2))
        object.__setattr__(self, "window", whole_number("window", self.window, 1))
        if self.protect is not None and self.protect != LITERALS:
            hint = near_match(self.protect, [LITERALS]) if isinstance(self.protect, str) else ""
            raise ValueError(
                f"protect must be {LITERALS!r} or None in block_causal mode, got {self.protect!r:.80}{hint}"
            )
        object.__setattr__(self, "tokenizer", check_tokenizer(self.tokenizer))


def _several(protect: Protect) -> tuple[str | Mask, ...]:
    if protect is None:
        return ()
    return (protect,) if isinstance(protect, str) or callable(protect) else tuple(protect)


def _as_protect(protect: Any) -> Any:
    """What was given, several as a tuple; raises ValueError for what is neither a function nor known by name."""
    if protect is None:
        return None
    several = isinstance(protect, (tuple, list))
    for each in protect if several else [protect]:
        if not callable(each) and each != LITERALS:
            hint = near_match(each, [LITERALS]) if isinstance(each, str) else ""
            raise ValueError(
                f"protect must be {LITERALS!r}, a function of input_ids, several of these or None, got "
                f"{each!r:.80}{hint}"
            )
    return (tuple(protect) or None) if several else protect


def protecting(mode: Prefix, mask: Mask) -> Prefix:
    """The mode with more tokens left alone, such as those of a chat template; as it is where it has a function itself.

    Args:
        mode: what a user asked for.
        mask: see `Prefix`.
    """
    if mode.masks:
        return mode
    return replace(mode, protect=(LITERALS, mask) if mode.keeps_literals else mask)


Mode = Prefix | BlockCausal
_MODES: dict[str, type[Mode]] = {mode.name: mode for mode in (Prefix, BlockCausal)}


class ModeSettings(TypedDict, total=False):
    """Settings of either mode, by name; see `Prefix` and `BlockCausal`."""

    sinks: int
    recent: int
    protect: Protect
    min_tokens: int
    tokenizer: Any
    chunk: int
    window: int


def as_mode(mode: Mode | str | None, settings: Mapping[str, Any]) -> Mode:
    """The mode that was asked for: an object, or by name (None: ``"prefix"``) with its settings beside it.

    Raises:
        QuickmergeError: for another mode, a setting that the mode does not have, or settings beside an object.
        ValueError: for a setting out of range.
    """
    if isinstance(mode, (Prefix, BlockCausal)):
        for name in settings:
            raise QuickmergeError(f"{name} must stand in the mode, {type(mode).__name__}({name}=...), not beside it")
        return mode
    if mode is not None and (not isinstance(mode, str) or mode not in _MODES):
        raise QuickmergeError(
            f"mode must be one of {', '.join(_MODES)}, or Prefix(...) or BlockCausal(...), got {mode!r}"
        )
    kind = Prefix if mode is None else _MODES[mode]
    allowed = [field.name for field in fields(kind)]
    for name in settings:
        if name not in ModeSettings.__annotations__:
            raise TypeError(f"reduce() got an unexpected keyword argument {name!r}{near_match(name, allowed)}")
        if name not in allowed:
            raise QuickmergeError(
                f"{name} is no setting of {kind.name} mode, whose settings are {', '.join(allowed)}: leave it out"
            )
    return kind(**settings)
