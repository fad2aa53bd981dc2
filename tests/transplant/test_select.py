"""The selector: what it measures, by loops; whom it prefers; and that nothing that is held out leaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from strategies import generator
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.transplant.choose_by_tokens import Choice, candidates, choose
from quickmerge.transplant.matching import Subword
from quickmerge.transplant.rules import LeastSquares, Mean, Nearest, Omp, Procrustes, Zero


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def linear_pair(noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """A donor and a base that one linear map connects, with a mean in both."""
    anchors = drawn(0, 200, 12) + 1
    return anchors, anchors @ drawn(1, 12, 10) + 2 + noise * drawn(2, 200, 10)


def by_name(choice: Choice) -> dict[str, dict[str, Any]]:
    return {row["rule"]: row for row in choice.rows()}


@dataclass
class Spy:
    """Keeps what it is given; returns the mean."""

    name: str = "spy"
    targets: Tensor | None = None
    anchors: Tensor | None = None
    rows: Tensor | None = None

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        self.targets, self.anchors, self.rows = targets, anchors, rows
        return rows.mean(0).expand(len(targets), -1)


def test_held_out_rows_are_never_anchors() -> None:
    anchors, rows = linear_pair()
    spy = Spy()
    choice = choose([spy], anchors, rows, held_out=60)
    assert spy.targets is not None
    assert spy.anchors is not None
    assert spy.rows is not None
    assert choice.held_out == len(spy.targets) == 60
    both = torch.cat([spy.targets, spy.anchors])
    assert torch.equal(both.unique(dim=0), anchors.unique(dim=0))  # every token once, on one side
    place = [int((anchors == a).all(1).nonzero()) for a in spy.anchors]
    assert torch.equal(rows[place], spy.rows)
    again = Spy()
    choose([again], anchors, rows, held_out=60)
    assert torch.equal(again.targets, spy.targets)  # type: ignore[arg-type]
    choose([again], anchors, rows, held_out=60, seed=1)
    assert not torch.equal(again.targets, spy.targets)  # type: ignore[arg-type]


def test_scores_by_loops() -> None:
    anchors, rows = linear_pair(0.5)
    kinds = ["word start" if i % 3 else "digits" for i in range(200)]
    spy = Spy()
    raw = Omp(4, centre=False, selection="inner", correct_mean=False)
    row = by_name(choose([spy, raw, Omp(6), Omp(3)], anchors, rows, held_out=50, kinds=kinds))
    assert spy.targets is not None
    assert spy.anchors is not None
    assert spy.rows is not None
    for rule in (raw, Omp(6), Omp(3)):  # also those whose pursuits continue one another
        sparse = rule.coefficients(spy.targets, spy.anchors)
        got, seen = rule.rebuild(spy.targets, spy.anchors, spy.rows).double(), row[rule.name]
        middle = spy.rows.double().mean(0)
        cosine, centred, error, offset, left, kind = [], [], [], [], [], []
        for i, t in enumerate(spy.targets):
            place = int((anchors == t).all(1).nonzero())
            true = rows[place].double()
            kind.append(kinds[place])
            cosine.append(float(got[i] @ true / got[i].norm() / true.norm()))
            a, b = got[i] - middle, true - middle
            centred.append(float(a @ b / a.norm() / b.norm()))
            error.append(float((got[i] - true).norm() / true.norm()))
            offset.append(float((got[i] - true) @ middle / middle.norm() / spy.rows.norm(dim=1).mean()))
            back = rule.combine(sparse, spy.anchors)[i]
            left.append(float((t - back).norm() / t.norm()))
        means = {"cosine": cosine, "centred_cosine": centred, "error": error, "offset": offset, "donor_residual": left}
        for name, values in means.items():
            assert seen[name] == pytest.approx(sum(values) / len(values), abs=1e-4), name
        assert seen["offset_spread"] == pytest.approx(float(torch.tensor(offset).std()), abs=1e-4)
        assert seen["weight_sum"] == pytest.approx(float(sparse.total.mean()), abs=1e-4)
        assert seen["weight_sum_spread"] == pytest.approx(float(sparse.total.std()), abs=1e-4)
        for name in ("digits", "word start"):
            own = [c for c, k in zip(centred, kind, strict=True) if k == name]
            assert seen["by_kind"][name] == pytest.approx(sum(own) / len(own), abs=1e-4)
    assert row["spy"]["donor_residual"] is None
    assert row["spy"]["weight_sum"] is None


def test_a_linear_world_needs_a_linear_map() -> None:
    anchors, rows = linear_pair()
    choice = choose(None, anchors, rows, held_out=60)
    assert isinstance(choice.highest, LeastSquares | Omp)
    table = by_name(choice)
    assert table[LeastSquares().name]["centred_cosine"] > 0.98
    assert table["mean"]["centred_cosine"] == pytest.approx(0, abs=1e-3)
    assert table[Nearest().name]["centred_cosine"] < 0.95
    assert [row["best"] for row in choice.rows()].count(True) == 1


def test_what_noise_decides_goes_to_the_simpler_rule() -> None:
    # Donor vectors that know nothing of the base: no rule is better than the mean.
    anchors, rows = drawn(0, 300, 8), drawn(1, 300, 8) + 1
    choice = choose(candidates(), anchors, rows, held_out=100)
    assert isinstance(choice.best, Mean)
    # Two settings of one rule that give the same: the one that is named first.
    anchors, rows = linear_pair()
    for pair in ([LeastSquares(0.0), LeastSquares(1e-9)], [LeastSquares(1e-9), LeastSquares(0.0)]):
        assert choose(pair, anchors, rows).best is pair[0]
    # What isn't noise does not.
    assert isinstance(choose([Mean(), LeastSquares()], anchors, rows).best, LeastSquares)


def test_a_rule_that_misses_the_common_mean_is_never_best() -> None:
    anchors, rows = linear_pair()
    rows = rows + 20

    @dataclass
    class Lacking:
        name: str = "lacking"

        def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
            return LeastSquares(0.0).rebuild(targets, anchors, rows) - 5

    choice = choose([Mean(), Lacking()], anchors, rows)
    assert by_name(choice)["lacking"]["offset"] < -0.1
    assert choice.best.name == "mean"


def test_pieces() -> None:
    # Rows that are the mean of their pieces' rows, in a base whose first 200 tokens are the shared ones.
    matrix = drawn(0, 260, 16)
    pieces = [[200 + i % 60, 200 + (7 * i + i // 60) % 60] for i in range(200)]
    matrix[:200] = torch.stack([matrix[p].mean(0) for p in pieces]) + 0.1 * drawn(1, 200, 16)
    anchors = drawn(2, 200, 8)
    choice = choose(None, anchors, matrix[:200], pieces=pieces, matrix=matrix)
    assert choice.best == Subword("mean")
    with pytest.raises(QuickmergeError, match="without the token itself, got the token for 100 of 100"):
        choose(None, anchors, matrix[:200], pieces=[[i] for i in range(200)], matrix=matrix)
    with pytest.raises(QuickmergeError, match="pieces must be given for a subword rule"):
        choose([Subword()], anchors, matrix[:200])
    with pytest.raises(QuickmergeError, match="given together, got only pieces"):
        choose([Subword()], anchors, matrix[:200], pieces=pieces)


def test_untrained_rows_are_not_held_out() -> None:
    anchors, rows = linear_pair()
    anchors[:50], rows[50:100] = 0, 0
    spy = Spy()
    assert choose([spy], anchors, rows).held_out == 50
    assert spy.targets is not None
    assert spy.targets.any(1).all()


def test_the_default_candidates() -> None:
    rules = candidates(pieces=True)
    assert len({rule.name for rule in rules}) == len(rules)
    assert {type(r) for r in rules} == {Zero, Mean, Subword, Nearest, LeastSquares, Procrustes, Omp}
    assert sum(isinstance(r, Omp) for r in rules) == 10
    assert all(getattr(r, "k", 1) <= 10 for r in candidates(most=10))
    seen: list[tuple[int, int]] = []
    choose(rules[:2], *linear_pair(), progress=lambda done, whole: seen.append((done, whole)))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": torch.ones(199, 4)}, "rows must be"),
        ({"rules": []}, "at least one rule"),
        ({"kinds": ["digits"]}, "kinds must be given for each of the 200 anchors, got 1"),
        ({"anchors": torch.zeros(200, 3)}, "at least 8 shared tokens"),
    ],
)
def test_what_it_refuses(change: dict[str, Any], words: str) -> None:
    given = {"rules": None, "anchors": torch.ones(200, 3), "rows": torch.ones(200, 4), **change}
    with pytest.raises(QuickmergeError, match=words):
        choose(given.pop("rules"), given.pop("anchors"), given.pop("rows"), **given)
