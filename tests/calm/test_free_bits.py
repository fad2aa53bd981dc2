"""The divergence against its definition by an integral, and the gradient of its free part."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quickmerge.calm.autoencoder import free_bits, kl_by_dimension


@settings(max_examples=20, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 1))
def test_the_divergence_is_its_integral(mean: float, log_std: float) -> None:
    std = math.exp(log_std)
    x = torch.linspace(mean - 12 * std, mean + 12 * std, 20001, dtype=torch.float64)
    log_p = -0.5 * ((x - mean) / std) ** 2 - log_std
    integrand = log_p.exp() / math.sqrt(2 * math.pi) * (log_p + 0.5 * x**2)
    expected = torch.trapezoid(integrand, x)
    given_ = torch.tensor([mean, log_std], dtype=torch.float64)
    torch.testing.assert_close(kl_by_dimension(*given_), expected, atol=1e-6, rtol=1e-6)


def test_near_one_little_of_it_is_lost() -> None:
    log_std = torch.tensor([1e-3, -1e-4])
    exact = log_std.double().square()  # to leading order
    torch.testing.assert_close(kl_by_dimension(torch.zeros(2), log_std).double(), exact, rtol=2e-3, atol=1e-9)
    assert bool((kl_by_dimension(torch.zeros(2), torch.zeros(2)) == 0).all())


def test_below_the_floor_there_is_no_gradient_at_all() -> None:
    mean = torch.tensor([0.1, 2.0, 0.0], requires_grad=True)
    log_std = torch.tensor([-0.2, 0.1, -3.0], requires_grad=True)
    kl = kl_by_dimension(mean, log_std)
    clipped = free_bits(kl, 0.5)
    assert clipped.tolist() == [0.5, *kl[1:].tolist()]
    clipped.sum().backward()
    assert mean.grad is not None and log_std.grad is not None
    assert mean.grad[0] == 0 and log_std.grad[0] == 0
    # above it: d/dmean = mean, d/dlog_std = std^2 - 1
    torch.testing.assert_close(mean.grad[1:], mean.detach()[1:])
    torch.testing.assert_close(log_std.grad[1:], (2 * log_std.detach()[1:]).exp() - 1)


def test_a_floor_of_zero_changes_nothing() -> None:
    mean = torch.randn(50, generator=torch.Generator().manual_seed(0)).mul(0.01).requires_grad_()
    free_bits(kl_by_dimension(mean, torch.zeros(50)), 0.0).sum().backward()
    assert mean.grad is not None
    assert mean.grad.tolist() == pytest.approx(mean.tolist())
