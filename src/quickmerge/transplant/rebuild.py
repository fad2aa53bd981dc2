"""New rows that stand out from the shared ones, and what to do about them.

The same weights mean different vectors in two spaces, so a donor's row can be made to be nothing in the donor and loud
in the base (arXiv 2601.00065). Donor files are input from outside: report rows whose length, or whose largest logit, is
beyond what shared rows have, and cut lengths to it if asked to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.transplant.choose_by_tokens import rules_of
from quickmerge.transplant.matching import Segmenter
from quickmerge.transplant.rows import Plan, Side
from quickmerge.transplant.rules import at_least_float32
from quickmerge.transplant.tokens import Vocabulary

if TYPE_CHECKING:
    from quickmerge.transplant.matching import Subword
    from quickmerge.transplant.rules import Rule

__all__ = [
    "LogitReport",
    "Made",
    "Maker",
    "NormReport",
    "check_clip",
    "clip_norms",
    "logit_report",
    "norm_report",
    "rebuild",
]


CHUNK = 8192
"""Rows multiplied with the hidden states at a time."""


@dataclass(frozen=True)
class NormReport:
    """Lengths of new rows beside those of shared ones.

    Attributes:
        low, median, high: of the shared rows' lengths; low and high at the quantiles asked for.
        new_median: of the new rows.
        long: ``(L,)`` long, places of new rows longer than high, the longest first.
        short: ``(S,)`` long, of those shorter than low, the shortest first.
        longest: the longest new row over the median shared one.
    """

    low: float
    median: float
    high: float
    new_median: float
    long: Tensor
    short: Tensor
    longest: float


@dataclass(frozen=True)
class LogitReport:
    """Logits of new rows beside those of shared ones, over given hidden states.

    Attributes:
        shared_mean, shared_spread: over shared rows and states, in logits.
        new_mean, new_spread: over new rows and states; a mean apart from the shared one is an offset that all new
            tokens have at every position.
        high: the largest logits of shared rows, one each over all states, at the quantile asked for.
        loud: ``(L,)`` long, places of new rows whose largest logit is above, the loudest first.
        loudest: the largest logit of a new row.
        share_won: at how many of the states, as a share, a new row has the largest logit of all.
    """

    shared_mean: float
    shared_spread: float
    new_mean: float
    new_spread: float
    high: float
    loud: Tensor
    loudest: float
    share_won: float


def norm_report(new: Tensor, shared: Tensor, *, quantile: float = 0.99) -> NormReport:
    """Lengths of ``new (T, d)`` beside those of ``shared (N, d)``, at ``quantile`` and 1 - ``quantile``.

    Raises:
        QuickmergeError: if the shapes don't fit or the quantile isn't between 0.5 and 1.
    """
    new, shared = _checked(new, shared, quantile)
    own, theirs = new.norm(dim=1), shared.norm(dim=1)
    low, median, high = (_quantile(theirs, q) for q in (1 - quantile, 0.5, quantile))
    order = own.argsort()
    return NormReport(
        low=low,
        median=median,
        high=high,
        new_median=_quantile(own, 0.5),
        long=order.flip(0)[own[order.flip(0)] > high],
        short=order[own[order] < low],
        longest=float(own.max()) / max(median, torch.finfo(own.dtype).tiny),
    )


def clip_norms(new: Tensor, shared: Tensor, *, quantile: float = 0.99) -> Tensor:
    """``new (T, d)`` with every row longer than the ``quantile`` of the lengths of ``shared (N, d)`` cut to that.

    Directions stay, and rows that are short enough stay bit for bit.

    Raises:
        QuickmergeError: as `norm_report`.
    """
    exact, shared = _checked(new, shared, quantile)
    high, own = _quantile(shared.norm(dim=1), quantile), exact.norm(dim=1, keepdim=True)
    return torch.where(own > high, (exact * (high / own.clamp_min(torch.finfo(own.dtype).tiny))).to(new.dtype), new)


def logit_report(hidden: Tensor, new: Tensor, shared: Tensor, *, quantile: float = 0.99) -> LogitReport:
    """Logits of ``new (T, d)`` and ``shared (N, d)`` output rows over ``hidden (M, d)`` final states of a probe text.

    Raises:
        QuickmergeError: as `norm_report`.
    """
    new, shared = _checked(new, shared, quantile)
    if hidden.ndim != 2 or hidden.shape[1] != new.shape[1] or not len(hidden):
        raise QuickmergeError(f"hidden must be (M, {new.shape[1]}), M at least 1, got {tuple(hidden.shape)}")
    hidden = hidden.detach().to(new.dtype)
    own, theirs = _logits(hidden, new), _logits(hidden, shared)
    high = _quantile(theirs.largest, quantile)
    order = own.largest.argsort(descending=True)
    return LogitReport(
        shared_mean=theirs.mean,
        shared_spread=theirs.spread,
        new_mean=own.mean,
        new_spread=own.spread,
        high=high,
        loud=order[own.largest[order] > high],
        loudest=float(own.largest.max()),
        share_won=float((own.winner > theirs.winner).double().mean()),
    )


@dataclass(frozen=True)
class _Logits:
    """Mean and spread over all, the largest of each row ``(T,)`` and of each state ``(M,)``."""

    mean: float
    spread: float
    largest: Tensor
    winner: Tensor


def _logits(hidden: Tensor, rows: Tensor) -> _Logits:
    largest, winner = [], torch.full((len(hidden),), -torch.inf, dtype=rows.dtype)
    total = squares = 0.0
    for part in torch.split(rows, CHUNK):
        logits = hidden @ part.T
        largest.append(logits.amax(0))
        winner = torch.maximum(winner, logits.amax(1))
        total += float(logits.double().sum())
        squares += float(logits.double().square().sum())
    count = len(hidden) * len(rows)
    mean = total / count
    return _Logits(mean, max(0.0, squares / count - mean**2) ** 0.5, torch.cat(largest), winner)


def _quantile(x: Tensor, q: float) -> float:
    # torch.quantile refuses more than 16 million; a vocabulary has fewer rows.
    return float(x.quantile(q))


def _checked(new: Tensor, shared: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    if new.ndim != 2 or shared.ndim != 2 or new.shape[1] != shared.shape[1] or not len(new) or not len(shared):
        shapes = f"{tuple(new.shape)} and {tuple(shared.shape)}"
        raise QuickmergeError(f"new and shared must be (T, d) and (N, d), T and N at least 1, got {shapes}")
    if not 0.5 <= quantile < 1:
        raise QuickmergeError(f"quantile must be at least 0.5 and below 1, got {quantile!r}")
    for name, x in (("new", new), ("shared", shared)):
        if not bool(torch.isfinite(x).all()):
            raise QuickmergeError(f"{name} must hold finite numbers, got infinite ones or NaN")
    dtype = torch.promote_types(at_least_float32(new).dtype, at_least_float32(shared).dtype)
    return new.detach().to(dtype), shared.detach().to(dtype)


# The rows that have to be approximated, for one matrix: a rule is chosen on tokens whose rows are known.


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

        from quickmerge.transplant.matching import Subword

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
        from quickmerge.transplant.matching import Subword

        by_vector, by_pieces = self._sources(rule, places)
        instead = 0 if isinstance(rule, Subword) else int(by_pieces.sum())
        return instead, int((~by_vector & ~by_pieces).sum())

    def _sources(self, rule: Rule | Subword, places: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which rows a rule makes as it does, and which are made of pieces; the others are the mean row."""
        from quickmerge.transplant.matching import Subword
        from quickmerge.transplant.rules import Mean, Zero

        whole = np.asarray([bool(self.pieces[place]) for place in places], bool)
        if isinstance(rule, Subword):
            return np.zeros(len(places), bool), whole
        if isinstance(rule, (Mean, Zero)) or self.vectors is None:
            return np.ones(len(places), bool), np.zeros(len(places), bool)
        given = _has_vector(self.vectors, self.plan.rebuilt[places])
        return given, whole & ~given

    def clipped(self, rows: Tensor, clip: float | None) -> Tensor:
        """The rows, scaled down to that quantile of the lengths of shared rows; None leaves them."""

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
    best on a text is another question: see `quickmerge.transplant.choose_by_text`.

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
    from quickmerge.transplant.choose_by_tokens import choose
    from quickmerge.transplant.rules import Mean

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
