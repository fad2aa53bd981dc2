"""A model with other rows: puts candidates into it and reads a text, so that `decide` can compare them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quickmerge.errors import QuickmergeError
from quickmerge.vocabulary.deciding import FALLBACK, TRUSTED, Choice, candidate_rules, decide, spread
from quickmerge.vocabulary.quality import Texts, score_texts
from quickmerge.vocabulary.rebuild import Made, Maker
from quickmerge.vocabulary.rows import Side, assemble, usual_bias

if TYPE_CHECKING:
    from torch import Tensor

    from quickmerge.vocabulary.pieces import Subword
    from quickmerge.vocabulary.rules import Rule

__all__ = ["Exchanged", "rebuild_by_text"]

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
