"""Suffix decoding: a drafter without weights that remembers, and drafts the further the longer it has been here."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from quickmerge.errors import number_at_least, whole_number
from quickmerge.models.moved import read
from quickmerge.speculative.automaton import SuffixAutomaton, Writer
from quickmerge.speculative.drafter import Drafter
from quickmerge.speculative.tree import Tree, best_first

__all__ = ["SuffixDecoding"]

MOST = 1024
"""Longer runs gain nothing: adding a token takes up to as many steps."""
PRIOR = 2.0
"""Drafted tokens that count as seen before any was, for each class of length."""
PAST = 16
"""Ends of the text that are tried at most in each source: further ones are short and seldom the best."""


class SuffixDecoding(Drafter):
    """Drafts what followed the longest ends of the text before, in it and in earlier outputs (arXiv 2411.04975).

    A run of last tokens that was there before is followed as far as `factor` tokens for each of its own: long runs are
    quotations, and go on. Tokens behind a run branch by how often each was there, the path probability of a node being
    the product of these shares. Of all runs, in the text of a row and in what was written earlier, the one with the
    largest sum of path probabilities is drafted: the tokens that it is expected to give.

    Beyond the paper, a share is multiplied by how often tokens at such a distance from the beginning of their run came
    true, which is counted while the text is written, so that the sums can be held against what a pass takes.

    Args:
        depth: the longest run that is looked up, and the longest draft, in tokens.
        factor: tokens drafted behind one another for each token of the run.
        memory: tokens of earlier outputs that are remembered from one ``generate`` to the next, also by the copies
            that a recipe makes; 0 for none. What is remembered is not saved with a recipe. Outputs of all
            users of one drafter come together in it: what it drafts changes no text, but a shared drafter is faster
            where they write alike, which can be seen from outside.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(self, *, depth: int = 64, factor: float = 1.0, memory: int = 32_768) -> None:
        depth = whole_number("depth", depth)
        if depth > MOST:
            raise ValueError(f"depth must be at most {MOST}, got {depth}")
        number_at_least("factor", factor, 0.0)
        self.depth, self.factor, self.memory = depth, float(factor), whole_number("memory", memory, 0)
        self._past = _Past(depth, self.memory)
        self._reset([])

    def begin(
        self, model: PreTrainedModel, ids: Tensor, valid: Tensor, features: Tensor | None, positions: Tensor
    ) -> None:
        """Index the prompts."""
        texts = zip(*(x for x in read(ids, valid) if x is not None), strict=True)
        self._reset([row[keep].tolist() for row, keep in texts])

    def _reset(self, prompts: list[list[int]]) -> None:
        self._rows = [_Row(self.depth, prompt, self._past.begin()) for prompt in prompts]
        classes = (2 * self.depth).bit_length() + 1
        self._tried = [PRIOR] * classes
        self._right = [PRIOR * (1 - 0.5 ** (i + 1)) for i in range(classes)]

    def draft(self, last: Tensor, nodes: int) -> list[Tree]:
        """What followed before."""
        drafts = []
        for row, token in zip(self._rows, last.tolist(), strict=True):
            row.learn(token, self._tried, self._right)
            row.draft = self._best(row, token, nodes)
            drafts.append(row.draft.tree)
        return drafts

    def accept(self, tokens: list[Tensor], features: list[Tensor] | None) -> None:
        """Index what was written, and remember it."""
        for row, written in zip(self._rows, tokens, strict=True):
            row.write(written.tolist())

    def rows(self, index: Tensor) -> None:
        """Forget the other rows."""
        self._rows = [self._rows[i] for i in index.tolist()]

    def _best(self, row: _Row, last: int, nodes: int) -> _Draft:
        """The draft that is expected to give most."""
        best = _Draft(Tree.chain([last]), 0)
        text = [*row.text[1 - self.depth or len(row.text) :], last]
        with self._past.lock:
            most = 0.0
            for source in (row.index, self._past.index):
                for state, size in source.find(text)[:PAST]:
                    room = min(nodes - 1, self._reach(size))
                    if room <= most or room < 1:  # shorter runs have no more room
                        break
                    tree = self._grow(source, state, size, last, nodes)
                    gain = sum(tree.prob) - 1
                    if gain > most:
                        best, most = _Draft(tree, size), gain
        return best

    def _reach(self, size: int) -> int:
        """How many tokens behind one another are drafted behind a run."""
        return min(self.depth, int(self.factor * size))

    def _grow(self, source: SuffixAutomaton, state: int, size: int, last: int, nodes: int) -> Tree:
        """The most probable nodes behind a state."""
        reach = self._reach(size)
        states: dict[tuple[int, ...], int] = {(): state}

        def ranked(path: tuple[int, ...]) -> tuple[Sequence[int], Sequence[float]]:
            here = states[path]
            if len(path) >= reach:
                return (), ()
            going = sorted(source.follows[here].items(), key=lambda item: -source.count[item[1]])[:nodes]
            for rank, (_, behind) in enumerate(going):
                states[(*path, rank)] = behind
            at = _class(size + len(path))
            share = min(1.0, self._right[at] / self._tried[at]) / source.count[here]
            return [token for token, _ in going], [share * source.count[behind] for _, behind in going]

        return best_first(last, ranked, nodes)


def _runs(depth: int) -> SuffixAutomaton:
    """Counts of whatever a draft may pass: a run, and as many tokens behind it."""
    return SuffixAutomaton(2 * depth)


def _class(tokens: int) -> int:
    """Lengths of the same number of bits are held for equally sure."""
    return tokens.bit_length() - 1


@dataclass(frozen=True)
class _Draft:
    """A tree, and how many tokens of the text were found where it comes from."""

    tree: Tree
    size: int


@dataclass
class _Row:
    """A row: its text, all runs of it, its place among what is remembered, and what was drafted and written last."""

    depth: int
    text: list[int]
    past: _Output
    draft: _Draft | None = None
    written: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.index = _runs(self.depth)
        self._writer = self.index.begin()
        self._writer.write(self.text)

    def write(self, tokens: list[int]) -> None:
        if self.written:  # there was no draft since
            self.draft = None
        self.written = tokens
        self.text += tokens
        self._writer.write(tokens)
        self.past.write(tokens)

    def learn(self, last: int, tried: list[float], right: list[float]) -> None:
        """Count how far the draft was right about what follows its root, whatever the target has read of it."""
        if self.draft is not None and self.written:
            for step, came in enumerate(self.draft.tree.came_true([*self.written[1:], last])):
                at = _class(self.draft.size + step)
                tried[at] += 1
                right[at] += came
        self.written = []


class _Past:
    """What was written earlier: the latest outputs, of at most ``memory`` tokens together. Threads may share it."""

    def __init__(self, depth: int, memory: int) -> None:
        self.depth, self.memory = depth, memory
        self.index = _runs(depth)
        self.lock = threading.Lock()
        self.outputs: deque[_Output] = deque()

    def __deepcopy__(self, memo: object) -> _Past:
        """A drafter that is copied in depth remembers nothing yet: locks can't be copied, and users may not want it."""
        return _Past(self.depth, self.memory)

    def begin(self) -> _Output:
        return _Output(self)

    def shrink(self) -> None:
        """Forget the oldest outputs, down to half of what may be remembered: an automaton can't forget a part."""
        kept, total = deque[_Output](), 0
        for output in reversed(self.outputs):
            room = self.memory // 2 - total
            output.tokens = output.tokens[max(0, len(output.tokens) - room) :] if room > 0 else []
            output.listed = bool(output.tokens)
            if output.listed:
                kept.appendleft(output)
            total += len(output.tokens)
        self.outputs, self.index = kept, _runs(self.depth)
        for output in kept:
            output.writer = self.index.begin()
            output.writer.write(output.tokens)


class _Output:
    """One output among those that are remembered."""

    def __init__(self, past: _Past) -> None:
        self.past = past
        self.tokens: list[int] = []
        self.listed = False
        self.writer: Writer | None = None

    def write(self, tokens: list[int]) -> None:
        past = self.past
        if not past.memory:
            return
        with past.lock:
            if not self.listed:
                past.outputs.append(self)
                self.listed, self.writer = True, past.index.begin()
            assert self.writer is not None
            self.tokens += tokens
            self.writer.write(tokens)
            if len(past.index) > past.memory:
                past.shrink()
