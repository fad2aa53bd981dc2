"""A drafter without weights: how the text went on where it last read like this."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from quickmerge.errors import whole_number
from quickmerge.speculative.drafter import Drafter, texts_of
from quickmerge.speculative.tree import Tree, best_first

__all__ = ["PromptLookup", "TextIndex"]

RECENT = 32
"""Earlier places that are looked at, the most recent ones."""
MOST = 1024
"""Longer runs and drafts gain nothing: what is kept of every place of a text grows with them."""


class PromptLookup(Drafter):
    """Looks up the last tokens of a row in its own text and drafts what followed them there.

    The longest run of at most ``ngram`` last tokens that has been there before counts. All places where it was are
    followed at once, so that the draft branches where they differ. A place's next token gets its share among those
    places, times how often the text was found to go on as in an earlier place after that many equal tokens. That is
    counted while the text is written, from 1 of 2 on.

    Args:
        ngram: the longest run that is looked up.
        length: how many tokens are drafted behind one another at most.

    Raises:
        ValueError: if either is not a whole number of 1 to `MOST`.
    """

    def __init__(self, *, ngram: int = 3, length: int = 10) -> None:
        ngram = whole_number("ngram", ngram)
        length = whole_number("length", length)
        for name, value in (("ngram", ngram), ("length", length)):
            if value > MOST:
                raise ValueError(f"{name} must be at most {MOST}, got {value}")
        self.ngram = ngram
        self.length = length
        self._texts: list[TextIndex] = []
        self._drafts: list[_Draft] = []
        self._written: list[list[int]] = []
        self._tried = [2] * (ngram + length)
        self._right = [1] * (ngram + length)

    def begin(
        self, model: PreTrainedModel, ids: Tensor, valid: Tensor, features: Tensor | None, positions: Tensor
    ) -> None:
        """Index the prompts."""
        self._texts = [TextIndex(text, self.ngram) for text in texts_of(ids, valid)]
        self._drafts, self._written = [], []
        self._tried = [2] * (self.ngram + self.length)
        self._right = [1] * (self.ngram + self.length)

    def draft(self, last: Tensor, nodes: int) -> list[Tree]:
        """What followed earlier places that end like the text."""
        follows = last.tolist()
        for draft, written, token in zip(self._drafts, self._written, follows, strict=False):
            self._learn(draft, [*written[1:], token])
        self._drafts = [self._look_up(text, token, nodes) for text, token in zip(self._texts, follows, strict=True)]
        self._written = []
        return [draft.tree for draft in self._drafts]

    def accept(self, tokens: list[Tensor], features: list[Tensor] | None) -> None:
        """Index what was written."""
        if self._written:  # there was no draft since
            self._drafts = []
        self._written = [row.tolist() for row in tokens]
        for text, row in zip(self._texts, self._written, strict=True):
            text.extend(row)

    def rows(self, index: Tensor) -> None:
        """Forget the other rows."""
        keep = index.tolist()
        self._texts = [self._texts[i] for i in keep]
        self._drafts = [self._drafts[i] for i in keep] if self._drafts else []
        self._written = [self._written[i] for i in keep] if self._written else []

    def _look_up(self, text: TextIndex, last: int, nodes: int) -> _Draft:
        """Follow all the places at once, the most probable tokens first."""
        matched, places = text.find(last)
        ahead: dict[tuple[int, ...], list[int]] = {(): places}

        def ranked(path: tuple[int, ...]) -> tuple[Sequence[int], Sequence[float]]:
            here = ahead[path]
            if not here or len(path) == self.length:
                return (), ()
            going: dict[int, list[int]] = {}
            for place in here:
                if place <= len(text.ids):
                    token = text.ids[place] if place < len(text.ids) else last
                    going.setdefault(token, []).append(place + 1)
            # Sorting is stable, and the most recent place comes first.
            found = sorted(going.items(), key=lambda item: -len(item[1]))
            for rank, (_, behind) in enumerate(found):
                ahead[(*path, rank)] = behind
            trust = self._right[matched + len(path)] / self._tried[matched + len(path)] / len(here)
            return [token for token, _ in found], [trust * len(behind) for _, behind in found]

        return _Draft(best_first(last, ranked, nodes), matched)

    def _learn(self, draft: _Draft, follows: Sequence[int]) -> None:
        """Count how far a draft was right about what follows its root, whatever the target has read of it."""
        for step, right in enumerate(draft.tree.came_true(follows)):
            self._tried[draft.matched + step] += 1
            self._right[draft.matched + step] += right


@dataclass(frozen=True)
class _Draft:
    """A tree, and how many tokens of the text were found at the places that its first level comes from."""

    tree: Tree
    matched: int


class TextIndex:
    """A text's tokens, and for every run of 1 to ``ngram`` of them the places behind it.

    Args:
        ids: the tokens.
        ngram: the longest run that is looked up.
    """

    def __init__(self, ids: list[int], ngram: int) -> None:
        self.ids: list[int] = []
        self.ngram = ngram
        self._behind: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Take in tokens that follow."""
        for token in ids:
            self.ids.append(token)
            end = len(self.ids)
            for size in range(1, min(self.ngram, end) + 1):
                self._behind[tuple(self.ids[end - size :])].append(end)

    def find(self, last: int) -> tuple[int, list[int]]:
        """The length of the longest run that ends with ``last`` and is known, and the most recent places behind it."""
        before = self.ids[len(self.ids) - self.ngram + 1 :] if self.ngram > 1 else []
        for start in range(len(before) + 1):
            run = (*before[start:], last)
            if run in self._behind:
                return len(run), self._behind[run][: -RECENT - 1 : -1]
        return 0, []

    def chain(self, last: int, length: int) -> list[int]:
        """The tokens that are most likely to follow ``last``, at most ``length``: for hosts that check no trees.

        All places behind the longest run are followed at once; each step takes what most of those that are left go on
        with, and of two the one of the most recent place.
        """
        _, places = self.find(last)
        out: list[int] = []
        while places and len(out) < length:
            going: dict[int, list[int]] = {}
            for place in places:
                if place <= len(self.ids):
                    token = self.ids[place] if place < len(self.ids) else last
                    going.setdefault(token, []).append(place + 1)
            if not going:
                break
            token, places = max(going.items(), key=lambda item: len(item[1]))  # of equals the first, the most recent
            out.append(token)
        return out
