"""Learning what to keep: noise, soft choice, straight-through gradients."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds, views

from quickmerge.merge.prior.network import SaliencyHead, gumbel, noisy_select, soft_top_k, straight_through
from quickmerge.merge.tokens import TokenView
from quickmerge.merge.tokens.budget import select


def test_gumbel_has_its_moments() -> None:
    torch.manual_seed(0)
    g = gumbel(torch.zeros(200_000, dtype=torch.float64))
    assert abs(float(g.mean()) - 0.57722) < 0.01 and abs(float(g.var()) - math.pi**2 / 6) < 0.03


def test_draws_follow_plackett_luce() -> None:
    """At temperature 1 the first choice has the odds of a softmax, the second those of the rest."""
    torch.manual_seed(0)
    score = torch.tensor([0.0, 1.0, -0.5, 0.7], dtype=torch.float64)
    rows = 40_000
    view = TokenView(hidden=torch.zeros(rows, 4, 1))
    anchor, _ = noisy_select(score.expand(rows, -1), torch.full((rows,), 2), view, torch.zeros(rows, 4).bool(), 1.0)
    odds = score.exp()
    want = torch.zeros(4, dtype=torch.float64)
    for a, b in itertools.permutations(range(4), 2):
        p = odds[a] / odds.sum() * odds[b] / (odds.sum() - odds[a])
        want[a] += p
        want[b] += p
    torch.testing.assert_close(anchor.double().mean(0), want, atol=0.01, rtol=0)


@given(view=views(dtypes=(torch.float32,)), seed=seeds, data=st.data())
@prop(40)
def test_exactly_the_budget_is_kept_and_noise_off_is_plain_choice(
    view: TokenView, seed: int, data: st.DataObject
) -> None:
    draws = generator(seed)
    score = torch.randn(view.valid.shape, generator=draws)
    low = (view.protected & view.valid).sum(-1).clamp_min(1)
    count = torch.minimum(low + data.draw(st.integers(0, 10)), view.valid.sum(-1))
    fixed = torch.zeros_like(view.valid)
    torch.manual_seed(seed)
    noisy, gate = noisy_select(score, count, view, fixed, 0.5)
    assert torch.equal(noisy.sum(-1), count) and bool((noisy | ~(view.protected & view.valid)).all())
    assert torch.equal(gate.round().bool(), noisy)
    plain, gate = noisy_select(score, count, view, fixed, 0.0)
    assert torch.equal(plain, select(score, count, view)) and torch.equal(gate, plain.float())


@given(seed=seeds)
@prop(30)
def test_a_span_is_drawn_as_a_whole(seed: int) -> None:
    """Tokens of one span and one score are kept or left together, but for the one span that the count cuts."""
    draws = generator(seed)
    span = torch.randint(0, 2, (3, 40), generator=draws).cumsum(-1)
    span = span - span[:, :1]
    score = torch.randn(3, 41, generator=draws).gather(1, span)
    view = TokenView(hidden=torch.zeros(3, 40, 1))
    torch.manual_seed(seed)
    anchor, _ = noisy_select(score, torch.tensor([5, 11, 23]), view, torch.zeros(3, 40).bool(), 1.0, spans=span)
    for row in range(3):
        parted = [number for number in span[row].unique() if len(anchor[row, span[row] == number].unique()) > 1]
        assert len(parted) <= 1


def test_soft_choice_gradient_is_that_of_finite_differences() -> None:
    draws = generator(1)
    score = torch.randn(3, 9, generator=draws, dtype=torch.float64, requires_grad=True)
    free = torch.rand(3, 9, generator=draws) < 0.8
    count = torch.tensor([2, 3, 4])
    theta = soft_top_k(score.detach(), count, free, 0.3)

    # The threshold is held constant in the gradient, so it is here.
    level = score.detach() - 0.3 * torch.logit(theta.clamp(1e-12, 1 - 1e-12))

    def held(s: torch.Tensor) -> torch.Tensor:
        return torch.where(free, torch.sigmoid((s - level) / 0.3), 0.0)

    assert torch.autograd.gradcheck(held, (score,))
    weight = torch.randn(3, 9, generator=draws, dtype=torch.float64)
    (mine,) = torch.autograd.grad((soft_top_k(score, count, free, 0.3) * weight).sum(), score)
    (want,) = torch.autograd.grad((held(score) * weight).sum(), score)
    torch.testing.assert_close(mine, want)


@given(seed=seeds, n=st.integers(2, 20), data=st.data())
@prop(30)
def test_soft_choice_becomes_the_choice(seed: int, n: int, data: st.DataObject) -> None:
    score = torch.randperm(n, generator=generator(seed)).double()[None]
    count = torch.tensor([data.draw(st.integers(1, n - 1))])
    soft = soft_top_k(score, count, torch.ones(1, n, dtype=torch.bool), 0.01)
    assert int(soft.round().sum()) == int(count)
    assert bool(((soft < 1e-6) | (soft > 1 - 1e-6)).all())


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    soft = torch.tensor([0.2, 0.9], requires_grad=True)
    out = straight_through(torch.tensor([False, True]), soft)
    assert torch.equal(out, torch.tensor([0.0, 1.0]))
    (out * torch.tensor([3.0, 5.0])).sum().backward()
    assert torch.equal(soft.grad, torch.tensor([3.0, 5.0]))


def test_gates_carry_gradient_to_the_saliency_head() -> None:
    torch.manual_seed(0)
    view = TokenView(hidden=torch.randn(2, 12, 5))
    head = SaliencyHead(5)
    assert torch.equal(head(view.hidden), torch.zeros(2, 12))
    fixed = torch.zeros(2, 12, dtype=torch.bool)
    fixed[:, -2:] = True
    _, gate = noisy_select(head(view.hidden), torch.tensor([5, 5]), view, fixed, 0.5)
    gate[:, :10].sum().backward()
    assert float(head.out.weight.grad.abs().sum()) > 0
