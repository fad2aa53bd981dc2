"""The cache of block-causal mode: slots of finished chunks, then single tokens, and everything needed to read on.

All of it lies in the cache's layers. So a cache may be copied, handed from one ``with`` block to the next, and have its
rows picked, moved and repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache

from quickmerge.errors import QuickmergeError
from quickmerge.models.compat import DynamicLayer, cache_name
from quickmerge.reducers.base import Reducer
from quickmerge.tokens.budget import ReadingBudget
from quickmerge.tokens.view import TokenView


@dataclass(frozen=True)
class Rules:
    """The settings by which chunks are merged."""

    reducer: Reducer
    sinks: int
    chunk: int
    window: int

    def __deepcopy__(self, memo: Any) -> Self:
        """Itself: a copy of a cache goes by the same settings, and needs no trained parts of its own."""
        return self

    def differences(self, others: Rules) -> list[str]:
        """Each setting in which ``others`` differ, with both values."""
        found = []
        for name in (f.name for f in fields(self)):
            own, other = getattr(self, name), getattr(others, name)
            if own != other:
                same = repr(own) == repr(other)
                found.append(f"{name} of other trained parts" if same else f"{name}={own!r} and not {other!r}")
        return found


class Reader:
    """What a budget that reads has read: tokens of the unfinished chunk, its memory, and each chunk's surprise."""

    def __init__(self, budget: ReadingBudget, chunk: int) -> None:
        self.budget, self.chunk = budget, chunk
        self.pending: Tensor | None = None
        self.memory: Any = None
        self.surprises: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Reader:
        """A copy that goes on by itself, with the same budget and whatever that was trained with."""
        other = Reader(self.budget, self.chunk)
        memo[id(self)] = other
        other.pending, other.memory, other.surprises = deepcopy((self.pending, self.memory, self.surprises), memo)
        return other

    def read(self, hidden: Tensor) -> None:
        """Take in hidden states ``(B, q, D)``, chunk by chunk as they are finished."""
        self.pending = hidden if self.pending is None else torch.cat([self.pending, hidden], 1)
        while self.pending.shape[1] >= self.chunk:
            index = torch.arange(self.chunk, device=hidden.device).expand(len(hidden), -1)
            view = TokenView(
                hidden=self.pending[:, : self.chunk], position=len(self.surprises) * self.chunk + index,
                layer=self.budget.layer,
            )  # fmt: skip
            found, self.memory = self.budget.read(view, self.memory)
            self.surprises.append(found)
            self.pending = self.pending[:, self.chunk :]

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Rows follow their beams."""
        self.pending = None if self.pending is None else change(self.pending)
        self.surprises = [change(found) for found in self.surprises]
        if self.memory is not None:
            self.memory.each_row(change)

    def before(self, chunk: int) -> Tensor | None:
        """Surprise ``(B,)`` of the chunk before number ``chunk``; None for the first."""
        return self.surprises[chunk - 1] if chunk else None


class ChunkedLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer that stores slots of old chunks and then the tokens that no chunk has absorbed yet.

    Its logical length counts every token it was ever given; what it stores is shorter. ``query`` keeps the queries
    of the unabsorbed tokens, from which a chunk's statistics are taken when it closes. A run that is about to have keys
    and values written says so by ``expected``: outside of one, slots would be taken for tokens.
    """

    is_croppable = False

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.absorbed = 0
        self.slots = 0
        self.query: Tensor | None = None
        self.valid: Tensor | None = None
        self.size: Tensor | None = None
        self.reader: Reader | None = None
        self.expected = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``(B, H, q, D)``; returns all of them.

        Raises:
            QuickmergeError: outside of a run in block-causal mode.
        """
        expected, self.expected = self.expected, False
        if not expected:
            raise QuickmergeError(
                f"{cache_name()} holds chunks that were merged inside quickmerge.reduce(..., mode='block_causal'): go "
                "on with it in such a block of the same settings, or start with an empty cache"
            )
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]

    def get_seq_length(self) -> int:
        """Tokens seen, merged or not."""
        return int(super().get_seq_length()) - self.slots + self.absorbed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Stored entries plus the new ones; the offset makes logical and stored length agree."""
        stored = super().get_seq_length()
        return stored + query_length, self.get_seq_length() - stored

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: merged chunks can't be taken apart."""
        raise QuickmergeError("a cache merged in block_causal mode can't be cropped; use prefix mode")

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.reader is not None:
            self.reader.each_row(change)
        self.query = None if self.query is None else change(self.query)
        self.valid = None if self.valid is None else change(self.valid)
        self.size = None if self.size is None else change(self.size)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows follow their beams."""
        super().reorder_cache(beam_idx)
        self._each_row(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._each_row(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._each_row(lambda t: t[indices, ...])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.absorbed = self.slots = 0
        self.query = self.valid = self.size = None
        if self.reader is not None:
            self.reader = Reader(self.reader.budget, self.reader.chunk)


def chunked_layers(cache: Cache, blocks: Sequence[int], rules: Rules) -> dict[int, ChunkedLayer]:
    """The layers of a filled cache that can be read on by ``rules`` in these blocks, by block.

    Raises:
        QuickmergeError: if the cache was filled elsewhere, or by other settings.
    """
    found = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, ChunkedLayer)}
    if not found:
        raise QuickmergeError(
            f"{cache_name()} was filled outside of block_causal mode; start it with an empty cache inside the run"
        )
    if tuple(found) != tuple(blocks):
        raise QuickmergeError(
            f"{cache_name()} was merged from block {min(found)} on, and layer={min(blocks)} was asked for: give "
            "reduce(...) the same layer, or start with an empty cache"
        )
    for layer in found.values():
        if wrong := rules.differences(layer.rules):
            raise QuickmergeError(
                f"{cache_name()} was merged with other settings than those of this run ({', '.join(wrong)}): give "
                "reduce(...) the same ones, or start with an empty cache"
            )
    return found
