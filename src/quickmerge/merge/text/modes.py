"""How a language model is made to read fewer tokens: the two modes, each an object with its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypedDict

from torch import Tensor

from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.models.spans import check_tokenizer

__all__ = ["MIN_TOKENS", "BlockCausal", "Mode", "ModeSettings", "Prefix", "as_mode"]

MIN_TOKENS = 256
"""Rows of fewer tokens are read in full: merging them costs more than it saves."""


@dataclass(frozen=True)
class Prefix:
    """Merges the residual stream of a fully known prompt: blocks above read slots, and so do their caches.

    Args:
        sinks: tokens at the start of every sequence that stay alone.
        recent: tokens at the end of every prompt that stay alone; at least 1, since the last one predicts the next
            token. The last four BOS and EOS tokens of a prompt stay alone too: where a chat template marks turns with
            them, those are the marks of the last turn.
        protect: further tokens that stay alone: a function from ``input_ids (B, N)`` to a bool mask ``(B, N)``. They
            come on top of ``keep``, which counts the other tokens alone: a long system prompt that is protected takes
            nothing from the rest. Where entries leave the cache, theirs stay, on top as well.
        min_tokens: rows of a prompt that have fewer tokens are read in full, as are rows all of whose tokens stay
            alone; the summary says how many. 0 reduces every row that it can.
        tokenizer: that of the prompts, for methods that go by words or lines. None: the one that `quickmerge.load` gave
            with the model, or that lies in the model's own folder.

    Raises:
        ValueError: naming the setting that is out of range.
    """

    name: ClassVar[str] = "prefix"
    sinks: int = 4
    recent: int = 16
    protect: Callable[[Tensor], Tensor] | None = None
    min_tokens: int = MIN_TOKENS
    tokenizer: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sinks", whole_number("sinks", self.sinks, 0))
        object.__setattr__(self, "recent", whole_number("recent", self.recent, 1))
        object.__setattr__(self, "min_tokens", whole_number("min_tokens", self.min_tokens, 0))
        if self.protect is not None and not callable(self.protect):
            raise ValueError(f"protect must be a function of input_ids, or None, got {self.protect!r}")
        object.__setattr__(self, "tokenizer", check_tokenizer(self.tokenizer))


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

    Raises:
        ValueError: naming the setting that is out of range.
    """

    name: ClassVar[str] = "block_causal"
    sinks: int = 4
    chunk: int = 128
    window: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "sinks", whole_number("sinks", self.sinks, 0))
        object.__setattr__(self, "chunk", whole_number("chunk", self.chunk, 2))
        object.__setattr__(self, "window", whole_number("window", self.window, 1))


Mode = Prefix | BlockCausal
_MODES: dict[str, type[Mode]] = {mode.name: mode for mode in (Prefix, BlockCausal)}


class ModeSettings(TypedDict, total=False):
    """Settings of either mode, by name; see `Prefix` and `BlockCausal`."""

    sinks: int
    recent: int
    protect: Callable[[Tensor], Tensor] | None
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
