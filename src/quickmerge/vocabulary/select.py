"""Which rule to trust, by hiding shared tokens and rebuilding them.

The shared tokens are labelled data: both their donor row and their base row are known. Some are held out, each rule
rebuilds them from the others, and the results are compared with the true rows. Shared tokens are more frequent and more
English than new ones, so these scores flatter every rule; the split by kind of token shows by how much it matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.vocabulary.omp import omp_path
from quickmerge.vocabulary.pieces import Subword
from quickmerge.vocabulary.rules import LeastSquares, Mean, Nearest, Omp, Procrustes, Rule, Zero
from quickmerge.vocabulary.scoring import Score, Split
from quickmerge.vocabulary.spaces import aligned, at_least_float32, without_vector
from quickmerge.vocabulary.sparse import Sparse

__all__ = ["Choice", "Score", "candidates", "choose"]

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
