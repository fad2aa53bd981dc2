"""Which rule for which kind of token, by what a text costs with their rows.

Held-out shared tokens don't foresee that. They are words that the base knows well, while new tokens are rare, or of
another script; and what a new row does to the others, by taking probability away from them, no cosine shows. So rows
are put into the model, and a text is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quickmerge.errors import QuickmergeError
from quickmerge.transplant.choose_by_tokens import PULLED
from quickmerge.transplant.matching import KINDS
from quickmerge.transplant.quality import Texts, score_texts
from quickmerge.transplant.rebuild import Made, Maker
from quickmerge.transplant.rows import Side, assemble, usual_bias

if TYPE_CHECKING:
    from torch import Tensor

    from quickmerge.transplant.matching import Subword
    from quickmerge.transplant.rules import Rule

__all__ = ["FALLBACK", "Decision", "Exchanged", "candidate_rules", "deal", "decide", "rebuild_by_text", "spread"]


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
    from quickmerge.transplant.matching import Subword
    from quickmerge.transplant.rules import Mean, Zero

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
    text has fewer than `ENOUGH` new tokens get their fallback, unless the text becomes more expensive by more than
    noise. Then the other kinds are gone through, those with the most new tokens first, and each takes the candidate
    with which the text costs the fewest bits while all others stay as they are.

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
    from quickmerge.sampling import evenly

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


# A model with other rows: puts candidates into it and reads a text, so that `decide` can compare them.


KEPT = 2 * 2**30
"""Bytes of candidates' rows that are kept from try to try."""


class Exchanged:
    """A causal language model with other matrices, until the block ends.

    Args:
        model: its input and output matrices may be one.

    Raises:
        QuickmergeError: its matrices can't be exchanged.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parts: dict[str, Any] = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
        if any(getattr(part, "weight", None) is None for part in self.parts.values()):
            raise QuickmergeError(f"model must have an input and an output matrix, got a {type(model).__name__}")
        self.tied = self.parts["input"].weight is self.parts["output"].weight

    def __enter__(self) -> Exchanged:
        self.kept = [(part, part.weight, getattr(part, "bias", None)) for part in self.parts.values()]
        # a table looks whether its row for padding is there, which another vocabulary may have elsewhere
        self.padding = getattr(self.parts["input"], "padding_idx", None)
        if self.padding is not None:
            self.parts["input"].padding_idx = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for part, weight, bias in self.kept:
            part.weight = weight
            if bias is not None:
                part.bias = bias
        if self.padding is not None:
            self.parts["input"].padding_idx = self.padding

    def put(self, matrices: Mapping[str, Tensor]) -> None:
        """Let the model read and predict with other matrices.

        Args:
            matrices: ``input (V, d)``; ``output (V, d)`` unless the two are one; ``bias (V,)`` if the model has one.
        """
        import torch

        for side, part in self.parts.items():
            if side == "output" and self.tied:
                part.weight = self.parts["input"].weight
            else:
                part.weight = torch.nn.Parameter(matrices[side].to(part.weight), requires_grad=False)
        if "bias" in matrices:
            part.bias = torch.nn.Parameter(matrices["bias"].to(part.bias), requires_grad=False)


def rebuild_by_text(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    makers: Mapping[Side, Maker],
    made: Mapping[Side, Made],
    *,
    bias: Tensor | None = None,
    clip: float | None = None,
    kinds: Mapping[int, str],
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[Side, Made]:
    """Make new rows again, by the rules with which a text costs the fewest bits.

    Args:
        model: the base; it is as before when this returns.
        tokenizer: the new one.
        texts: some passages of them are read.
        makers: for each matrix, all of one plan.
        made: what held-out tokens chose for each, with the ranking of its rules.
        bias: ``(V,)``, the base's, if it has one.
        clip: as for `transplant`.
        kinds: kind of text of each new id.
        progress: told what goes on.

    Returns:
        What takes the place of ``made``.

    Raises:
        QuickmergeError: the texts are too short to be scored.
    """
    rules = {side: candidate_rules(one.ranking) for side, one in made.items()}
    names = [name for name in next(iter(rules.values())) if all(name in own for own in rules.values())]
    plan = next(iter(makers.values())).plan
    kind = np.asarray([kinds.get(int(one), "") for one in plan.rebuilt])
    passages = spread(texts)
    rows_of = _Rows(makers, rules, kind)
    for side, one in made.items():
        if clip is None and "vectors" in names and one.rule == rules[side]["vectors"].name:
            rows_of.keep(side, "vectors", one.rows)  # these are made already
    same = {} if bias is None else {"bias": assemble(plan, bias, usual_bias(plan, bias), "bias")}
    with Exchanged(model) as exchanged:

        def score(choice: Choice) -> list[Texts]:
            put: dict[str, Tensor] = {
                side: assemble(plan, maker.matrix, maker.clipped(rows_of(side, choice), clip), side)
                for side, maker in makers.items()
            }
            exchanged.put({**put, **same})
            return [score_texts(model, tokenizer, [passage]) for passage in passages]

        told = None if progress is None else partial(progress, "deciding on the text")
        counts = _counts(tokenizer, passages, dict(zip(plan.rebuilt.tolist(), kind.tolist(), strict=True)))
        decision = decide(
            names, kind.tolist(), score, fallback=_fallback(set(kind.tolist()), rules, made), new_tokens=counts,
            progress=told,
        )  # fmt: skip
    out: dict[Side, Made] = {}
    for side, maker in makers.items():
        rows, clipped, norms = maker.finished(rows_of(side, decision.chosen), clip)
        lacking = [maker.lacking(rules[side][name], places) for name, places in rows_of.places(decision.chosen)]
        by_kind = {own: rules[side][name].name for own, name in decision.chosen.items()}
        out[side] = replace(
            made[side], rows=rows, clipped=clipped, norms=norms, rule=_in_words(by_kind),
            without_vector=sum(instead for instead, _ in lacking), mean_row=sum(nothing for _, nothing in lacking),
            decision={**decision.as_dict(), "rules": by_kind,
                      "candidates": {name: rules[side][name].name for name in names}},
        )  # fmt: skip
    return out


class _Rows:
    """Rows of each matrix for any choice; what a candidate makes is kept where memory allows, since it comes again."""

    def __init__(
        self, makers: Mapping[Side, Maker], rules: Mapping[Side, Mapping[str, Rule | Subword]], kind: NDArray[np.str_]
    ) -> None:
        self.makers, self.rules, self.kind = makers, rules, kind
        self.kept: dict[tuple[Side, str], Tensor] = {}
        self.left = KEPT

    def __call__(self, side: Side, choice: Choice) -> Tensor:
        """``(T, d)``, in the order of ``plan.rebuilt``."""
        import torch

        out: Tensor | None = None
        for name, places in self.places(choice):
            some = self._some(side, name, places)
            out = some.new_empty(len(self.kind), some.shape[1]) if out is None else out
            out[torch.from_numpy(places)] = some
        assert out is not None
        return out

    def places(self, choice: Choice) -> list[tuple[str, NDArray[np.int64]]]:
        """Candidates of a choice, and which tokens each makes."""
        taken = np.asarray([choice[kind] for kind in self.kind])
        return [(name, np.flatnonzero(taken == name)) for name in dict.fromkeys(choice.values())]

    def keep(self, side: Side, name: str, rows: Tensor) -> None:
        """Keep all rows of a candidate."""
        self.kept[side, name] = rows
        self.left -= rows.nbytes

    def _some(self, side: Side, name: str, places: NDArray[np.int64]) -> Tensor:
        import torch

        maker, rule = self.makers[side], self.rules[side][name]
        if (side, name) not in self.kept:
            size = len(self.kind) * maker.matrix.shape[1] * maker.matrix.element_size()
            # a rule that looks at vectors takes longest, and is asked for first
            if size > self.left and name != "vectors":
                return maker.rows(rule, places)
            self.keep(side, name, maker.rows(rule, maker.every))
        return self.kept[side, name][torch.from_numpy(places)]


def _fallback(
    kinds: Iterable[str], rules: Mapping[Side, Mapping[str, Rule | Subword]], made: Mapping[Side, Made]
) -> dict[str, str]:
    """What each kind gets that no text speaks for: vectors, where hidden tokens of that kind do, in every matrix."""
    found = dict.fromkeys(kinds, FALLBACK)
    if all("vectors" in own for own in rules.values()):
        told = [
            next(row["by_kind"] for row in made[side].table if row["rule"] == own["vectors"].name)
            for side, own in rules.items()
        ]
        found |= {kind: "vectors" for kind in found if all(one.get(kind, 0.0) >= TRUSTED for one in told)}
    return found


def _counts(tokenizer: Any, passages: Sequence[str], kinds: Mapping[int, str]) -> dict[str, int]:
    """How many new tokens of each kind the passages have."""
    found: Counter[str] = Counter()
    for passage in passages:
        found.update(kinds[one] for one in tokenizer(passage, add_special_tokens=False)["input_ids"] if one in kinds)
    return dict(found)


def _in_words(by_kind: Mapping[str, str]) -> str:
    """``"nearest k=64 softmax 10 for word start, digits; subword mean 0.75 for non-Latin"``."""
    if len(set(by_kind.values())) == 1:
        return next(iter(by_kind.values()))
    groups: dict[str, list[str]] = {}
    for kind, rule in by_kind.items():
        groups.setdefault(rule, []).append(kind or "others")
    return "; ".join(f"{rule} for {', '.join(kinds)}" for rule, kinds in groups.items())
