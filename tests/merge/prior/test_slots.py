"""What the prior reads of a slot: learned merge weights, spans, sums."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds, views

from quickmerge.merge.prior.network import SlotEncoder, group_softmax, spans, sum_by_slot
from quickmerge.merge.tokens import MergePlan, TokenView
from quickmerge.merge.tokens.plan import next_anchor


def plan_of(view: TokenView, seed: int) -> MergePlan:
    """A random lawful plan that merges most tokens."""
    anchor = (torch.rand(view.valid.shape, generator=generator(seed)) < 0.4) & view.valid | (
        view.protected & view.valid
    )
    first = view.valid.long().argmax(-1, keepdim=True)
    anchor = anchor.scatter(1, first, True)
    return MergePlan.from_anchors(view, anchor, next_anchor(view, anchor))


@given(n=st.integers(1, 30), k=st.integers(1, 6), seed=seeds)
@prop(30)
def test_group_softmax_is_a_softmax_in_every_slot(n: int, k: int, seed: int) -> None:
    draws = generator(seed)
    logit = 30 * torch.randn(2, n, 3, generator=draws, dtype=torch.float64)
    slot = torch.randint(-1, k, (2, n), generator=draws)
    weight = group_softmax(logit, slot, k)
    for b in range(2):
        assert bool((weight[b, slot[b] < 0] == 0).all())
        for s in range(k):
            here = slot[b] == s
            if bool(here.any()):
                torch.testing.assert_close(weight[b, here], logit[b, here].softmax(0), atol=1e-12, rtol=1e-9)


def test_merge_weights_train() -> None:
    draws = generator(3)
    logit = torch.randn(2, 7, 2, generator=draws, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 7, 2, generator=draws, dtype=torch.float64, requires_grad=True)
    slot = torch.tensor([[0, 0, 1, -1, 1, 1, 2], [2, 2, 2, 2, 0, -1, -1]])

    def merged(logit: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return sum_by_slot(value * group_softmax(logit, slot, 3), slot, 3)

    assert torch.autograd.gradcheck(merged, (logit, value))


@given(view=views(dtypes=(torch.float32,)), seed=seeds)
@prop(30)
def test_spans_are_counted(view: TokenView, seed: int) -> None:
    plan = plan_of(view, seed)
    got = spans(view, plan)
    for b in range(len(got)):
        for k in range(plan.slots):
            places = view.position[b][plan.slot[b] == k]
            want = int(places.max() - places.min()) + 1 if len(places) else 0
            assert int(got[b, k]) == want


@given(seed=seeds, tokens=st.integers(8, 40))
@prop(15)
def test_encoder_reads_rows_alone_and_no_padding(seed: int, tokens: int) -> None:
    torch.manual_seed(0)
    encoder = SlotEncoder(6, 16, 4, 1).double()
    torch.nn.init.normal_(encoder.weight.weight)
    hidden = torch.randn(2, tokens, 6, generator=generator(seed), dtype=torch.float64)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[0, :3] = False
    view = TokenView(hidden=torch.where(valid[..., None], hidden, 1e9), valid=valid)
    plan = plan_of(view, seed)
    both = encoder(view, plan)
    row = TokenView(hidden=hidden[:1, 3:])
    alone = MergePlan.from_anchors(row, *_cut(plan, view))
    torch.testing.assert_close(both[0][plan.valid[0]], encoder(row, alone)[0], atol=1e-9, rtol=1e-9)


def _cut(plan: MergePlan, view: TokenView) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors and leaders of the first row of a plan, without its three padded tokens."""
    anchor = torch.zeros_like(view.valid)
    for k in torch.nonzero(plan.valid[0])[:, 0]:
        place = plan.position[0, k]
        anchor[0, int(torch.nonzero((view.position[0] == place) & view.valid[0])[0])] = True
    anchor = anchor[:1, 3:]
    short = TokenView(hidden=view.hidden[:1, 3:])
    return anchor, next_anchor(short, anchor)


def test_pooling_heads_can_tell_members_apart_that_a_mean_cannot() -> None:
    torch.manual_seed(0)
    encoder = SlotEncoder(4, 8, 2, 1)
    one = torch.tensor([[[1.0, 2, 3, 4], [4, 3, 2, 1], [9, 0, 0, 9]]])
    two = torch.tensor([[[1.0, 2, 2, 1], [4, 3, 3, 4], [9, 0, 0, 9]]])  # the same mean, other members
    slot = torch.tensor([[0, 0, 1]])
    torch.testing.assert_close(encoder.merge(one, slot, 2)[:, 0], encoder.merge(two, slot, 2)[:, 0])
    torch.nn.init.normal_(encoder.weight.weight)
    assert not torch.allclose(encoder.merge(one, slot, 2)[:, 0], encoder.merge(two, slot, 2)[:, 0], atol=1e-3)
