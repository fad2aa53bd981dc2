"""The rows that have to be approximated, for one matrix: a rule is chosen on tokens whose rows are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quickmerge.errors import QuickmergeError
from quickmerge.vocabulary.methods import rules_of
from quickmerge.vocabulary.plan import Plan
from quickmerge.vocabulary.rows import Side
from quickmerge.vocabulary.segments import Segmenter
from quickmerge.vocabulary.tokens import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from quickmerge.vocabulary.pieces import Subword
    from quickmerge.vocabulary.rules import Rule

__all__ = ["Made", "Maker", "check_clip", "rebuild"]

HELD_OUT = 512
"""Shared tokens that rules are compared on; a quarter of them where there are few."""
SHOWN = 10
"""Tokens that are named where many stand out."""
LEAST = 8
"""Fewest tokens that a comparison is worth making on."""


@dataclass(frozen=True)
class Made:
    """Approximated rows of one matrix, and how they came about."""

    rows: Tensor
    """``(T, d)`` in float32 or float64, in the order of ``plan.rebuilt``."""
    rule: str
    table: list[dict[str, Any]] = field(default_factory=list)
    """What each rule made of the held-out tokens, best first; empty where there were too few to compare on."""
    anchors: int = 0
    """Shared tokens that rows were made of."""
    held_out: int = 0
    without_vector: int = 0
    """Tokens that the donor has no vector for: they are made of their pieces."""
    mean_row: int = 0
    """Tokens that nothing could be made of: they got the mean row."""
    clipped: int = 0
    norms: dict[str, Any] | None = None
    """Norms of new rows beside those of shared rows."""
    ranking: tuple[Rule | Subword, ...] = ()
    """The rules that were compared, best first."""
    decision: dict[str, Any] | None = None
    """Which rule a text chose for which kind of token, and what it tried; None where no text was asked."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything but the rows and the rules themselves."""
        return {
            "rule": self.rule, "anchors": self.anchors, "held_out": self.held_out, "table": self.table,
            "without_vector": self.without_vector, "mean_row": self.mean_row, "clipped": self.clipped,
            "norms": self.norms, "decision": self.decision,
        }  # fmt: skip


def check_clip(clip: float | None) -> None:
    """Raise QuickmergeError unless ``clip`` is None or a quantile that can be taken."""
    number = isinstance(clip, (int, float)) and not isinstance(clip, bool)
    if clip is not None and not (number and math.isfinite(clip) and 0.5 <= clip < 1):
        raise QuickmergeError(f"clip must be a quantile of at least 0.5 and below 1, got {clip!r}")


class Maker:
    """Makes rows of ``plan.rebuilt`` by any rule, for one matrix.

    A rule from the donor's vectors leaves out tokens that it has no vector for (or one of zeros, which was never
    trained); those are made of their pieces, as the mean. What has no pieces either gets the mean row.

    Args:
        plan: which rows.
        theirs: the vocabulary that is wanted.
        base: ``(V, d)``, the base's matrix.
        vectors: ``(V', d')``, the donor's, a row for each new id; None where there are none.
        segmenter: cuts tokens into the base's.

    Attributes:
        pairs: ``(N, 2)``, the shared tokens that have rows (and vectors): new id, base id.
        shared: ``(N, d)``, their rows.
        anchors: ``(N, d')``, their vectors.

    Raises:
        QuickmergeError: no shared token has a vector.
    """

    def __init__(
        self, plan: Plan, theirs: Vocabulary, base: Tensor, vectors: Tensor | None, segmenter: Segmenter
    ) -> None:
        import torch

        self.matrix = base if base.dtype == torch.float64 else base.float()
        self.plan, self.theirs, self.vectors, self.segmenter = plan, theirs, vectors, segmenter
        pairs = plan.copied
        shared = self.matrix[torch.from_numpy(pairs[:, 1])]
        good = (torch.isfinite(shared).all(-1) & (shared.norm(dim=-1) > 0)).numpy()
        if vectors is not None:
            good &= _has_vector(vectors, pairs[:, 0])
        self.pairs, self.shared = pairs[good], shared[torch.from_numpy(good)]
        if not len(self.pairs):
            raise QuickmergeError("donor must have vectors for tokens that are shared with the base, got none")
        # rules that look at no vectors are compared all the same
        ids = torch.from_numpy(self.pairs[:, 0])
        self.anchors = torch.ones(len(ids), 1) if vectors is None else vectors[ids]

    @cached_property
    def pieces(self) -> list[tuple[int, ...]]:
        """What each new token is cut into."""
        return self.segmenter.cut_all(self.theirs.by_id[int(one)].data or b"" for one in self.plan.rebuilt)

    @property
    def every(self) -> NDArray[np.int64]:
        """The places of all tokens in ``plan.rebuilt``."""
        return np.arange(len(self.plan.rebuilt))

    def rows(self, rule: Rule | Subword, places: NDArray[np.int64]) -> Tensor:
        """Rows by a rule.

        Args:
            rule: any.
            places: of the tokens in ``plan.rebuilt``.

        Returns:
            ``(T, d)`` in float32 at least.
        """
        import torch

        from quickmerge.vocabulary.pieces import Subword

        by_vector, by_pieces = self._sources(rule, places)
        ids = self.plan.rebuilt[places]
        rows = self.shared.mean(0).repeat(len(places), 1)
        if by_pieces.any():
            of_pieces = rule if isinstance(rule, Subword) else Subword("mean")
            chosen = [self.pieces[place] for place in places[by_pieces]]
            rows[torch.from_numpy(by_pieces)] = of_pieces.rebuild(chosen, self.matrix)
        if by_vector.any():
            assert not isinstance(rule, Subword)
            wanted = torch.from_numpy(ids[by_vector])
            vectors = self.vectors
            targets = torch.ones(len(wanted), 1) if vectors is None else vectors[wanted.clamp_max(len(vectors) - 1)]
            rows[torch.from_numpy(by_vector)] = rule.rebuild(targets, self.anchors, self.shared).to(rows.dtype)
        return rows

    def lacking(self, rule: Rule | Subword, places: NDArray[np.int64]) -> tuple[int, int]:
        """How many of such rows are made of pieces for want of a vector, and how many are the mean row."""
        from quickmerge.vocabulary.pieces import Subword

        by_vector, by_pieces = self._sources(rule, places)
        instead = 0 if isinstance(rule, Subword) else int(by_pieces.sum())
        return instead, int((~by_vector & ~by_pieces).sum())

    def _sources(self, rule: Rule | Subword, places: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which rows a rule makes as it does, and which are made of pieces; the others are the mean row."""
        from quickmerge.vocabulary.pieces import Subword
        from quickmerge.vocabulary.rules import Mean, Zero

        whole = np.asarray([bool(self.pieces[place]) for place in places], bool)
        if isinstance(rule, Subword):
            return np.zeros(len(places), bool), whole
        if isinstance(rule, (Mean, Zero)) or self.vectors is None:
            return np.ones(len(places), bool), np.zeros(len(places), bool)
        given = _has_vector(self.vectors, self.plan.rebuilt[places])
        return given, whole & ~given

    def clipped(self, rows: Tensor, clip: float | None) -> Tensor:
        """The rows, scaled down to that quantile of the lengths of shared rows; None leaves them."""
        from quickmerge.vocabulary.outliers import clip_norms

        return rows if clip is None else clip_norms(rows, self.shared, quantile=clip)

    def finished(self, rows: Tensor, clip: float | None) -> tuple[Tensor, int, dict[str, Any]]:
        """The rows clipped, how many that changed, and their lengths beside those of shared rows."""
        after = self.clipped(rows, clip)
        return after, int((after != rows).any(-1).sum()), _norms(after, self.shared, self.plan, self.theirs)


def rebuild(
    maker: Maker,
    side: Side,
    *,
    method: str,
    k: int | None = None,
    clip: float | None = None,
    seed: int = 0,
    kinds: Mapping[int, str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Made:
    """Approximate the rows of ``plan.rebuilt`` by one rule.

    Where several rules compete, they rebuild shared tokens that they are not shown, and the best one is taken. What is
    best on a text is another question: see `quickmerge.vocabulary.deciding`.

    Args:
        maker: of one matrix.
        side: ``"input"`` or ``"output"``, for what is told.
        method: one of ``METHODS``.
        k: as for `transplant`.
        clip: as for `transplant`.
        seed: draws the held-out tokens.
        kinds: the kind of text of each new id, for the table.
        progress: told what goes on.

    Raises:
        QuickmergeError: there are fewer shared tokens than ``k``.
    """
    from quickmerge.vocabulary.rules import Mean
    from quickmerge.vocabulary.select import choose

    pairs = maker.pairs
    held = min(HELD_OUT, len(pairs) // 4)
    rules = rules_of(method, k=k, anchors=len(pairs) - held, vectors=maker.vectors is not None)
    best, table, ranking = rules[0], list[dict[str, Any]](), tuple(rules)
    if held >= LEAST:
        by_id, cut = maker.theirs.by_id, maker.segmenter.without_tokenizer
        spelled = [cut(by_id[int(one)].data or b"", whole=False) for one in pairs[:, 0]]
        told = None if progress is None else partial(progress, f"comparing rules, {side} matrix")
        choice = choose(
            rules if len(rules) > 1 or isinstance(best, Mean) else [*rules, Mean()], maker.anchors, maker.shared,
            pieces=spelled, matrix=maker.matrix, held_out=held, seed=seed,
            kinds=None if kinds is None else [kinds.get(int(one), "") for one in pairs[:, 0]], progress=told,
        )  # fmt: skip
        best = choice.best if len(rules) > 1 else best
        ranking = choice.ranking
        table = sorted(choice.rows(), key=lambda row: -row["centred_cosine"])
        for row in table:
            row["best"] = row["rule"] == best.name
    elif len(rules) > 1:
        raise QuickmergeError(
            f"method {method} compares rules on shared tokens and needs {4 * LEAST} of them, got {len(pairs)}: "
            "name a method with one rule, such as subword-mean"
        )
    if progress is not None:
        progress(f"making rows, {side} matrix", 0, 1)
    rows, clipped, norms = maker.finished(maker.rows(best, maker.every), clip)
    if progress is not None:
        progress(f"making rows, {side} matrix", 1, 1)
    return Made(rows, best.name, table, len(pairs), held, *maker.lacking(best, maker.every), clipped, norms, ranking)


def _norms(rows: Tensor, shared: Tensor, plan: Plan, theirs: Vocabulary) -> dict[str, Any]:
    """Lengths of new rows beside those of shared ones, with the tokens that stand out most."""
    from quickmerge.vocabulary.outliers import norm_report

    found = norm_report(rows, shared)
    named = [theirs.by_id[int(plan.rebuilt[place])].text for place in found.long[:SHOWN].tolist()]
    return {
        "low": found.low, "median": found.median, "high": found.high, "new_median": found.new_median,
        "longest": found.longest, "long": len(found.long), "short": len(found.short), "longest_tokens": named,
    }  # fmt: skip


def _has_vector(vectors: Tensor, ids: Any) -> Any:
    import torch

    inside = ids < len(vectors)
    rows = vectors[torch.from_numpy(np.where(inside, ids, 0))]
    return inside & (rows.norm(dim=-1) > 0).numpy()
