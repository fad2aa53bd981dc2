"""Which questions to ask about an image, so that no answer is right by habit.

All questions that can be asked about an image are listed with their answers. Of each kind a few are then asked: those
whose answer has been the answer least often so far, to this sort of question and to this very question.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

PER_KIND = {"what": 2, "where": 2, "colour": 2, "read": 2, "count": 2, "exists": 2}
LEAST = 8


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and its sort: questions of one sort differ only in what they name."""

    kind: str
    question: str
    answer: str
    sort: str


class Asker:
    """Asks about one image after the other, and remembers which answers it has had."""

    def __init__(self) -> None:
        self._had: Counter[tuple[str, str]] = Counter()

    def ask(self, candidates: list[Asked], draw: random.Random) -> list[Asked]:
        """Some of the questions, up to `PER_KIND` of each kind and at least `LEAST` where there are so many."""
        chosen: list[Asked] = []
        for kind, count in PER_KIND.items():
            self._choose(chosen, [one for one in candidates if one.kind == kind], count, draw)
        self._choose(chosen, [one for one in candidates if one.kind in ("count", "exists")], LEAST - len(chosen), draw)
        return chosen

    def _choose(self, chosen: list[Asked], candidates: list[Asked], count: int, draw: random.Random) -> None:
        for _ in range(count):
            left = [one for one in candidates if all(one.question != other.question for other in chosen)]
            if not left:
                return
            draw.shuffle(left)
            best = min(left, key=self._weight)
            chosen.append(best)
            self._had[best.sort, best.answer] += 1
            self._had[best.sort, ""] += 1
            self._had[best.question, best.answer] += 1

    def _weight(self, one: Asked) -> tuple[int, int]:
        return self._had[one.sort, one.answer] + self._had[one.question, one.answer], self._had[one.sort, ""]


def a(word: str) -> str:
    """A word with its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
