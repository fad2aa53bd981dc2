"""How well a rule rebuilds tokens whose base rows are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.transplant.matching import Subword
from quickmerge.transplant.matching_pursuit import Sparse, omp_path
from quickmerge.transplant.rules import (
    LeastSquares,
    Mean,
    Nearest,
    Omp,
    Procrustes,
    Rule,
    SparseRule,
    Zero,
    aligned,
    at_least_float32,
    without_vector,
)

__all__ = ["METHODS", "NEEDS_VECTORS", "Choice", "Score", "Split", "candidates", "check_method", "choose", "rules_of"]


OWN_ROW = 0.1
"""Held-out tokens, as a share, whose single piece may have the same row: some rows of a base were never trained."""


@dataclass(frozen=True)
class Score:
    """How well a rule rebuilds the held-out tokens; means over them.

    Attributes:
        rule: the rule.
        cosine: to the true rows.
        centred_cosine: the same after subtracting the mean of the anchors' rows from both.
        error: ||row - true|| / ||true||.
        offset: (row - true) along the direction of the mean row, as a share of the mean length of a row; its product
            with a hidden state is what all logits of such rows are off by.
        offset_spread: the standard deviation of that.
        donor_residual: what the weighted sum leaves of the donor vector, relative to it; None for a rule without
            weights.
        weight_sum, weight_sum_spread: mean and standard deviation of the sum of a token's weights, or None.
        by_kind: centred cosine for each kind of token.
    """

    rule: Rule | Subword
    cosine: float
    centred_cosine: float
    error: float
    offset: float
    offset_spread: float
    donor_residual: float | None
    weight_sum: float | None
    weight_sum_spread: float | None
    by_kind: Mapping[str, float]


@dataclass
class Split:
    """The held-out tokens and the others.

    Attributes:
        targets, true: ``(T, dd)`` and ``(T, db)``, the held-out ones in the donor's and the base's space.
        anchors, rows: ``(N, dd)`` and ``(N, db)``, the others.
        matrix: ``(V, db)``, all rows of the base, where rules may look at pieces.
        pieces: of each held-out token.
    """

    targets: Tensor
    anchors: Tensor
    rows: Tensor
    true: Tensor
    matrix: Tensor | None
    pieces: list[Sequence[int]] | None

    def refuse_own_rows(self) -> None:
        """Raise QuickmergeError if the pieces of the held-out tokens are those tokens."""
        assert self.pieces is not None and self.matrix is not None
        alone = [i for i, p in enumerate(self.pieces) if len(p) == 1]
        near = at_least_float32(self.matrix)[[self.pieces[i][0] for i in alone]]
        same = int((near == self.true[alone]).all(1).sum()) if alone else 0
        if same > OWN_ROW * len(self.pieces):
            raise QuickmergeError(
                f"pieces must be what a token's text is cut into without the token itself, got the token for {same} of "
                f"{len(self.pieces)} held-out ones"
            )

    def score(self, rule: Rule | Subword, ready: Sparse | None, members: dict[str, Tensor]) -> tuple[Score, Tensor]:
        """The score, and the centred cosine of each token ``(T,)``."""
        sums: Tensor | None = None
        residual: float | None = None
        if isinstance(rule, Subword):
            assert self.pieces is not None and self.matrix is not None
            got = rule.rebuild(self.pieces, self.matrix)
        elif isinstance(rule, SparseRule):
            sparse = rule.coefficients(self.targets, self.anchors) if ready is None else ready
            got, sums = rule.combine(sparse, self.rows), sparse.total
            left = self.targets - rule.combine(sparse, self.anchors)
            residual = float((left.norm(dim=1) / self.targets.norm(dim=1)).mean())
        else:
            got = rule.rebuild(self.targets, self.anchors, self.rows)
        middle = self.rows.mean(0)
        off = got - self.true
        centred = cosine_similarity(got - middle, self.true - middle, dim=1)
        along = off @ middle / middle.norm().clamp_min(torch.finfo(off.dtype).tiny) / self.rows.norm(dim=1).mean()
        score = Score(
            rule=rule,
            cosine=float(cosine_similarity(got, self.true, dim=1).mean()),
            centred_cosine=float(centred.mean()),
            error=float((off.norm(dim=1) / self.true.norm(dim=1)).mean()),
            offset=float(along.mean()),
            offset_spread=float(along.std()),
            donor_residual=residual,
            weight_sum=None if sums is None else float(sums.mean()),
            weight_sum_spread=None if sums is None else float(sums.std()),
            by_kind={kind: float(centred[own].mean()) for kind, own in members.items()},
        )
        return score, centred


# Which rule to trust, by hiding shared tokens and rebuilding them.
#
# The shared tokens are labelled data: both their donor row and their base row are known. Some are held out, each rule
# rebuilds them from the others, and the results are compared with the true rows. Shared tokens are more frequent and
# more English than new ones, so these scores flatter every rule; the split by kind of token shows by how much it
# matters.


DRAWS = 1000
"""Bootstrap draws."""
STRAY = 0.1
"""A rule whose rows are off along the common mean by more than this share of a row's length is never the best."""


@dataclass(frozen=True)
class Choice:
    """The scores of all rules, and which to take.

    Attributes:
        scores: as the rules were given.
        best: the first rule, as they were given, that the held-out tokens can't tell from the one with the highest
            score.
        highest: the rule with the highest score.
        held_out: how many tokens were.
        kinds: how many of them were of each kind.
    """

    scores: tuple[Score, ...]
    best: Rule | Subword
    highest: Rule | Subword
    held_out: int
    kinds: Mapping[str, int]

    @property
    def ranking(self) -> tuple[Rule | Subword, ...]:
        """The rules from the highest score down, without those that miss the common mean."""
        sound = [score for score in self.scores if abs(score.offset) <= STRAY]
        return tuple(score.rule for score in sorted(sound, key=lambda score: -score.centred_cosine))

    def rows(self) -> list[dict[str, Any]]:
        """A table, one row a rule: what a report prints and JSON holds."""
        out = []
        for score in self.scores:
            row = {key: value for key, value in vars(score).items() if key not in ("rule", "by_kind")}
            out.append(
                {"rule": score.rule.name, "best": score.rule is self.best, **row, "by_kind": dict(score.by_kind)}
            )
        return out


def candidates(*, pieces: bool = False, most: int | None = None) -> list[Rule | Subword]:
    """The rules worth comparing, the simpler ones first.

    Args:
        pieces: whether rules that look at pieces can be used.
        most: how many anchors there will be; rules that ask for more are left out.
    """
    rules: list[Rule | Subword] = [Zero(), Mean()]
    if pieces:
        rules += [Subword(weights) for weights in ("mean", "first", "last", "decay")]
    rules += [Nearest(k, "softmax", temperature) for k in (16, 64) for temperature in (5.0, 10.0, 20.0)]
    rules += [Nearest(16, "inverse_distance", metric=metric) for metric in ("cosine", "euclidean")]
    rules += [LeastSquares(), Procrustes()]
    rules += [Omp(k, selection=selection) for k in (4, 8, 16, 32, 64) for selection in ("unit", "inner")]
    return [rule for rule in rules if most is None or getattr(rule, "k", 1) <= most]


def choose(
    rules: Sequence[Rule | Subword] | None,
    anchors: Tensor,
    rows: Tensor,
    *,
    pieces: Sequence[Sequence[int]] | None = None,
    matrix: Tensor | None = None,
    held_out: int = 512,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Choice:
    """Compare rules on held-out shared tokens.

    The score is the centred cosine. Rows of a base share a large mean that every rule gets nearly right, so plain
    cosines are high and alike; and the relative error punishes long rows more than wrong directions, so that it
    prefers short rows, near the mean. What either catches and the score does not, a row that misses the common mean,
    shows in `Score.offset`, which rules a rule out. The intervals are of a paired bootstrap over tokens, at 95 %.

    Args:
        rules: the simpler ones first. Default: `candidates`.
        anchors: ``(N, dd)``, the shared tokens in the donor's space.
        rows: ``(N, db)``, in the base's.
        pieces: for each shared token the base tokens that its text is cut into *without itself* (see `cut`).
        matrix: ``(V, db)``, all rows of the base; needed with `pieces`.
        held_out: how many tokens are held out; at most half of those that have rows in both spaces.
        seed: of the draws.
        kinds: what kind of token each anchor is.
        progress: called with the rules done and the number of rules.

    Raises:
        QuickmergeError: if the inputs don't fit one another, too few tokens are shared, a rule needs pieces and there
            are none, or the pieces of a token are the token itself.
        ValueError: if `held_out` is no whole number of at least 2.
    """
    anchors, _ = aligned(anchors, anchors, rows)
    rows = at_least_float32(rows)
    held_out = whole_number("held_out", held_out, 2)
    if rules is not None and not rules:
        raise QuickmergeError("rules must hold at least one rule, got none")
    for name, given in (("pieces", pieces), ("kinds", kinds)):
        if given is not None and len(given) != len(anchors):
            raise QuickmergeError(f"{name} must be given for each of the {len(anchors)} anchors, got {len(given)}")
    if (pieces is None) != (matrix is None):
        raise QuickmergeError(
            f"pieces and matrix must be given together, got only {'matrix' if pieces is None else 'pieces'}"
        )

    able = (~without_vector(anchors) & ~without_vector(rows)).nonzero().flatten()
    if len(able) < 8:
        raise QuickmergeError(
            f"at least 8 shared tokens must have rows other than zero to compare rules, got {len(able)}"
        )
    draws = torch.Generator().manual_seed(seed)
    hidden = able[torch.randperm(len(able), generator=draws)[: min(held_out, len(able) // 2)]].sort().values
    seen = torch.ones(len(anchors), dtype=torch.bool)
    seen[hidden] = False
    if rules is None:
        rules = candidates(pieces=pieces is not None, most=int(seen.sum()))
    split = Split(anchors[hidden], anchors[seen], rows[seen], rows[hidden], matrix, None)
    if pieces is not None:
        split.pieces = [pieces[i] for i in hidden.tolist()]
    elif any(isinstance(rule, Subword) for rule in rules):
        raise QuickmergeError("pieces must be given for a subword rule, got None")
    if any(isinstance(rule, Subword) for rule in rules):
        split.refuse_own_rows()

    kind = [kinds[i] for i in hidden.tolist()] if kinds is not None else []
    members = {k: torch.tensor([other == k for other in kind]) for k in sorted(set(kind))}
    ready = _pursuits(rules, split)
    scores, per_token = [], []
    for index, rule in enumerate(rules):
        score, centred = split.score(rule, ready.get(index), members)
        scores.append(score)
        per_token.append(centred)
        if progress is not None:
            progress(index + 1, len(rules))
    highest, first = _decide(scores, torch.stack(per_token), draws)
    return Choice(
        tuple(scores), rules[first], rules[highest], len(hidden), {k: int(m.sum()) for k, m in members.items()}
    )


def _pursuits(rules: Sequence[Rule | Subword], split: Split) -> dict[int, Sparse]:
    """The coefficients of all `Omp` rules, by place: those that differ in k alone continue one another."""
    families: dict[tuple[bool, str], list[int]] = {}
    for index, rule in enumerate(rules):
        if isinstance(rule, Omp):
            families.setdefault((rule.centre, rule.selection), []).append(index)
    out: dict[int, Sparse] = {}
    for (_, selection), places in families.items():
        of = {index: rule for index in places if isinstance(rule := rules[index], Omp)}
        targets, atoms = of[places[0]].spaces(split.targets, split.anchors)
        ks = {index: min(rule.k, len(atoms)) for index, rule in of.items()}
        path = omp_path(targets, atoms, sorted(set(ks.values())), selection=selection)
        out.update({index: path[k] for index, k in ks.items()})
    return out


def _decide(scores: list[Score], centred: Tensor, draws: torch.Generator) -> tuple[int, int]:
    """The places of the highest score, and of the first rule that can't be told from it."""
    sound = [i for i, s in enumerate(scores) if abs(s.offset) <= STRAY] or list(range(len(scores)))
    highest = max(sound, key=lambda i: scores[i].centred_cosine)
    count = centred.shape[1]
    drawn = torch.randint(count, (DRAWS, count), generator=draws)
    share = torch.zeros(DRAWS, count, dtype=centred.dtype).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=centred.dtype)
    )
    lead = share @ (centred[highest] - centred).T / count
    first = next(i for i in sound if float(lead[:, i].quantile(0.025)) <= 0)
    return highest, first


# The methods by name: which rules each of them lets compete.


METHODS = {
    "auto": "for each kind of token what a text costs the fewest bits with, of the best of all rules",
    "omp": "orthogonal matching pursuit, centred; k chosen on held-out tokens unless it is given",
    "omp-raw": "orthogonal matching pursuit as published, k 64: not centred, no correction of the mean",
    "nearest": "the nearest shared tokens of the donor; how many and how weighted is chosen on held-out tokens",
    "least-squares": "one linear map from the donor's vectors to the base's",
    "procrustes": "one rotation between the principal axes of both",
    "subword-first": "the base's row of the first of a token's pieces",
    "subword-last": "the base's row of the last piece",
    "subword-mean": "the mean of the pieces' rows",
    "subword-decay": "the pieces' rows with weights that halve from piece to piece",
    "subword-pulled": "three quarters of the way from the mean of all rows to the mean of the pieces' rows",
    "mean": "the mean of the shared rows",
    "zero": "zeros",
}
"""Their names, and what each does."""
NEEDS_VECTORS = ("omp", "omp-raw", "nearest", "least-squares", "procrustes")
RAW_K = 64
PULLED = 0.75


def check_method(method: str, k: int | None, *, vectors: bool) -> None:
    """See that a method can be used as asked.

    Raises:
        QuickmergeError: there is none of this name, it takes no k, or it needs vectors and there are none.
    """
    if method not in METHODS:
        raise QuickmergeError(
            f"method is {method!r}{near_match(method, METHODS)}, but must be one of: {', '.join(METHODS)}"
        )
    if k is not None:
        try:
            k = whole_number("k", k)
        except ValueError as error:
            raise QuickmergeError(str(error)) from None
        if method not in ("auto", "omp", "omp-raw", "nearest"):
            raise QuickmergeError(f"k belongs to auto, omp, omp-raw and nearest, got k={k} with {method}")
    if method in NEEDS_VECTORS and not vectors:
        free = [name for name in METHODS if name not in NEEDS_VECTORS]
        raise QuickmergeError(
            f"method {method} needs vectors of the new tokens: give donor, or text to make vectors from, "
            f"or one of: {', '.join(free)}"
        )


def rules_of(method: str, *, k: int | None, anchors: int, vectors: bool) -> list[Rule | Subword]:
    """The rules that a method lets compete for one matrix, the simpler ones first.

    Args:
        method: one of ``METHODS``.
        k: how many shared tokens a row is made of; None for the usual ones.
        anchors: how many shared tokens there are to make rows of, the held-out ones not counted.
        vectors: whether the donor has vectors.

    Raises:
        QuickmergeError: there are fewer anchors than ``k``.
    """
    from quickmerge.transplant.matching import Subword
    from quickmerge.transplant.rules import LeastSquares, Mean, Nearest, Omp, Procrustes, Zero

    if k is not None and vectors and k > anchors:
        raise QuickmergeError(f"k must be at most {anchors}, the shared tokens that rows can be made of, got {k}")
    if method == "subword-pulled":
        return [Subword("mean", PULLED)]
    if method.startswith("subword-"):
        return [Subword(method.removeprefix("subword-"))]
    if method == "omp-raw":
        return [Omp(k or min(RAW_K, anchors), centre=False, selection="inner", correct_mean=False)]
    every = candidates(pieces=True, most=anchors)
    if k is not None:
        wide = {_with_k(rule, k): None for rule in every}  # some differ in nothing but k
        every = list(wide)
    if method == "auto":
        return [rule for rule in every if vectors or isinstance(rule, (Zero, Mean, Subword))]
    kind = {
        "omp": Omp, "nearest": Nearest, "least-squares": LeastSquares, "procrustes": Procrustes, "mean": Mean,
        "zero": Zero,
    }[method]  # fmt: skip
    found = [rule for rule in every if isinstance(rule, kind)]
    if not found:  # fewer anchors than the smallest of the usual ks
        raise QuickmergeError(
            f"method {method} needs more shared tokens to make rows of than {anchors}: give a smaller k"
        )
    return found


def _with_k(rule: Rule | Subword, k: int) -> Rule | Subword:
    from quickmerge.transplant.rules import Nearest, Omp

    return replace(rule, k=k) if isinstance(rule, (Omp, Nearest)) else rule
