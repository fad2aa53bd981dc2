"""Matching pursuit, the mean and zeros as rules; and what all rules have in common."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.transplant.matching_pursuit import combine, omp
from quickmerge.transplant.rules import LeastSquares, Mean, Nearest, Omp, Procrustes, Rule, SparseRule, Zero

RULES: list[Rule] = [
    Zero(), Mean(), Omp(4), Omp(4, selection="inner"), Omp(4, centre=False, selection="inner", correct_mean=False),
    Nearest(3), Nearest(3, "inverse_distance", metric="euclidean"), Nearest(3, centre=True),
    LeastSquares(), Procrustes(),
]  # fmt: skip


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def spaces(seed: int, new: int = 7, shared: int = 40, donor: int = 12, base: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, anchors and rows with means of their own."""
    mean = 3 * drawn(seed, donor)
    return drawn(seed + 1, new, donor) + mean, drawn(seed + 2, shared, donor) + mean, drawn(seed + 3, shared, base) + 2


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_every_rule(rule: Rule) -> None:
    targets, anchors, rows = spaces(0)
    out = rule.rebuild(targets, anchors, rows)
    assert out.shape == (7, 9)
    assert out.dtype == torch.float64
    # Each token alone, and in the precision that checkpoints have.
    torch.testing.assert_close(rule.rebuild(targets[3:4], anchors, rows), out[3:4])
    half = rule.rebuild(targets.bfloat16(), anchors.bfloat16(), rows.bfloat16())
    assert half.dtype == torch.float32
    assert rule.rebuild(targets[:0], anchors, rows).shape == (0, 9)
    # No rule depends on where the axes of the donor's space point, nor on the order of the shared tokens.
    turn = torch.linalg.qr(drawn(9, 12, 12)).Q
    order = torch.randperm(40, generator=generator(1))
    torch.testing.assert_close(rule.rebuild(targets @ turn, (anchors @ turn)[order], rows[order]), out)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_token_without_a_vector(rule: Rule) -> None:
    targets, anchors, rows = spaces(0)
    targets[2] = 0
    out = rule.rebuild(targets, anchors, rows)
    raw = isinstance(rule, Zero) or (isinstance(rule, Omp) and not rule.correct_mean)
    torch.testing.assert_close(out[2], torch.zeros_like(out[2]) if raw else rows.mean(0))
    kept = torch.arange(7) != 2
    torch.testing.assert_close(out[kept], rule.rebuild(targets[kept], anchors, rows))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_refuses_what_does_not_fit(rule: Rule) -> None:
    targets, anchors, rows = spaces(0)
    for bad in ((targets[:, 1:], anchors, rows), (targets, anchors, rows[1:]), (targets, anchors[:0], rows[:0])):
        with pytest.raises(QuickmergeError, match="must"):
            rule.rebuild(*bad)


def test_names_tell_rules_apart() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert [isinstance(rule, SparseRule) for rule in RULES] == [isinstance(rule, Omp | Nearest) for rule in RULES]


@prop(20)
@given(seed=seeds, k=st.integers(1, 6), selection=st.sampled_from(("unit", "inner")))
def test_centred_pursuit_by_its_formula(seed: int, k: int, selection: str) -> None:
    targets, anchors, rows = spaces(seed)
    got = Omp(k, selection=selection).rebuild(targets, anchors, rows)
    sparse = omp(targets - anchors.mean(0), anchors - anchors.mean(0), k, selection=selection)
    torch.testing.assert_close(got, rows.mean(0) + combine(sparse, rows - rows.mean(0)))


def test_raw_pursuit_is_the_papers() -> None:
    targets, anchors, rows = spaces(4)
    raw = Omp(5, centre=False, selection="inner", correct_mean=False)
    torch.testing.assert_close(raw.rebuild(targets, anchors, rows), combine(omp(targets, anchors, 5), rows))
    # The correction is exactly what the weights lack of the common mean.
    lacking = 1 - raw.coefficients(targets, anchors).total[:, None]
    more = Omp(5, centre=False, selection="inner").rebuild(targets, anchors, rows)
    torch.testing.assert_close(more - raw.rebuild(targets, anchors, rows), lacking * rows.mean(0))


def test_correction_keeps_the_common_mean() -> None:
    # A base whose rows share a large mean, and a donor that knows nothing of it.
    rows = drawn(0, 300, 16) + 5
    anchors, targets = drawn(1, 300, 24), drawn(2, 50, 24)
    offset = {}
    for correct in (True, False):
        got = Omp(8, centre=False, selection="inner", correct_mean=correct).rebuild(targets, anchors, rows)
        offset[correct] = float(((got - rows.mean(0)) @ rows.mean(0)).abs().mean() / rows.mean(0).square().sum())
    assert offset[True] < 0.15
    assert offset[False] > 0.5


def test_anchors_that_nobody_trained_are_never_used() -> None:
    targets, anchors, _ = spaces(6)
    anchors[10:20] = 0
    used = Omp(8).coefficients(targets, anchors).indices
    assert not ((used >= 10) & (used < 20)).any()


def test_what_the_settings_refuse() -> None:
    with pytest.raises(QuickmergeError, match="did you mean 'inner'"):
        Omp(4, selection="iner")
    with pytest.raises(ValueError, match="k must be"):
        Omp(0)
