"""The rows that have to be approximated, for one matrix: a rule is chosen on tokens whose rows are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from quickmerge.errors import QuickmergeError
from quickmerge.vocabulary.methods import rules_of
from quickmerge.vocabulary.plan import Plan
from quickmerge.vocabulary.rows import Side
from quickmerge.vocabulary.segments import Segmenter
from quickmerge.vocabulary.tokens import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Made", "check_clip", "rebuild"]

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

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything but the rows."""
        return {
            "rule": self.rule, "anchors": self.anchors, "held_out": self.held_out, "table": self.table,
            "without_vector": self.without_vector, "mean_row": self.mean_row, "clipped": self.clipped,
            "norms": self.norms,
        }  # fmt: skip


def check_clip(clip: float | None) -> None:
    """Raise QuickmergeError unless ``clip`` is None or a quantile that can be taken."""
    number = isinstance(clip, (int, float)) and not isinstance(clip, bool)
    if clip is not None and not (number and math.isfinite(clip) and 0.5 <= clip < 1):
        raise QuickmergeError(f"clip must be a quantile of at least 0.5 and below 1, got {clip!r}")


def rebuild(
    plan: Plan,
    theirs: Vocabulary,
    ours: Vocabulary,
    base: Tensor,
    vectors: Tensor | None,
    segmenter: Segmenter,
    side: Side,
    *,
    method: str,
    k: int | None = None,
    clip: float | None = None,
    seed: int = 0,
    kinds: Mapping[int, str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Made:
    """Approximate the rows of ``plan.rebuilt``.

    Where several rules compete, they rebuild shared tokens that they are not shown, and the best one is taken. A rule
    from the donor's vectors leaves out tokens that it has no vector for (or one of zeros, which was never trained);
    those are made of their pieces, as the mean. What has no pieces either gets the mean row.

    Args:
        plan: which rows.
        theirs: the vocabulary that is wanted.
        ours: the base's.
        base: ``(V, d)``, the base's matrix.
        vectors: ``(V', d')``, the donor's, a row for each new id; None where there are none.
        segmenter: cuts tokens into the base's.
        side: ``"input"`` or ``"output"``.
        method: one of ``METHODS``.
        k: as for `transplant`.
        clip: as for `transplant`.
        seed: draws the held-out tokens.
        kinds: the kind of text of each new id, for the table.
        progress: told what goes on.

    Raises:
        QuickmergeError: there are fewer shared tokens than ``k``, or none with a vector.
    """
    import torch

    matrix = base if base.dtype == torch.float64 else base.float()
    if not len(plan.rebuilt):
        return Made(matrix[:0], "none needed")
    from quickmerge.vocabulary.outliers import clip_norms
    from quickmerge.vocabulary.pieces import Subword
    from quickmerge.vocabulary.rules import Mean, Zero
    from quickmerge.vocabulary.select import choose

    pairs = plan.copied
    shared = matrix[torch.from_numpy(pairs[:, 1])]
    good = (torch.isfinite(shared).all(-1) & (shared.norm(dim=-1) > 0)).numpy()
    if vectors is not None:
        good &= _has_vector(vectors, pairs[:, 0])
    pairs, shared = pairs[good], shared[torch.from_numpy(good)]
    if not len(pairs):
        raise QuickmergeError("donor must have vectors for tokens that are shared with the base, got none")
    held = min(HELD_OUT, len(pairs) // 4)
    rules = rules_of(method, k=k, anchors=len(pairs) - held, vectors=vectors is not None)
    # rules that look at no vectors are compared all the same
    anchors = torch.ones(len(pairs), 1) if vectors is None else vectors[torch.from_numpy(pairs[:, 0])]
    best, table = rules[0], list[dict[str, Any]]()
    if held >= LEAST:
        spelled = [segmenter.without_tokenizer(theirs.by_id[int(one)].data or b"", whole=False) for one in pairs[:, 0]]
        told = None if progress is None else partial(progress, f"comparing rules, {side} matrix")
        choice = choose(
            rules if len(rules) > 1 or isinstance(best, Mean) else [*rules, Mean()], anchors, shared, pieces=spelled,
            matrix=matrix, held_out=held, seed=seed,
            kinds=None if kinds is None else [kinds.get(int(one), "") for one in pairs[:, 0]], progress=told,
        )  # fmt: skip
        best = choice.best if len(rules) > 1 else best
        table = sorted(choice.rows(), key=lambda row: -row["centred_cosine"])
        for row in table:
            row["best"] = row["rule"] == best.name
    elif len(rules) > 1:
        raise QuickmergeError(
            f"method {method} compares rules on shared tokens and needs {4 * LEAST} of them, got {len(pairs)}: "
            "name a method with one rule, such as subword-mean"
        )
    pieces = segmenter.cut_all(theirs.by_id[int(one)].data or b"" for one in plan.rebuilt)
    whole = np.asarray([bool(one) for one in pieces])
    given = np.ones(len(pieces), bool)
    if not isinstance(best, (Subword, Mean, Zero)) and vectors is not None:
        given = _has_vector(vectors, plan.rebuilt)
    by_pieces = whole if isinstance(best, Subword) else whole & ~given
    by_vector = given & (not isinstance(best, Subword))
    if progress is not None:
        progress(f"making rows, {side} matrix", 0, 1)
    rows = shared.mean(0).repeat(len(pieces), 1)
    if by_pieces.any():
        rule = best if isinstance(best, Subword) else Subword("mean")
        chosen = [one for one, taken in zip(pieces, by_pieces, strict=True) if taken]
        rows[torch.from_numpy(by_pieces)] = rule.rebuild(chosen, matrix)
    if by_vector.any():
        assert not isinstance(best, Subword)
        ids = torch.from_numpy(plan.rebuilt[by_vector])
        targets = torch.ones(len(ids), 1) if vectors is None else vectors[ids.clamp_max(len(vectors) - 1)]
        rows[torch.from_numpy(by_vector)] = best.rebuild(targets, anchors, shared).to(rows.dtype)
    clipped = 0
    if clip is not None:
        before, rows = rows, clip_norms(rows, shared, quantile=clip)
        clipped = int((rows != before).any(-1).sum())
    if progress is not None:
        progress(f"making rows, {side} matrix", 1, 1)
    return Made(
        rows, best.name, table, len(pairs), held, int((whole & ~given).sum()), int((~by_vector & ~by_pieces).sum()),
        clipped, _norms(rows, shared, plan, theirs),
    )  # fmt: skip


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
