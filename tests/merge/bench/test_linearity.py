"""Functional linearity against its definition, one pair and one step at a time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, VideoMAEConfig, VideoMAEModel

from quickmerge.errors import UnsupportedModelError
from quickmerge.merge.bench.linearity import _linearity, functional_linearity, suggested_switch

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}


def model_of(**more: Any) -> Dinov2Model:
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(**SIZES, image_size=32, patch_size=8, **more)).eval()


def pixels(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def slow(f: Any, x: Tensor, pairs: int, steps: int, seed: int) -> float:
    """The same draw of pairs, then the definition."""
    rng = torch.Generator().manual_seed(seed)
    image = torch.randint(len(x), (pairs,), generator=rng).tolist()
    first = torch.randint(x.shape[1], (pairs,), generator=rng).tolist()
    apart = torch.randint(1, x.shape[1], (pairs,), generator=rng).tolist()
    found = []
    for k, i, d in zip(image, first, apart, strict=True):
        one, two = x[k, i], x[k, (i + d) % x.shape[1]]
        assert not torch.equal(one, two)
        points = [f(((1 - s / steps) * one + s / steps * two)[None, None])[0, 0].double() for s in range(steps + 1)]
        path = math.fsum(float((b - a).norm()) for a, b in itertools.pairwise(points))
        found.append(float((points[-1] - points[0]).norm()) / path)
    return sum(found) / pairs


def test_every_block_by_its_definition() -> None:
    model, x = model_of(), pixels()
    got = functional_linearity(model, x, pairs=9, steps=5, seed=3)
    inputs: list[Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for layer in model.encoder.layer
    ]
    with torch.no_grad():
        model(x)
        for hook in hooks:
            hook.remove()
        want = [slow(layer.mlp, h, 9, 5, 3) for layer, h in zip(model.encoder.layer, inputs, strict=True)]
    assert got.shape == (3,) and got.tolist() == pytest.approx(want, rel=1e-5)
    assert ((got > 0) & (got < 1)).all()


def test_a_block_that_adds_its_input_itself_is_taken_without() -> None:
    torch.manual_seed(0)
    config = VideoMAEConfig(**SIZES, intermediate_size=32, image_size=16, patch_size=8, num_frames=4)
    model = VideoMAEModel(config).eval()
    x = torch.randn(1, 4, 3, 16, 16)
    got = functional_linearity(model, x, pairs=6)
    layer, inputs = model.encoder.layer[1], []
    hook = layer.intermediate.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(x)
        hook.remove()
        want = slow(lambda h: layer.output.dense(layer.intermediate(h)), inputs[0], 6, 8, 0)
    assert float(got[1]) == pytest.approx(want, rel=1e-5)


def test_one_for_a_linear_map_and_less_for_one_that_bends() -> None:
    torch.manual_seed(0)
    x = 20 * torch.randn(2, 9, 8)
    with torch.no_grad():
        assert float(_linearity(nn.Linear(8, 5), x, 40, 8, 0)) == pytest.approx(1.0, abs=1e-5)
        bent = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        assert float(_linearity(bent, x, 40, 8, 0)) < 0.99
        # there and back again ends where it began
        assert float(_linearity(lambda y: (y / 20).sin() * 0 + 3.0, x, 10, 8, 0)) == 1.0
        turned = [float(_linearity(bent, x.flip(1), 1, 8, seed)) for seed in range(3)]
        assert all(0 <= t <= 1 for t in turned)


def test_the_way_back_is_as_long_as_the_way_there() -> None:
    torch.manual_seed(0)
    bent = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
    two = 10 * torch.randn(1, 2, 4)
    with torch.no_grad():
        there, back = (float(_linearity(bent, x, 1, 8, 0)) for x in (two, two.flip(1)))
    assert there == pytest.approx(back, rel=1e-5) and there < 1


def test_seeds_repeat_themselves_and_leave_the_world_alone() -> None:
    model, x = model_of(drop_path_rate=0.3, hidden_dropout_prob=0.3), pixels()
    model.train()
    model.encoder.layer[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    one, two, other = (functional_linearity(model, x, pairs=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters()) and not one.requires_grad


def test_hooks_go_when_the_model_fails() -> None:
    model = model_of()
    with pytest.raises(ValueError):
        functional_linearity(model, torch.randn(2, 5, 32, 32))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("linearity", "switch"),
    [
        ([0.2, 0.3, 0.8, 0.9], 2),
        ([0.2, 0.9, 0.3, 0.8, 0.9], 3),
        ([0.9, 0.8, 0.3, 0.2], 4),
        ([0.5, 0.5, 0.5], 0),
        ([0.5], 0),
        ([0.1, 0.55, 1.0], 1),
    ],
)
def test_the_switch_stands_where_all_that_follow_are_nearer_to_the_best(linearity: list[float], switch: int) -> None:
    assert suggested_switch(torch.tensor(linearity, dtype=torch.float64)) == switch


def test_what_is_refused() -> None:
    for bad in (torch.ones(0), torch.ones(2, 2), torch.tensor([0.5, math.nan])):
        with pytest.raises(ValueError, match="linearity must be a row of finite numbers"):
            suggested_switch(bad)
    with pytest.raises(ValueError, match="pairs must be a whole number of at least 1, got 0"):
        functional_linearity(model_of(), pixels(), pairs=0)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 2, got 1"):
        functional_linearity(model_of(), pixels(), steps=1)
    with pytest.raises(UnsupportedModelError):
        functional_linearity(nn.Linear(2, 2), pixels())  # type: ignore[arg-type]
