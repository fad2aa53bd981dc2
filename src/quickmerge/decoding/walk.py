"""The walk: which drafted tokens are accepted.

At a node the next token is drawn from what the target says there, after all processors, as if there were no draft. If
it is a child of the node the walk goes on from that child; if not, it stands behind the accepted ones and the walk
ends. So every token is drawn from the target's own distribution given its text, and the draft decides nothing but
how many are drawn in one step. No probabilities of the drafter are needed, and none can do harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from quickmerge.decoding.tree import Tree

__all__ = ["Row", "walk"]


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
