"""Detached targets, and a guard that fires when slots have become the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds

from quickmerge.calm.heads import make_head
from quickmerge.merge.prior import CollapseError
from quickmerge.merge.prior.model import check_collapse, collapse_penalty, next_slot_loss, relative_spread, spread


@pytest.mark.parametrize("name", ["gaussian", "mixture", "energy"])
def test_targets_take_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    head = make_head(name, 8, 4)
    context, target = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    loss, each = next_slot_loss(head, context, target, torch.ones(2, 5, dtype=torch.bool))
    loss.backward()
    assert target.grad is None and float(context.grad.abs().sum()) > 0
    assert each.shape == (2, 5)


def test_only_valid_slots_count() -> None:
    torch.manual_seed(0)
    head = make_head("gaussian", 8, 4)
    context, target = torch.randn(2, 5, 8), torch.randn(2, 5, 4)
    valid = torch.tensor([[True, True, False, False, False], [True, True, True, True, True]])
    loss, each = next_slot_loss(head, context, torch.where(valid[..., None], target, 1e6), valid)
    want = head.loss(context, target)[valid].mean() / 4
    torch.testing.assert_close(loss, want)
    assert bool((each[~valid] == 0).all())


@given(seed=seeds, k=st.integers(1, 9))
@prop(20)
def test_spread_is_the_distance_from_the_mean(seed: int, k: int) -> None:
    x = torch.randn(2, k, 3, generator=generator(seed), dtype=torch.float64)
    valid = torch.ones(2, k, dtype=torch.bool)
    valid[0, k // 2 + 1 :] = False
    for row in range(2):
        here = x[row, valid[row]]
        want = (here - here.mean(0)).square().sum(-1).mean().sqrt()
        torch.testing.assert_close(spread(x, valid)[row], want, atol=1e-9, rtol=1e-9)


def test_collapse_is_detected_and_named() -> None:
    tokens = torch.randn(2, 20, 6, generator=generator(0))
    every = torch.ones(2, 20, dtype=torch.bool)
    healthy = relative_spread(tokens[:, ::2], tokens, every[:, ::2], every)
    check_collapse(healthy, "the merged sequence")
    flat = tokens.mean(1, keepdim=True).expand(-1, 10, -1) + 1e-3 * tokens[:, :10]
    share = relative_spread(flat, tokens, every[:, :10], every)
    with pytest.raises(CollapseError, match="the merged sequence has collapsed: its slots spread"):
        check_collapse(share, "the merged sequence")
    with pytest.raises(CollapseError):
        check_collapse(float("nan"), "the merged sequence")


def test_penalty_pulls_a_collapsing_sequence_apart() -> None:
    tokens = torch.randn(1, 20, 6, generator=generator(0))
    every = torch.ones(1, 20, dtype=torch.bool)
    scale = torch.tensor(0.1, requires_grad=True)
    for _ in range(200):
        share = relative_spread(tokens * scale, tokens, every, every)
        (grad,) = torch.autograd.grad(collapse_penalty(share), scale)
        scale = (scale - 0.1 * grad).detach().requires_grad_()
    assert 0.45 < scale.item() <= 0.51
    assert float(collapse_penalty(torch.tensor(0.8))) == 0


def test_without_detaching_slots_would_run_together() -> None:
    """Why targets are detached: free to move, the slots become easy to predict by becoming the same."""
    every = torch.ones(1, 8, dtype=torch.bool)

    def train(detach: bool) -> float:
        torch.manual_seed(0)
        head = make_head("gaussian", 4, 4)
        slots = torch.randn(1, 8, 4).requires_grad_()
        optimizer = torch.optim.Adam([slots, *head.parameters()], lr=0.05)
        before = float(spread(slots.detach(), every))
        for _ in range(300):
            optimizer.zero_grad()
            target = slots[:, 1:].detach() if detach else slots[:, 1:]
            head.loss(slots[:, :-1], target).mean().backward()
            optimizer.step()
        return float(spread(slots.detach(), every)) / before

    assert train(detach=False) < 0.5 < 0.8 < train(detach=True)
