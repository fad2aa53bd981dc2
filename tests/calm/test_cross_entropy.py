"""Cross-entropy in blocks against all logits at once in float64; sampled words against the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from quickmerge.calm.autoencoder import Negatives, linear_cross_entropy, sampled_cross_entropy


def case(rows: int, words: int, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=draws).requires_grad_()
    weight = torch.randn(words, width, generator=draws).requires_grad_()
    return hidden, weight, torch.randint(words, (rows,), generator=draws)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(2, 17), st.integers(1, 120), st.integers(0, 99))
def test_blocks_are_the_whole(rows: int, words: int, held: int, seed: int) -> None:
    hidden, weight, labels = case(rows, words, seed=seed)
    scale = torch.linspace(0.5, 2, rows)  # a gradient of its own for each row
    nats, hits = linear_cross_entropy(hidden, weight, labels, held)
    (nats * scale).sum().backward()
    one, two = (part.detach().double().requires_grad_() for part in (hidden, weight))
    logits = one @ two.T
    expected = logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]
    (expected * scale).sum().backward()
    torch.testing.assert_close(nats.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(hits, logits.argmax(1) == labels)
    for part, truth in ((hidden, one), (weight, two)):
        assert part.grad is not None and truth.grad is not None
        torch.testing.assert_close(part.grad.double(), truth.grad, atol=1e-5, rtol=1e-5)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    hidden, weight, labels = case(9, 300)
    with torch.autocast("cpu", torch.bfloat16):
        nats, _ = linear_cross_entropy(hidden, weight, labels, 1000)
    exact = F.cross_entropy((hidden @ weight.T).double(), labels, reduction="none")
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats.double(), exact, atol=0.1, rtol=0.02)


def test_the_sampled_sum_is_the_true_one_on_average() -> None:
    """Within five standard errors, over draws of words that are far from even."""
    hidden, weight, labels = case(4, 30)
    negatives = Negatives(torch.arange(30.0) ** 3, 8)
    torch.manual_seed(0)
    right = (hidden * weight[labels]).sum(-1)
    with torch.no_grad():
        drawn = torch.stack(
            [(sampled_cross_entropy(hidden, weight, labels, negatives.draw()) + right).exp() for _ in range(4000)]
        ).double()
    true = (hidden @ weight.T).double().exp().sum(1)
    error = drawn.std(0) / len(drawn) ** 0.5
    assert bool(((drawn.mean(0) - true).abs() < 5 * error).all()), (drawn.mean(0), true, error)
    assert bool((error < 0.1 * true).all())


def test_many_words_give_the_exact_loss_and_gradient() -> None:
    hidden, weight, labels = case(5, 12)
    torch.manual_seed(0)
    negatives = Negatives(torch.ones(12), 400_000)
    estimate = sampled_cross_entropy(hidden, weight, labels, negatives.draw())
    grads = torch.autograd.grad(estimate.sum(), [hidden, weight])
    exact, _ = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(estimate, exact, atol=0.02, rtol=0.02)
    for part, truth in zip(grads, torch.autograd.grad(exact.sum(), [hidden, weight]), strict=True):
        torch.testing.assert_close(part, truth, atol=0.03, rtol=0.05)


def test_probabilities_of_words() -> None:
    words = Negatives(torch.tensor([0.0, 1.0, 16.0]), 5)
    assert words.probability.tolist() == pytest.approx([1 / 6, 1 / 6 + 0.5 / 9, 1 / 6 + 4 / 9])
    ids, log_q = words.draw()
    torch.testing.assert_close(log_q, words.probability[ids].log().float())
    with pytest.raises(ValueError, match="draws must be a whole number of at least 1, got 0"):
        Negatives(torch.ones(3), 0)
    with pytest.raises(ValueError, match="counts must be a row of frequencies"):
        Negatives(torch.zeros(3), 2)
