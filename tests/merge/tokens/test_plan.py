"""The laws of a plan, over random plans, and that `MergePlan.check` finds each broken law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from prefix_views import LENGTHS, PREFIXES, make
from strategies import after, alone, assert_same_plan, generator, numbers, plans, prop, seeds, told, tolerance, views
from torch import Tensor

from quickmerge.merge.tokens import MergePlan, TokenView


def loop_merge(plan: MergePlan, x: Tensor) -> Tensor:
    """`MergePlan.merge` as one reads it: add up weight times member, in float64."""
    out = torch.zeros(x.shape[0], plan.slots, *x.shape[2:], dtype=torch.float64)
    for row in range(x.shape[0]):
        for token, slot in enumerate(plan.slot[row].tolist()):
            if slot >= 0:
                out[row, slot] += float(plan.weight[row, token]) * x[row, token].double()
    return out


@prop(100)
@given(st.data())
def test_from_anchors_is_lawful(data: st.DataObject) -> None:
    view = data.draw(views())
    plan = data.draw(plans(view))
    plan.check(view)
    for row in range(view.valid.shape[0]):
        slots = plan.slot[row]
        # padding is in no slot, every other token in one of the K or dropped
        assert (slots[~view.valid[row]] == -1).all()
        assert set(slots.tolist()) - {-1} == set(plan.valid[row].nonzero().flatten().tolist())
        # dropped tokens are counted apart, nothing else is lost
        dropped = view.size[row][view.valid[row] & (slots < 0)].sum()
        assert int(plan.size[row].sum() + dropped) == int(view.size[row][view.valid[row]].sum())
        assert (plan.size[row][~plan.valid[row]] == 0).all()
        for token in (view.protected[row] & view.valid[row]).nonzero().flatten().tolist():
            assert (slots == slots[token]).sum() == 1
            assert plan.weight[row, token] == 1
            assert plan.position[row, slots[token]] == view.position[row, token]
        rising = plan.position[row][plan.valid[row]]
        assert (rising[1:] > rising[:-1]).all()


@prop(60)
@given(st.data())
def test_slots_stand_where_their_anchors_stood(data: st.DataObject) -> None:
    view = data.draw(views())
    rng = generator(data.draw(seeds))
    anchor = (torch.rand(view.valid.shape, generator=rng) < 0.5) & view.valid
    kept = anchor | (view.protected & view.valid)
    assume(bool(kept.any(-1).all()))
    plan = MergePlan.from_anchors(view, anchor)
    for row in range(view.valid.shape[0]):
        assert plan.position[row][plan.valid[row]].tolist() == view.position[row][kept[row]].tolist()
        assert plan.size[row][plan.valid[row]].tolist() == view.size[row][kept[row]].tolist()
        assert torch.equal(plan.slot[row] >= 0, kept[row])


@prop(60)
@given(st.data())
def test_slots_are_aligned_to_the_side_that_is_not_padded(data: st.DataObject) -> None:
    view = data.draw(views())
    plan = data.draw(plans(view))
    count = plan.valid.sum(-1)
    index = torch.arange(plan.slots)
    assert plan.slots == int(count.max())
    expected = index >= plan.slots - count[:, None] if view.pads_left else index < count[:, None]
    assert torch.equal(plan.valid, expected)


@prop(60)
@given(st.data())
def test_merge_is_the_weighted_sum_of_the_members(data: st.DataObject) -> None:
    view = data.draw(views(garbage=False))
    plan = data.draw(plans(view))
    got = plan.merge(view.hidden)
    assert got.dtype == view.hidden.dtype
    torch.testing.assert_close(got.double(), loop_merge(plan, view.hidden), rtol=0, atol=4 * tolerance(got.dtype))
    assert (got[~plan.valid] == 0).all()


@prop(40)
@given(st.data())
def test_merge_ignores_what_is_dropped_or_padding(data: st.DataObject) -> None:
    view = data.draw(views(garbage=False))
    plan = data.draw(plans(view))
    spoilt = torch.where((plan.slot < 0)[..., None], torch.nan, view.hidden)
    assert torch.equal(plan.merge(spoilt), plan.merge(view.hidden))


@prop(40)
@given(st.data())
def test_merge_takes_any_trailing_shape(data: st.DataObject) -> None:
    view = data.draw(views(dtypes=(torch.float64,), garbage=False))
    plan = data.draw(plans(view))
    flat = plan.merge(view.hidden)
    tall = view.hidden[..., None, :].expand(-1, -1, 2, -1)
    assert torch.equal(plan.merge(tall), flat[..., None, :].expand(-1, -1, 2, -1))
    assert torch.equal(plan.merge(view.hidden[..., 0]), flat[..., 0])
    assert torch.equal(plan.unmerge(flat[..., 0]), plan.unmerge(flat)[..., 0])


@prop(60)
@given(st.data())
def test_a_slot_of_one_is_a_copy_to_the_bit(data: st.DataObject) -> None:
    view = data.draw(views(kinds=("normal",)))
    plan = data.draw(plans(view))
    merged = plan.merge(view.hidden)
    for row, slots in enumerate(plan.slot.tolist()):
        for token, slot in enumerate(slots):
            if slot >= 0 and slots.count(slot) == 1:
                assert torch.equal(merged[row, slot], view.hidden[row, token])


@prop(60)
@given(st.data())
def test_merge_undoes_unmerge(data: st.DataObject) -> None:
    view = data.draw(views())
    plan = data.draw(plans(view))
    y = numbers((len(view.valid), plan.slots, 3), "normal", generator(data.draw(seeds)), view.hidden.dtype)
    y = y * plan.valid[..., None]
    torch.testing.assert_close(plan.merge(plan.unmerge(y)), y, rtol=tolerance(y.dtype), atol=tolerance(y.dtype))


@prop(60)
@given(st.data())
def test_unmerge_copies_slots_back_and_zeroes_the_dropped(data: st.DataObject) -> None:
    view = data.draw(views())
    plan = data.draw(plans(view))
    y = numbers((len(view.valid), plan.slots, 3), "normal", generator(1), view.hidden.dtype)
    back = plan.unmerge(y)
    assert back.dtype == y.dtype
    for row, slots in enumerate(plan.slot.tolist()):
        for token, slot in enumerate(slots):
            assert torch.equal(back[row, token], y[row, slot] if slot >= 0 else torch.zeros_like(y[0, 0]))


def test_shares_are_exact_enough_for_float64() -> None:
    for members in range(1, 12):
        view = TokenView(torch.full((1, members, 1), 0.7, dtype=torch.float64))
        anchor = torch.arange(members)[None] == members - 1
        plan = MergePlan.from_anchors(view, anchor, torch.full((1, members), members - 1))
        torch.testing.assert_close(plan.merge(view.hidden), view.hidden[:, :1], rtol=1e-14, atol=0)


@prop(80)
@given(st.data())
def test_composing_equals_applying_in_turn(data: st.DataObject) -> None:
    view = data.draw(views(dtypes=(torch.float32, torch.float64), garbage=False))
    first = data.draw(plans(view))
    between = after(view, first)
    then = data.draw(plans(between))
    then.check(between)
    both = first.compose(then)
    both.check(view)
    x = view.hidden
    torch.testing.assert_close(both.merge(x), then.merge(first.merge(x)), rtol=1e-5, atol=1e-6)
    y = torch.randn(len(x), then.slots, 2, generator=generator(data.draw(seeds)))
    assert torch.equal(both.unmerge(y), first.unmerge(then.unmerge(y)))
    for name in ("position", "size", "valid"):
        assert torch.equal(getattr(both, name), getattr(then, name))
    assert torch.equal(both.carry(view.protected), then.carry(first.carry(view.protected)))


@prop(30)
@given(st.data())
def test_composing_is_associative_and_identity_is_neutral(data: st.DataObject) -> None:
    view = data.draw(views())
    a = data.draw(plans(view))
    b = data.draw(plans(after(view, a)))
    c = data.draw(plans(after(after(view, a), b)))
    left, right = a.compose(b).compose(c), a.compose(b.compose(c))
    torch.testing.assert_close(left.weight, right.weight, rtol=1e-6, atol=1e-7)
    assert_same_plan(replace(left, weight=right.weight), right)
    assert_same_plan(MergePlan.identity(view).compose(a), a)
    assert_same_plan(a.compose(MergePlan.identity(after(view, a))), a)


def test_composing_with_a_plan_for_another_number_of_tokens_is_refused() -> None:
    four, three = TokenView(torch.zeros(1, 4, 1)), TokenView(torch.zeros(1, 3, 1))
    with pytest.raises(ValueError, match="then must act on 4 tokens, got a plan for 3"):
        MergePlan.identity(four).compose(MergePlan.identity(three))


@prop(60)
@given(st.data())
def test_identity_changes_nothing(data: st.DataObject) -> None:
    view = data.draw(views())
    plan = MergePlan.identity(view)
    plan.check(view)
    assert plan.is_identity(view)
    assert plan.slots == view.valid.shape[1]
    mask = view.valid[..., None]
    assert torch.equal(plan.merge(view.hidden)[mask.expand_as(view.hidden)], view.hidden[mask.expand_as(view.hidden)])
    x = torch.where(mask, view.hidden, 0)
    assert torch.equal(plan.merge(x), x) and torch.equal(plan.unmerge(x), x)
    assert torch.equal(plan.position[view.valid], view.position[view.valid])
    assert torch.equal(plan.size[view.valid], view.size[view.valid])


@prop(60)
@given(st.data())
def test_keeping_every_token_is_the_identity(data: st.DataObject) -> None:
    view = data.draw(views())
    plan = MergePlan.from_anchors(view, view.valid)
    plan.check(view)
    for row in range(len(view.valid)):
        count = int(view.valid[row].sum())
        row_plan = told(plan, view, row)
        assert row_plan.slot == list(range(count))
        assert row_plan.weight.tolist() == [1.0] * count
    if view.pads_left or bool(view.valid[:, 0].all()):  # padded on one side only
        assert plan.is_identity(view) == bool(view.valid.all(-1).any())


@prop(80)
@given(st.data())
def test_is_identity_means_that_every_token_keeps_its_place(data: st.DataObject) -> None:
    view = data.draw(views(max_tokens=6))
    plan = data.draw(plans(view))
    index = torch.arange(view.valid.shape[1]).expand_as(view.valid)
    same = plan.slots == view.valid.shape[1] and torch.equal(plan.slot, torch.where(view.valid, index, -1))
    assert plan.is_identity(view) == same


def test_is_identity_sees_a_token_dropped_from_one_row_only() -> None:
    view = TokenView(torch.randn(2, 4, 3))
    plan = MergePlan.from_anchors(view, torch.tensor([[False, True, True, True], [True] * 4]))
    assert not plan.is_identity(view)


@prop(50)
@given(st.data())
def test_a_batch_equals_its_rows(data: st.DataObject) -> None:
    view = data.draw(views())
    rng = generator(data.draw(seeds))
    anchor = (torch.rand(view.valid.shape, generator=rng) < 0.4) & view.valid
    assume(bool((anchor | view.protected & view.valid).any(-1).all()))
    plan = MergePlan.from_anchors(view, anchor)
    merged = plan.merge(view.hidden)
    for row in range(len(view.valid)):
        one = alone(view, row)
        its = MergePlan.from_anchors(one, anchor[row : row + 1, view.valid[row]])
        assert told(plan, view, row).slot == told(its, one, 0).slot
        assert torch.equal(merged[row][plan.valid[row]], its.merge(one.hidden)[0])


@prop(50)
@given(st.data())
def test_carry_marks_slots_that_hold_a_marked_token(data: st.DataObject) -> None:
    view = data.draw(views())
    plan = data.draw(plans(view))
    mask = torch.rand(view.valid.shape, generator=generator(data.draw(seeds))) < 0.3
    for row in range(len(view.valid)):
        marked = set(plan.slot[row][mask[row]].tolist()) - {-1}
        assert marked == set(plan.carry(mask)[row].nonzero().flatten().tolist())


@prop(60)
@given(st.data())
def test_error_of_copying_back_is_the_scatter_inside_the_slots(data: st.DataObject) -> None:
    """``sum ||x_j - y_k||^2 = sum ||x_j - mean_k||^2 + n_k ||mean_k - y_k||^2``, so plain means do best."""
    view = data.draw(views(dtypes=(torch.float64,), garbage=False))
    plan = data.draw(plans(view))
    x, merged = view.hidden, plan.merge(view.hidden)
    member = (plan.slot >= 0)[..., None]
    error = float(((x - plan.unmerge(merged)) * member).square().sum())
    scatter = shift = 0.0
    for row in range(len(x)):
        for slot in plan.valid[row].nonzero().flatten().tolist():
            group = x[row][plan.slot[row] == slot]
            mean = group.mean(0)
            scatter += float((group - mean).square().sum())
            shift += len(group) * float((mean - merged[row, slot]).square().sum())
    assert error == pytest.approx(scatter + shift, rel=1e-10, abs=1e-12)
    assert scatter <= error + 1e-12


@prop(60)
@given(st.data())
def test_merged_duplicates_attend_as_the_tokens_they_stand_for(data: st.DataObject) -> None:
    """Attention with log(size) added to the score of a slot equals attention over its identical members."""
    view = data.draw(views(dtypes=(torch.float64,), garbage=False, protect=("none", "ends"), merged=False))
    plan = data.draw(plans(view, drops=False))
    rng = generator(data.draw(seeds))
    b, n = view.valid.shape
    k, v, q = (torch.randn(b, n, d, generator=rng, dtype=torch.float64) for d in (5, 3, 5))
    assume(bool(((plan.slot >= 0) == view.valid).all()))
    # the first token of each slot lends its key and value to the others
    first = torch.stack([(plan.slot[row][:, None] == plan.slot[row]).long().argmax(-1) for row in range(b)])
    k, v = (t.gather(1, first[..., None].expand_as(t)) for t in (k, v))
    scores = (q @ k.transpose(1, 2)).masked_fill(~view.valid[:, None], -torch.inf)
    slots = q @ plan.merge(k).transpose(1, 2) + plan.size.double().log()[:, None]
    torch.testing.assert_close(slots.softmax(-1) @ plan.merge(v), scores.softmax(-1) @ v, rtol=0, atol=1e-12)


# What from_anchors refuses


def test_padding_cannot_be_kept() -> None:
    view = TokenView(torch.zeros(1, 2, 1), valid=torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match="anchor must be valid tokens, got padding"):
        MergePlan.from_anchors(view, torch.tensor([[True, True]]))


@pytest.mark.parametrize("target", [0, 1, 7], ids=["protected", "not kept", "past the end"])
def test_a_leader_must_be_a_free_kept_token(target: int) -> None:
    view = TokenView(torch.zeros(1, 4, 1), protected=torch.tensor([[True, False, False, False]]))
    anchor = torch.tensor([[True, False, False, True]])
    with pytest.raises(ValueError, match="leader must point to kept tokens that are not protected"):
        MergePlan.from_anchors(view, anchor, torch.tensor([[-1, -1, target, -1]]))


# What check finds: each law is broken on its own


@pytest.fixture
def view() -> TokenView:
    """Two rows, one padded, one token of each protected, two slots of several."""
    return TokenView(
        torch.zeros(2, 6, 3),
        valid=torch.tensor([[True] * 6, [False, False, True, True, True, True]]),
        protected=torch.tensor([[False] * 5 + [True]] * 2),
    )


@pytest.fixture
def plan(view: TokenView) -> MergePlan:
    anchor = torch.tensor([[False, False, True, False, True, True], [False, False, False, False, True, True]])
    leader = torch.tensor([[2, 2, -1, 4, -1, -1], [-1, -1, 4, -1, -1, -1]])
    plan = MergePlan.from_anchors(view, anchor, leader)
    plan.check(view)
    assert plan.slot.tolist() == [[0, 0, 0, 1, 1, 2], [-1, -1, 1, -1, 1, 2]]
    assert plan.size.tolist() == [[3, 2, 1], [0, 2, 1]]
    return plan


def put(x: Tensor, place: tuple[int, int], value: float | bool) -> Tensor:
    x = x.clone()
    x[place] = value
    return x


Break = Callable[[MergePlan], MergePlan]
BROKEN: dict[str, tuple[str, Break]] = {
    "padding in a slot": ("slot", lambda p: replace(p, slot=put(p.slot, (1, 0), 1))),
    "slot past the last": ("slot", lambda p: replace(p, slot=put(p.slot, (0, 0), 3))),
    "slot below -1": ("slot", lambda p: replace(p, slot=put(p.slot, (1, 3), -2))),
    "empty slot": ("valid", lambda p: replace(p, valid=put(p.valid, (1, 0), True))),
    "used slot marked as padding": ("valid", lambda p: replace(p, valid=put(p.valid, (0, 1), False))),
    "slot that lost its members": ("valid", lambda p: replace(p, slot=put(p.slot, (0, 5), 1))),
    "shares above one": ("weight", lambda p: replace(p, weight=put(p.weight, (0, 0), 0.9))),
    "shares below one": ("weight", lambda p: replace(p, weight=put(p.weight, (0, 5), 0.0))),
    "negative share": (
        "weight",
        lambda p: replace(p, weight=put(put(p.weight, (0, 0), -1 / 3), (0, 1), 1.0)),
    ),
    "share that is no number": ("weight", lambda p: replace(p, weight=put(p.weight, (0, 0), float("nan")))),
    "share of a dropped token": ("weight", lambda p: replace(p, weight=put(p.weight, (1, 3), 0.1))),
    "share of padding": ("weight", lambda p: replace(p, weight=put(p.weight, (1, 0), 0.1))),
    "size too large": ("size", lambda p: replace(p, size=put(p.size, (0, 0), 4))),
    "size too small": ("size", lambda p: replace(p, size=put(p.size, (0, 1), 1))),
    "size of a padding slot": ("size", lambda p: replace(p, size=put(p.size, (1, 0), 1))),
    "equal positions": ("position", lambda p: replace(p, position=put(p.position, (0, 0), int(p.position[0, 1])))),
    "falling positions": ("position", lambda p: replace(p, position=p.position.flip(1))),
}


@pytest.mark.parametrize("law", BROKEN)
def test_check_names_the_broken_law(law: str, view: TokenView, plan: MergePlan) -> None:
    name, spoil = BROKEN[law]
    with pytest.raises(ValueError, match=f"^{name}: "):
        spoil(plan).check(view)


def test_check_sees_a_protected_token_with_company(view: TokenView, plan: MergePlan) -> None:
    with pytest.raises(ValueError, match=r"^protected: "):
        plan.check(replace(view, protected=put(view.protected, (0, 4), True)))


def test_check_sees_a_dropped_protected_token(view: TokenView, plan: MergePlan) -> None:
    with pytest.raises(ValueError, match=r"^protected: "):
        plan.check(replace(view, protected=put(view.protected, (1, 3), True)))


def test_check_lets_padding_be_marked_as_protected(view: TokenView, plan: MergePlan) -> None:
    plan.check(replace(view, protected=put(view.protected, (1, 0), True)))


@prop(80)
@given(st.data())
def test_check_finds_any_single_change_of_a_slot_or_a_size(data: st.DataObject) -> None:
    """Over distinct sizes no other slot number and no other size makes a lawful plan of the same rest."""
    view = data.draw(views(max_tokens=8, merged=False, protect=("none", "ends")))
    view = replace(view, size=2 ** torch.arange(view.valid.shape[1]).expand_as(view.valid) * view.valid)
    plan = data.draw(plans(view))
    row = data.draw(st.integers(0, len(view.valid) - 1))
    token = data.draw(st.integers(0, view.valid.shape[1] - 1))
    slot = data.draw(st.integers(-1, plan.slots))
    assume(slot != int(plan.slot[row, token]))
    with pytest.raises(ValueError, match=r"^(slot|valid|weight|size|protected): "):
        replace(plan, slot=put(plan.slot, (row, token), slot)).check(view)


def moves(view: TokenView, count: int, seed: int, drop: bool) -> tuple[Tensor, Tensor | None]:
    """Random tokens that go, ``count`` of each row, and random ones of those that stay for them to merge into."""
    rng, prefix = generator(seed), view.prefix or 0
    order = [torch.randperm(view.hidden.shape[1] - prefix, generator=rng) + prefix for _ in view.hidden]
    source = torch.stack([o[:count] for o in order])
    into = [o[count:][torch.randint(max(1, len(o) - count), (count,), generator=rng)] for o in order]
    return source, None if drop else torch.stack(into)


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_from_moves_is_the_plan_that_anchors_give(tokens: int, prefix: int, drop: bool) -> None:
    free = tokens - prefix
    for count in {0, 1, free // 2, free - 1} if free > 1 else {0} if free == 1 else ():
        view = make(2, tokens, prefix, tokens + count, merged=True, dtype=torch.float64)
        source, into = moves(view, count, count, drop)
        share = None if count % 2 else view.size.double()
        plan = MergePlan.from_moves(view, source, into, share)
        plan.check(view)
        assert plan.slots == tokens - count
        anchor = torch.ones(2, tokens, dtype=torch.bool).scatter(1, source, False)
        leader = None if into is None else torch.full((2, tokens), -1).scatter(1, source, into)
        want = MergePlan.from_anchors(view, anchor, leader, share)
        for name in ("slot", "position", "size", "valid"):
            assert torch.equal(getattr(plan, name), getattr(want, name)), name
        torch.testing.assert_close(plan.weight, want.weight, rtol=1e-12, atol=0)
        torch.testing.assert_close(plan.merge(view.hidden), loop_merge(plan, view.hidden), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(plan.unmerge(plan.merge(view.hidden)), want.unmerge(want.merge(view.hidden)))
        # who leads is known, and those who moved are named
        assert torch.equal(plan.slot.gather(1, plan.seat), torch.arange(plan.slots).expand(2, -1))
        assert plan.moved is (None if drop else source)


@prop(60)
@given(seeds, st.sampled_from(PREFIXES), st.integers(2, 30), st.booleans(), st.booleans())
def test_moves_compose_and_still_know_who_moved(seed: int, prefix: int, free: int, drop: bool, mixed: bool) -> None:
    view = make(2, prefix + free, prefix, seed, merged=True, dtype=torch.float64)
    source, into = moves(view, free // 2, seed, drop)
    first = MergePlan.from_moves(view, source, into, view.size)
    between = TokenView(first.merge(view.hidden), position=first.position, size=first.size, prefix=prefix)
    left = free - free // 2
    source, into = moves(between, left // 2, seed + 1, drop != mixed)
    then = MergePlan.from_moves(between, source, into, between.size)
    both = first.compose(then)
    both.check(view)
    assert (both.seat is None) is mixed
    torch.testing.assert_close(both.merge(view.hidden), then.merge(between.hidden), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(both.merge(view.hidden), loop_merge(both, view.hidden), rtol=1e-9, atol=1e-9)
    if both.seat is not None:
        assert torch.equal(view.position.gather(1, both.seat), both.position)
        assert torch.equal(both.slot.gather(1, both.seat), torch.arange(both.slots).expand(2, -1))
        for row in range(2):
            led = set(both.seat[row].tolist())
            rest = {i for i, s in enumerate(both.slot[row].tolist()) if s >= 0 and i not in led}
            assert rest == (set() if both.moved is None else set(both.moved[row].tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moves_copy_slots_of_one_to_the_bit_and_flow_back(dtype: torch.dtype) -> None:
    view = make(2, 40, 1, 0, dtype=dtype)
    source, into = moves(view, 15, 3, drop=False)
    plan, x = MergePlan.from_moves(view, source, into), view.hidden.clone().requires_grad_()
    merged = plan.merge(x)
    assert merged.dtype == dtype
    single = torch.zeros(2, plan.slots).scatter_add(1, plan.slot, torch.ones(2, 40)) == 1
    assert torch.equal(merged[single], view.hidden.gather(1, plan.seat[..., None].expand_as(merged))[single])
    merged.float().sum().backward()
    torch.testing.assert_close(x.grad.float(), plan.weight[..., None].expand_as(x).float(), rtol=0.01, atol=0)


def test_a_side_for_padding_slots_can_be_named() -> None:
    view = TokenView(torch.zeros(2, 4, 1))
    anchor = torch.tensor([[True, True, True, True], [True, False, False, True]])
    assert MergePlan.from_anchors(view, anchor).valid[1].tolist() == [False, False, True, True]
    plan = MergePlan.from_anchors(view, anchor, pads_left=False)
    assert plan.valid[1].tolist() == [True, True, False, False] and plan.slot[1].tolist() == [0, -1, -1, 1]
