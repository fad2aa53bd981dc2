"""Predicting slots and drawing new ones, from what may be known of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds

from quickmerge.errors import QuickmergeError
from quickmerge.merge.prior import Prior, PriorConfig
from quickmerge.merge.prior.layout import layout_of, predict, read_slots, sample
from quickmerge.merge.reducers.pooling import GridMerge
from quickmerge.merge.tokens import Entropy, MergePlan, TokenView


def build(axes: int = 2, **more) -> Prior:
    """A small prior that generates, with every weight drawn and an odd scale of features."""
    torch.manual_seed(0)
    shape = {"features": 5, "width": 16, "layers": 2, "heads": 2, "pool": 0, "saliency": False, **more}
    prior = Prior(PriorConfig(axes=axes, **shape))
    for parameter in prior.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.3)
    prior.calibrate(torch.randn(50, 5) * torch.tensor([1.0, 5, 0.1, 2, 3]) + 4)
    return prior.double().eval()


def picture(seed: int, grid: tuple[int, int, int] = (1, 4, 5), batch: int = 2) -> TokenView:
    n = grid[0] * grid[1] * grid[2]
    return TokenView(torch.randn(batch, n, 5, generator=generator(seed), dtype=torch.float64) + 4, grid=grid)


def slowly(prior: Prior, view: TokenView, plan: MergePlan, start: int) -> torch.Tensor:
    """Row by row and slot by slot, reading everything anew for each; no cache, temperature 0."""
    out = torch.zeros(len(plan.valid), plan.slots, 5, dtype=torch.float64)
    merged, layout = plan.merge(view.hidden), layout_of(prior, view, plan)
    for row in range(len(out)):
        slots = plan.valid[row].nonzero().flatten().tolist()
        for rank, k in enumerate(slots):
            if rank < start:
                out[row, k] = merged[row, k]
            elif rank == 0:
                out[row, k] = prior.mean
            else:
                before = slots[:rank]
                after = slots[1 : rank + 1]
                encoded = prior.encoder.content((out[row, before] - prior.mean) / prior.std)
                encoded = encoded + layout.place[row, before] + layout.aim[row, after] + prior.direction.weight[0]
                position, every = layout.position[row], torch.ones(1, rank, dtype=torch.bool)
                state = prior.trunk(encoded[None], position[before][None], every, None, position[after][None])[0, -1]
                target = prior.head.sample(state + layout.aim[row, k], temperature=0)
                if prior.config.axes == 3:
                    target = target + nearby(prior, (out[row, before] - prior.mean) / prior.std, position, before, k)
                out[row, k] = target * prior.std + prior.mean
    return out


def nearby(prior: Prior, known: torch.Tensor, position: torch.Tensor, before: list[int], k: int) -> torch.Tensor:
    """The mean of known slots, nearer ones counting more."""
    *falls, mean = prior.nearness.exp().tolist()
    total, copied = mean, torch.zeros(5, dtype=torch.float64)
    for x, j in zip(known, before, strict=True):
        steps = (position[k] - position[j]).tolist()
        weight = math.exp(-sum(fall * step**2 for fall, step in zip(falls, steps, strict=True)))
        total, copied = total + weight, copied + weight * x
    return copied / total


@pytest.mark.parametrize("head", ["gaussian", "mixture"])
@prop(12)
@given(seed=seeds, start=st.integers(0, 12), ragged=st.booleans(), video=st.booleans())
def test_drawing_with_a_cache_is_drawing_without(head: str, seed: int, start: int, ragged: bool, video: bool) -> None:
    prior = build(3 if video else 2, head=head)
    view = picture(seed, (2, 3, 3) if video else (1, 4, 5))
    if ragged:
        # saliency in few places, so that the first row keeps fewer slots
        view.hidden[0] *= (2 * torch.randn(view.hidden.shape[1], 1, generator=generator(seed))).exp()
    plan = GridMerge(keep=Entropy(0.5) if ragged else 0.5).plan(view)
    assert not ragged or not bool(plan.valid.all())
    with torch.no_grad():
        want = slowly(prior, view, plan, start)
    got = sample(prior, view, plan, start, temperature=0.0)
    torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-8)


@prop(12)
@given(seed=seeds, start=st.integers(0, 12))
def test_only_what_is_given_is_read(seed: int, start: int) -> None:
    prior, view = build(), picture(seed)
    plan = GridMerge(keep=0.5).plan(view)
    hidden = view.hidden.clone()
    hidden[plan.slot >= start] = 1e6
    other = TokenView(hidden, grid=view.grid)
    draws = [sample(prior, v, plan, start, generator=generator(seed)) for v in (view, other)]
    assert torch.equal(*draws)
    torch.testing.assert_close(draws[0][:, :start], plan.merge(view.hidden)[:, :start], rtol=0, atol=0)


def test_a_seed_repeats_and_another_does_not() -> None:
    prior, view = build(), picture(0)
    plan = GridMerge(keep=0.5).plan(view)
    one, two, three = (sample(prior, view, plan, 3, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and torch.equal(one[:, :3], three[:, :3])
    assert not bool((one[:, 3:] == three[:, 3:]).any())
    cold = sample(prior, view, plan, 3, temperature=1e-6, generator=generator(1))
    torch.testing.assert_close(cold, sample(prior, view, plan, 3, temperature=0), atol=0.1, rtol=0.1)


@prop(15)
@given(seed=seeds, ragged=st.booleans())
def test_predictions_are_the_means_of_what_training_scores(seed: int, ragged: bool) -> None:
    """For a Gaussian head the score is least where the target is the prediction."""
    prior, view = build(), picture(seed)
    plan = GridMerge(keep=Entropy(0.6) if ragged else 0.5).plan(view)
    got = predict(prior, view, plan)
    layout = layout_of(prior, view, plan)
    state = read_slots(prior, plan.merge(view.hidden), layout)
    for row in range(2):
        slots = plan.valid[row].nonzero().flatten().tolist()
        torch.testing.assert_close(got[row, slots[0]], prior.mean)
        for before, k in pairwise(slots):
            mean, _ = prior.head.moments((state[row, before] + layout.aim[row, k])[None])
            torch.testing.assert_close((got[row, k] - prior.mean) / prior.std, mean[0])
    assert not bool(got[~plan.valid].any())


@pytest.mark.parametrize("axes", [2, 3])
def test_predictions_do_not_read_ahead(axes: int) -> None:
    prior, view = build(axes), picture(3, (2, 3, 4) if axes == 3 else (1, 4, 5))
    plan = GridMerge(keep=0.5).plan(view)
    hidden = view.hidden.clone()
    hidden[plan.slot >= 4] += 10
    one, two = predict(prior, view, plan), predict(prior, TokenView(hidden, grid=view.grid), plan)
    assert torch.equal(one[:, :5], two[:, :5]) and not torch.equal(one[:, 5], two[:, 5])


def test_what_stands_still_is_predicted_in_video_by_a_head_that_says_nothing() -> None:
    prior, frame = build(3), picture(4, (1, 3, 3)).hidden
    for layer in (prior.head.to_mean, prior.head.to_raw):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    still = TokenView(frame.repeat(1, 6, 1), grid=(6, 3, 3))
    plan = GridMerge(keep=1.0).plan(still)
    got = predict(prior, still, plan)
    share = (got - still.hidden)[:, 9:].square().mean() / (still.hidden - prior.mean)[:, 9:].square().mean()
    assert float(share) < 0.05


def test_contents_come_back_in_their_own_scale() -> None:
    prior = build()
    slots = torch.randn(3, 5, dtype=torch.float64) * 7
    torch.testing.assert_close(prior.restore(prior.target(slots)), slots)


def test_what_does_not_fit_is_refused() -> None:
    view = picture(0)
    plan = GridMerge(keep=0.5).plan(view)
    reads_members = build(1, pool=4)
    with pytest.raises(QuickmergeError, match=r"must be one that reads the members of slots, got one that generates"):
        build().encode(view, plan)
    with pytest.raises(ValueError, match="pool must be 0 for axes=2: priors of images and video generate, got 4"):
        build(pool=4)
    for use in (predict, sample):
        with pytest.raises(QuickmergeError, match=r"prior must be one that generates \(pool 0\)"):
            use(reads_members, view, plan)
    with pytest.raises(ValueError, match="grid must be"):
        predict(build(), TokenView(view.hidden), plan)
    with pytest.raises(ValueError, match="hidden must have 5 features"):
        predict(build(), TokenView(view.hidden[..., :3], grid=view.grid), plan)
    for arguments, message in [
        ({"start": -1}, "start must be a whole number of at least 0, got -1"),
        ({"temperature": -1.0}, "temperature must be a finite number of at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(build(), view, plan, **arguments)
    with pytest.raises(ValueError, match="pool must be a whole number of at least 0, got -1"):
        PriorConfig(features=5, pool=-1)
