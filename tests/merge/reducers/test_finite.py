"""Finite tokens make finite plans and finite slots, whatever their scale: no method divides zero by zero."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefix_views import as_masks, prefix_views
from strategies import FLOATS, generator, prop, seeds, views
from torch import Tensor

from quickmerge.merge.reducers import (
    REDUCERS,
    VISUAL_TOKEN_REDUCERS,
    DynamicViT,
    Reducer,
    make_reducer,
    select_visual_tokens,
)
from quickmerge.merge.reducers.dynamicvit import Predictor
from quickmerge.merge.reducers.pooling import GridMerge
from quickmerge.merge.tokens import Count, Entropy, Evidence, Mass, TokenView
from quickmerge.merge.tokens.removal import fill_dropped, gumbel_keep, kept_mean, masked_softmax
from quickmerge.merge.tokens.selection import cover, disperse

SCALES = (0.0, 1e-30, 1.0, 1e6)
"""Of features: none, so small that squares vanish in float32, usual ones, and larger than those of any model."""


def changed(view: TokenView, **fields: Any) -> TokenView:
    """`replace`, also of a view whose prefix says what is valid and protected."""
    beside = {name: fields.pop(name) for name in list(fields) if name in Evidence.__annotations__}
    masks = {} if view.prefix is None else {"valid": None, "protected": None}
    return replace(view, evidence=replace(view.evidence, **beside), **masks, **fields)


def scaled(view: TokenView, scale: float, seed: int) -> TokenView:
    """The view with its features, and those of half of its tokens once more, on another scale."""
    odd = torch.rand(view.hidden.shape[:2], generator=generator(seed)) < 0.5

    def change(x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, x * scale, x)

    return changed(
        view,
        hidden=change(view.hidden, odd[..., None]),
        attention=tuple(
            replace(t, query=t.query * scale, key=t.key * scale, value=change(t.value, odd[:, None, :, None]))
            for t in view.evidence.attention
        ),
    )


def assert_finite(reducer: Reducer, view: TokenView) -> None:
    plan = reducer.plan(view)
    slots = reducer.combine(view, plan, view.hidden)
    assert bool(plan.weight.isfinite().all())
    assert bool(slots[plan.valid].isfinite().all()), reducer
    assert bool((plan.valid.sum(-1) >= 1).all())


def settings(reducer: type[Reducer]) -> dict[str, Any]:
    return {"layers": 2} if "layers" in {f.name for f in fields(reducer)} else {}


@pytest.mark.parametrize("name", REDUCERS)
@prop(20)
@given(data=st.data(), scale=st.sampled_from(SCALES), seed=seeds, tokens=st.integers(1, 20))
def test_of_text(name: str, data: st.DataObject, scale: float, seed: int, tokens: int) -> None:
    view = scaled(data.draw(views(attention=2, garbage=False)), scale, seed)
    budgets = [Count(tokens)] if name in ("tome", "uniform") else [Count(tokens), Entropy(), Mass(0.5)]
    for budget in budgets:
        assert_finite(make_reducer(name, keep=budget, **settings(REDUCERS[name])), view)


@pytest.mark.parametrize("name", VISUAL_TOKEN_REDUCERS)
@prop(20)
@given(data=st.data(), scale=st.sampled_from(SCALES), seed=seeds, tokens=st.integers(1, 20), masks=st.booleans())
def test_of_images(name: str, data: st.DataObject, scale: float, seed: int, tokens: int, masks: bool) -> None:
    view = scaled(data.draw(prefix_views(max_patches=20)), scale, seed)
    text = torch.randn(view.hidden.shape[0], 2, view.hidden.shape[-1], generator=generator(seed)) * scale
    view = changed(as_masks(view) if masks else view, text=text.to(view.hidden.dtype))
    more = {"layers": 1} if name == "attention" else {}
    assert_finite(make_reducer(name, place="visual", keep=Count(tokens), **more), view)


@prop(30)
@given(view=prefix_views(max_patches=20, prefixes=(0,)), scale=st.sampled_from(SCALES), seed=seeds)
def test_of_grids(view: TokenView, scale: float, seed: int) -> None:
    assert_finite(GridMerge(keep=Count(3)), as_masks(scaled(view, scale, seed)))


@prop(30)
@given(view=prefix_views(max_patches=20, dtypes=(torch.float32,)), scale=st.sampled_from(SCALES), seed=seeds)
def test_of_learnt_predictors(view: TokenView, scale: float, seed: int) -> None:
    torch.manual_seed(seed % 1000)
    wide = changed(view, hidden=view.hidden.mean(-1, keepdim=True).expand(-1, -1, 8), layer=3)
    predictors = torch.nn.ModuleList(Predictor(8).requires_grad_(False) for _ in range(3))
    for budget in (Count(3), Entropy()):
        assert_finite(DynamicViT(budget, predictors), as_masks(scaled(wide, scale, seed)))


@pytest.mark.parametrize("name", VISUAL_TOKEN_REDUCERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_of_nothing_but_zeros(name: str, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 12, 4, dtype=dtype)
    settings = {"switch": 0} if name == "tofu" else {}
    reducer = make_reducer(name, place="visual", keep=0.25, **settings)
    zeros = torch.zeros(2, 12)
    kept, plan = select_visual_tokens(x, reducer, saliency=zeros, key=x, text=x[:, :3], grid=(1, 3, 4))
    assert kept.sum(-1).tolist() == [3, 3] and bool(plan.merge(x).isfinite().all())


@prop(40)
@given(seeds, st.integers(1, 8), st.integers(0, 8), st.sampled_from(SCALES), st.sampled_from(FLOATS), st.booleans())
def test_of_choices_together(seed: int, n: int, count: int, scale: float, dtype: torch.dtype, lazy: bool) -> None:
    rng = generator(seed)
    x = (torch.randn(2, n, 3, generator=rng) * scale).to(dtype)
    open_ = torch.rand(2, n, generator=rng) < 0.5
    saliency = torch.rand(2, n, generator=rng) * scale
    for chosen in (
        cover(x, count, saliency, 0.5, open_, lazy),
        disperse(x, count, open_),
        disperse(x, count, open_, "min"),
    ):
        assert torch.equal(chosen.mask.sum(-1), open_.sum(-1).clamp_max(count)) and not bool(
            (chosen.mask & ~open_).any()
        )


@prop(40)
@given(seeds, st.integers(1, 6), st.sampled_from(SCALES), st.sampled_from((*FLOATS, torch.float16)))
def test_of_policies(seed: int, n: int, scale: float, dtype: torch.dtype) -> None:
    """Also where nobody is kept, and where draws are so few bits that some are zero."""
    rng = generator(seed)
    scale = min(scale, 1e4)
    x = (torch.randn(2, n, 3, generator=rng) * scale).to(dtype)
    mask = (torch.rand(2, n, generator=rng) < 0.4).to(dtype)
    scores = (torch.randn(2, 1, n, n, generator=rng) * scale).to(dtype)
    found = [kept_mean(x, mask), fill_dropped(x, mask), masked_softmax(scores, mask)]
    found.append(gumbel_keep((torch.randn(512, 2, generator=rng)).to(dtype).log_softmax(-1), generator=rng))
    assert all(bool(each.isfinite().all()) for each in found)
    assert set(found[-1].tolist()) <= {0.0, 1.0}
