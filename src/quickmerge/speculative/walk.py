"""Logits processors, asked about one row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from quickmerge.models.compat import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)
from quickmerge.speculative.tree import Tree

__all__ = ["Batch", "Row", "for_row", "walk"]


BY_NUMBER = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)
"""Processors of transformers that treat rows by their number."""


def for_row(processors: LogitsProcessorList, row: int, rows: int) -> LogitsProcessorList:
    """The processors of a batch, for one row alone: they take ids ``(1, L)`` and scores ``(1, V)``.

    Rows are written at different speeds, so no two of them can be asked about at once. Most processors look at a row
    and nothing else. Those that may know the rows by number, all that are not transformers' own among them, are given
    the row as often as there are rows, and answer for its number.
    """
    if rows == 1:
        return processors
    return LogitsProcessorList([_Numbered(p, row, rows) if _by_number(p) else p for p in processors])


def _by_number(processor: LogitsProcessor) -> bool:
    # A repetition penalty on left-padded prompts has as many lengths of padding as there are rows.
    lengths = isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor)
    return isinstance(processor, BY_NUMBER) or lengths or not type(processor).__module__.startswith("transformers.")


class _Numbered(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, processor: LogitsProcessor, row: int, rows: int) -> None:
        self.processor, self.row, self.rows = processor, row, rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        found: Tensor = self.processor(input_ids.repeat(self.rows, 1), scores.repeat(self.rows, 1))
        return found[self.row : self.row + 1]


# The walk: which drafted tokens are accepted.
#
# At a node the next token is drawn from what the target says there, after all processors, as if there were no draft. If
# it is a child of the node the walk goes on from that child; if not, it stands behind the accepted ones and the walk
# ends. So every token is drawn from the target's own distribution given its text, and the draft decides nothing but
# how many are drawn in one step. No probabilities of the drafter are needed, and none can do harm.


class Row:
    """The text of one row, and what is asked for every token of it.

    Args:
        prompt: ``(n,)`` ids, padding included, as ``generate`` was given them.
        processors: what changes the logits; they see this row alone.
        criteria: what ends the text; asked after every token.
        sample: whether to draw tokens or to take the best.
        streamer: gets every token; None for nobody.
        generator: that this row alone draws from, once a token, so that its text is the same however many tokens it
            and others get in a step; None for torch's global one.
    """

    def __init__(
        self,
        prompt: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        sample: bool,
        streamer: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._text = torch.cat([prompt, prompt.new_zeros(max(64, len(prompt)))])
        self.length = len(prompt)
        self.processors = processors
        self.criteria = criteria
        self.sample = sample
        self.streamer = streamer
        self.generator = generator
        self.last = int(prompt[-1])
        self.stop: int | None = None
        """How long the text was when the criteria first said that it is done; None before."""

    @property
    def text(self) -> Tensor:
        """``(L,)`` ids so far."""
        return self._text[: self.length]

    @property
    def plain(self) -> bool:
        """Whether the next token is simply that of the largest logit."""
        return not self.sample and not self.processors

    def choose(self, logits: Tensor) -> int:
        """The token that follows the text, by the target's logits ``(V,)``."""
        scores = logits[None].to(self._text.device, torch.float32, copy=True)
        scores = self.processors(self.text[None], scores)
        if self.sample:
            return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
        return int(scores.argmax(-1))

    def take(self, token: int) -> bool:
        """Add a token to the text; whether the text is done now, for the first time."""
        if self.length == len(self._text):
            self._text = torch.cat([self._text, torch.zeros_like(self._text)])
        self._text[self.length] = token
        self.length += 1
        self.last = token
        if self.streamer is not None:
            self.streamer.put(self._text[self.length - 1 : self.length].cpu())
        if self.stop is None and bool(self.criteria(self.text[None], None)):
            self.stop = self.length
            return True
        return False


def walk(tree: Tree, row: Row, logits: Tensor, best: Sequence[int] | None = None) -> list[int]:
    """Take tokens from the root on for as long as they were drafted, and one more.

    Args:
        tree: the draft.
        row: gets the tokens.
        logits: ``(T or more, V)`` of the target at the nodes.
        best: the tokens of the largest logits, where that is all that decides (`Row.plain`).

    Returns:
        The nodes whose tokens are in the text, from the root on. The last token that was taken is not among them: the
        target has not read it, or the text ends with it.
    """
    children, node, path = tree.children(), 0, [0]
    while True:
        token = best[node] if best is not None else row.choose(logits[node])
        if row.take(token) or token not in children[node]:
            return path
        node = children[node][token]
        path.append(node)


# The rows of a batch: which are done, and what ``generate`` would return for them.


class Batch:
    """Rows that are written at different speeds and returned as if they had been written in step.

    ``generate`` gives every row a token in each step until all are done. With an end-of-sequence token rows that are
    done get padding; without one they are simply written on until the last row is done, and so they are here.

    Args:
        rows: all of them.
        config: of ``generate``.
        criteria: what ends a row.
    """

    def __init__(self, rows: Sequence[Row], config: GenerationConfig, criteria: StoppingCriteriaList) -> None:
        self.rows = list(rows)
        self.max_length: int | None = criteria.max_length
        ends = [c.eos_token_id for c in criteria if hasattr(c, "eos_token_id")]
        self.pad: int | None = None
        if ends:
            first = int(torch.as_tensor(ends[0]).flatten()[0])
            self.pad = first if config.pad_token_id is None else int(config.pad_token_id)

    def done(self, row: Row) -> bool:
        """Whether a row needs no more tokens."""
        if self.pad is not None or len(self.rows) == 1:
            return row.stop is not None
        if row.stop is None:
            return False
        if self.max_length is not None and row.length >= self.max_length:
            return True
        stops = [each.stop for each in self.rows]
        return all(stop is not None and row.length >= stop for stop in stops)

    def left(self, row: Row) -> int:
        """How many more tokens a row may get."""
        return 1 << 30 if self.max_length is None else self.max_length - row.length

    def sequences(self) -> Tensor:
        """``(B, L)`` ids once all rows are done: as long as the row that was done last."""
        length = max(row.stop or row.length for row in self.rows)
        out = self.rows[0].text.new_full((len(self.rows), length), 0 if self.pad is None else self.pad)
        for i, row in enumerate(self.rows):
            mine = row.text[: length if self.pad is None else row.stop]
            out[i, : len(mine)] = mine
        return out
