"""Masks that a gradient flows to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, up_to
from torch import Tensor

from quickmerge.merge.tokens.removal import fill_dropped, gate, gumbel_keep, kept_mean, key_bias, masked_softmax


def slow_softmax(scores: Tensor, policy: Tensor, eps: float) -> Tensor:
    out = torch.zeros(scores.shape, dtype=torch.float64)
    b, h, t, _ = scores.shape
    for n in range(b):
        for m in range(h):
            for i in range(t):
                row = [float(x) for x in scores[n, m, i]]
                e = [math.exp(row[j] - max(row)) * (1.0 if i == j else float(policy[n, j])) for j in range(t)]
                for j in range(t):
                    out[n, m, i, j] = (e[j] + eps / t) / (sum(e) + eps)
    return out


@prop(25)
@given(up_to(3), st.integers(1, 9), st.integers(0, 999), st.sampled_from([0.0, 1e-6, 0.1]))
def test_masked_softmax_is_its_slow_statement(batch: int, tokens: int, seed: int, eps: float) -> None:
    draws = generator(seed)
    scores = 4 * torch.randn(batch, 2, tokens, tokens, generator=draws)
    policy = (torch.rand(batch, tokens, generator=draws) < 0.5).float()
    got = masked_softmax(scores, policy, eps)
    torch.testing.assert_close(got.double(), slow_softmax(scores, policy, eps), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.sum(-1), torch.ones(batch, 2, tokens))


def test_an_ordinary_softmax_where_everything_is_kept_or_hidden_by_a_bias() -> None:
    scores = torch.randn(2, 3, 7, 7, generator=generator(0))
    torch.testing.assert_close(masked_softmax(scores, torch.ones(2, 7), 0.0), scores.softmax(-1))
    policy = (torch.rand(2, 7, generator=generator(1)) < 0.5).float()
    biased = (scores + key_bias(policy, torch.float32)).softmax(-1)
    torch.testing.assert_close(masked_softmax(scores, policy, 0.0), biased)
    assert bool((biased[:, :, gate(policy)[0, 0] == 0][0] == 0).all())


def test_masked_softmax_passes_the_gradient_of_finite_differences_to_the_policy() -> None:
    scores = torch.randn(2, 2, 5, 5, generator=generator(2), dtype=torch.float64)
    policy = (torch.rand(2, 5, generator=generator(3), dtype=torch.float64) < 0.5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s, p: masked_softmax(s, p), (scores.requires_grad_(), policy))


def test_half_precision_scores_are_summed_in_float32() -> None:
    scores = torch.randn(1, 1, 64, 64, generator=generator(4)).bfloat16()
    assert masked_softmax(scores, torch.ones(1, 64)).dtype == torch.float32


def test_gumbel_keeps_with_the_probability_that_it_is_given() -> None:
    log_probs = torch.tensor([0.8, 0.2]).log().expand(20_000, 2)
    drawn = gumbel_keep(log_probs, generator=generator(5))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert float(drawn.mean()) == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 20_000))


@prop(20)
@given(st.integers(0, 999), st.sampled_from([0.5, 1.0, 3.0]))
def test_gumbel_is_straight_through(seed: int, temperature: float) -> None:
    """Exactly 0 or 1 by value; the gradient is that of the softened choice, written out with the same noise."""
    log_probs = torch.randn(3, 8, 2, generator=generator(seed)).log_softmax(-1).requires_grad_()
    weight = torch.randn(3, 8, generator=generator(seed + 1))
    drawn = gumbel_keep(log_probs, temperature, generator(seed + 2))
    (drawn * weight).sum().backward()
    noise = -torch.empty(3, 8, 2).exponential_(generator=generator(seed + 2)).log()
    p = 1 / (1 + (((log_probs + noise)[..., 1] - (log_probs + noise)[..., 0]) / temperature).exp())
    assert torch.equal(drawn.detach(), (p > 0.5).float())
    slope = weight * p * (1 - p) / temperature
    torch.testing.assert_close(log_probs.grad, torch.stack([slope, -slope], -1).detach(), atol=1e-6, rtol=1e-4)


def test_gumbel_draws_from_its_generator_or_from_torchs() -> None:
    log_probs = torch.tensor([0.5, 0.5]).log().expand(50, 2)
    one, two = (gumbel_keep(log_probs, generator=generator(7)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, gumbel_keep(log_probs, generator=generator(8)))
    torch.manual_seed(3)
    first = gumbel_keep(log_probs)
    torch.manual_seed(3)
    assert torch.equal(first, gumbel_keep(log_probs))


@prop(20)
@given(up_to(3), st.integers(1, 9), st.integers(0, 999))
def test_dropped_tokens_are_filled_so_that_the_mean_is_that_of_the_kept(batch: int, tokens: int, seed: int) -> None:
    x = torch.randn(batch, tokens, 4, generator=generator(seed))
    mask = (torch.rand(batch, tokens, generator=generator(seed + 1)) < 0.4).float()
    filled = fill_dropped(x, mask)
    for row in range(batch):
        kept = x[row][mask[row] > 0]
        wanted = kept.double().mean(0) if len(kept) else torch.zeros(4, dtype=torch.float64)
        torch.testing.assert_close(kept_mean(x, mask)[row, 0].double(), wanted, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(filled[row].double().mean(0), wanted, atol=1e-6, rtol=1e-5)
        assert torch.equal(filled[row][mask[row] > 0], kept)
