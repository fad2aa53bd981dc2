"""Which rule for which kind of token, by what a text costs with their rows.

Held-out shared tokens don't foresee that. They are words that the base knows well, while new tokens are rare, or of
another script; and what a new row does to the others, by taking probability away from them, no cosine shows. So rows
are put into the model, and a text is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quickmerge.vocabulary.kinds import KINDS
from quickmerge.vocabulary.methods import PULLED

if TYPE_CHECKING:
    from quickmerge.vocabulary.pieces import Subword
    from quickmerge.vocabulary.quality import Texts
    from quickmerge.vocabulary.rules import Rule

__all__ = ["FALLBACK", "Decision", "candidate_rules", "deal", "decide", "spread"]

ENOUGH = 20
"""New tokens of a kind that a text must have to decide about the kind."""
MOST = 8000
"""Bytes of text that are read for each try."""
PASSAGE = 500
"""Bytes of a passage; tries are compared passage by passage."""
DEALT = 2000
"""Characters of the passages that texts are dealt out in, one to choose on, the next to measure on."""
SURE = 1.96
"""Standard errors that a difference must have to be no noise."""
FALLBACK = "pieces, pulled"
"""What a kind gets that the text says nothing about: it needs no vector and is nowhere far behind the best."""
TRUSTED = 0.4
"""Unless the best rule from vectors rebuilds hidden tokens of the kind with at least this centred cosine."""

Choice = Mapping[str, str]
"""Kind of token -> name of the candidate that makes its rows."""


@dataclass(frozen=True)
class Decision:
    """What a text decided.

    Attributes:
        chosen: kind of token -> candidate.
        bits: of the text, with that.
        bytes: of the text.
        new_tokens: of each kind in the text.
        tried: every try in turn: the kind that it was about (None for all), the candidate, bits per byte, and whether
            it was kept.
    """

    chosen: Mapping[str, str]
    bits: float
    bytes: int
    new_tokens: Mapping[str, int]
    tried: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "chosen": dict(self.chosen), "bits_per_byte": self.bits / self.bytes, "bytes": self.bytes,
            "new_tokens": dict(self.new_tokens), "tried": [dict(one) for one in self.tried],
        }  # fmt: skip


def candidate_rules(ranking: Sequence[Rule | Subword]) -> dict[str, Rule | Subword]:
    """The rules that a text decides between, by name.

    Args:
        ranking: rules by their score on held-out tokens, best first; the best that looks at vectors is a candidate.
    """
    from quickmerge.vocabulary.pieces import Subword
    from quickmerge.vocabulary.rules import Mean, Zero

    found: dict[str, Rule | Subword] = {}
    best = next((rule for rule in ranking if not isinstance(rule, (Subword, Mean, Zero))), None)
    if best is not None:
        found["vectors"] = best
    return {
        **found, FALLBACK: Subword("mean", PULLED), "pieces, pulled a little": Subword("mean", 0.9),
        "pieces, pulled far": Subword("mean", 0.5), "pieces": Subword("mean"), "pieces, decay": Subword("decay", 0.75),
        "mean": Mean(),
    }  # fmt: skip


def decide(
    candidates: Sequence[str],
    kinds: Sequence[str],
    score: Callable[[Choice], Sequence[Texts]],
    *,
    fallback: Choice,
    new_tokens: Mapping[str, int],
    progress: Callable[[int, int], None] | None = None,
) -> Decision:
    """Choose a candidate for each kind of token.

    Each candidate makes the rows of all kinds first, and the best one is where the search begins. Kinds of which the
    text has fewer than `ENOUGH` new tokens get their fallback, unless the text becomes dearer by more than noise. Then
    the other kinds are gone through, those with the most new tokens first, and each takes the candidate with which the
    text costs the fewest bits while all others stay as they are.

    Args:
        candidates: names.
        kinds: of the tokens whose rows are made.
        fallback: what each kind gets that the text says nothing about.
        score: what the model with such rows makes of each passage of the text.
        new_tokens: how many of each kind the text has.
        progress: told tries that are done and the most there can be.
    """
    kinds = [kind for kind in (*KINDS, "") if kind in set(kinds)]
    seen = sorted((k for k in kinds if new_tokens.get(k, 0) >= ENOUGH), key=lambda kind: -new_tokens[kind])
    most = len(candidates) + 1 + len(seen) * (len(candidates) - 1)
    tried: list[dict[str, Any]] = []
    size = 0

    def attempt(choice: Choice, kind: str | None, name: str) -> NDArray[np.float64]:
        nonlocal size
        found = score(choice)
        bits, size = np.asarray([one.bits for one in found]), sum(one.bytes for one in found)
        tried.append({"kind": kind, "candidate": name, "bits_per_byte": float(bits.sum()) / size, "kept": False})
        if progress is not None:
            progress(len(tried), most)
        return bits

    alone = {name: attempt(dict.fromkeys(kinds, name), None, name) for name in candidates}
    first = min(candidates, key=lambda name: float(alone[name].sum()))
    chosen, bits = dict.fromkeys(kinds, first), alone[first]
    tried[list(candidates).index(first)]["kept"] = True
    unseen = [kind for kind in kinds if kind not in seen]
    other = {**chosen, **{kind: fallback[kind] for kind in unseen}}
    if other != chosen:
        got = attempt(other, ", ".join(unseen), "fallback")
        if not _dearer(got, bits):
            chosen, bits, tried[-1]["kept"] = other, got, True
    for kind in seen:
        for name in (name for name in candidates if name != chosen[kind]):
            other = {**chosen, kind: name}
            got = attempt(other, kind, name)
            if got.sum() < bits.sum():
                chosen, bits, tried[-1]["kept"] = other, got, True
    if progress is not None:
        progress(most, most)
    return Decision(chosen, float(bits.sum()), size, dict(new_tokens), tuple(tried))


def _dearer(new: NDArray[np.float64], old: NDArray[np.float64]) -> bool:
    """Whether the text costs more bits, by more than differs from passage to passage."""
    more = new - old
    noise = SURE * float(more.std(ddof=1)) * len(more) ** 0.5 if len(more) > 1 else 0.0
    return float(more.sum()) > noise


def deal(texts: Sequence[str], size: int = DEALT) -> tuple[list[str], list[str]]:
    """Texts in two halves of the same kind: passages that follow one another go to one and the other in turn.

    Args:
        texts: any.
        size: characters of a passage; a single shorter text is cut in the middle.

    Returns:
        What to choose on, and what to measure on.
    """
    parts = [part for text in texts for part in _cut(text, size)]
    if len(parts) == 1 and len(parts[0]) > 1:
        half = len(parts[0]) // 2
        parts = [parts[0][:half], parts[0][half:]]
    return parts[0::2], parts[1::2]


def spread(texts: Sequence[str], most: int = MOST, size: int = PASSAGE) -> list[str]:
    """Passages of about ``size`` bytes, at most ``most`` bytes of them, spread evenly over all texts."""
    from quickmerge.training.data.images import evenly

    passages = [part for text in texts for part in _cut(text, size, of_bytes=True) if part.strip()]
    return evenly(passages, max(1, most // size))


def _cut(text: str, size: int, *, of_bytes: bool = False) -> list[str]:
    """A text in passages of about ``size``, at the end of a line or a word where one is near; together all of it."""
    if of_bytes and text:
        size = max(1, round(size * len(text) / len(text.encode("utf-8", "surrogatepass"))))
    parts = []
    while len(text) > size + size // 2:
        found = next((at for mark in "\n " if (at := text.rfind(mark, size // 2, size)) >= 0), size - 1)
        end = found + 1
        parts.append(text[:end])
        text = text[end:]
    return [*parts, text] if text else parts
