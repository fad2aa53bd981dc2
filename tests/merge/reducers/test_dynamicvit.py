"""DynamicViT's predictors, and what they drop."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import vision_samples
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, up_to
from torch import Tensor, nn

from quickmerge.errors import QuickmergeError
from quickmerge.merge.attach import reduce
from quickmerge.merge.reducers.dynamicvit import DynamicViT, Predictor, even_stages
from quickmerge.merge.tokens.budget import Count, Entropy, Ratio
from quickmerge.merge.tokens.removal import Removal
from quickmerge.merge.tokens.view import Evidence, TokenView
from quickmerge.models.identity import model_hash


def predictors(width: int = 8, stages: int = 3, seed: int = 0) -> nn.ModuleList:
    torch.manual_seed(seed)
    made = nn.ModuleList(Predictor(width) for _ in range(stages))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.eval()


def slow_predictor(p: Predictor, x: Tensor, mask: Tensor) -> Tensor:
    """One image and one patch at a time, in float64."""

    def gelu(v: Tensor) -> Tensor:
        return torch.stack([a * 0.5 * (1 + math.erf(float(a) / math.sqrt(2))) for a in v])

    def linear(layer: nn.Linear, v: Tensor) -> Tensor:
        return layer.weight.double() @ v + layer.bias.double()

    width, out = p.width, torch.zeros(*x.shape[:2], 2, dtype=torch.float64)
    for b in range(len(x)):
        z = []
        for v in x[b].double():
            normed = (v - v.mean()) / (v.var(unbiased=False) + p.norm.eps).sqrt()
            z.append(gelu(linear(p.project, normed * p.norm.weight.double() + p.norm.bias.double())))
        left = [z[i] for i in range(x.shape[1]) if mask[b, i] > 0]
        around = sum(left)[width // 2 :] / len(left) if left else torch.zeros(width // 2, dtype=torch.float64)
        for i in range(x.shape[1]):
            v = torch.cat([z[i][: width // 2], around])
            v = gelu(linear(p.decide[0], v))
            v = linear(p.decide[4], gelu(linear(p.decide[2], v)))
            out[b, i] = v - v.exp().sum().log()
    return out


@prop(15)
@given(up_to(3), st.integers(1, 7), st.sampled_from([4, 8, 12]), st.integers(0, 999))
def test_a_predictor_is_its_slow_statement(batch: int, patches: int, width: int, seed: int) -> None:
    p, draws = predictors(width, 1, seed)[0], generator(seed)
    x = torch.randn(batch, patches, width, generator=draws)
    mask = (torch.rand(batch, patches, generator=draws) < 0.5).float()
    with torch.no_grad():
        got = p(x, mask)
        torch.testing.assert_close(got.double(), slow_predictor(p, x, mask), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.exp().sum(-1), torch.ones(batch, patches))


def test_an_image_with_nothing_left_has_a_prediction_and_a_gradient() -> None:
    p = predictors(8, 1)[0]
    out = p(torch.randn(2, 5, 8), torch.zeros(2, 5))
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert all(bool(each.grad.isfinite().all()) for each in p.parameters())


def test_it_has_as_many_parameters_as_the_published_one() -> None:
    assert sum(x.numel() for x in Predictor(384).parameters()) == pytest.approx(241_000, rel=0.01)


@prop(25)
@given(up_to(3), st.sampled_from([0, 1, 2, 5]), st.integers(1, 20), st.floats(0.01, 1), st.integers(0, 999))
def test_the_likeliest_stay_in_raster_order(batch: int, prefix: int, patches: int, keep: float, seed: int) -> None:
    view = TokenView(
        torch.randn(batch, prefix + patches, 8, generator=generator(seed)),
        prefix=prefix,
        evidence=Evidence(layer=6, depth=12),
    )
    left = max(1, prefix + int(patches * keep))
    method = DynamicViT(Count(left), predictors(8, 3, seed))
    plan = method.plan(view)
    plan.check(view)
    assert plan.slots == left
    with torch.no_grad():
        p = slow_predictor(method.predictors[1], view.hidden[:, prefix:], torch.ones(batch, patches))[..., 0]
    for row in range(batch):
        kept = plan.position[row].tolist()
        assert kept == sorted(kept) and kept[:prefix] == list(range(prefix))
        chosen = [place - prefix for place in kept[prefix:]]
        gone = [i for i in range(patches) if i not in chosen]
        if chosen and gone:
            assert float(p[row][chosen].min()) >= float(p[row][gone].max()) - 1e-5
        alone = TokenView(view.hidden[row : row + 1], prefix=prefix, evidence=Evidence(layer=6, depth=12))
        assert torch.equal(method.plan(alone).position[0], plan.position[row])


@pytest.mark.parametrize("budget", [Ratio(0.5), Count(5), Entropy(0.7)])
def test_any_budget_with_padding_keeps_what_a_known_prefix_would(budget) -> None:
    """Two rows of 9 and 7 tokens in one batch against the same rows alone."""
    hidden = torch.randn(2, 9, 8, generator=generator(3))
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 7:] = False
    protected = (torch.arange(9) < 2) & valid
    view = TokenView(hidden, valid=valid, protected=protected, evidence=Evidence(layer=3, depth=12))
    method = DynamicViT(budget, predictors())
    plan = method.plan(view)
    plan.check(view)
    for row, n in enumerate((9, 7)):
        single = DynamicViT(budget, method.predictors).plan(
            TokenView(hidden[row, None, :n], prefix=2, evidence=Evidence(layer=3, depth=12))
        )
        assert plan.position[row][plan.valid[row]].tolist() == single.position[0].tolist()


@pytest.mark.parametrize(("depth", "stages", "blocks"), [(12, 3, (3, 6, 9)), (16, 3, (4, 8, 12)), (4, 1, (2,)),
                                                         (20, 3, (5, 10, 15))])  # fmt: skip
def test_stages_lie_where_the_paper_has_them(depth: int, stages: int, blocks: tuple[int, ...]) -> None:
    assert even_stages(depth, stages) == blocks == DynamicViT(0.7, predictors(8, stages)).stages(depth)


def test_the_host_leaves_the_powers_of_keep() -> None:
    """``int(N keep^s)`` of 16 patches behind one class token, without naming blocks."""
    model, _ = vision_samples.make("vit")
    method = DynamicViT(0.7, predictors(32))
    with torch.no_grad(), reduce(model, method) as run:
        out = model(vision_samples.pictures("vit"))
    assert out.logits.shape == (2, 3)
    assert run.summary().tokens_per_block == [17, 1 + int(16 * 0.7), 1 + int(16 * 0.49), 1 + int(16 * 0.343)]


def test_keeping_all_is_the_model_itself_to_the_bit() -> None:
    model, _ = vision_samples.make("vit")
    pixels = vision_samples.pictures("vit")
    with torch.no_grad():
        dense = model(pixels).logits
        with reduce(model, DynamicViT(1.0, predictors(32))):
            assert torch.equal(model(pixels).logits, dense)


def test_it_compiles_without_a_break() -> None:
    """Plan and gather of one stage: shapes alone decide."""
    method = DynamicViT(Count(6), predictors())

    def stage(x: Tensor) -> Tensor:
        view = TokenView(x, prefix=1, evidence=Evidence(layer=3, depth=12))
        return method.plan(view).merge(x)

    x = torch.randn(2, 11, 8, generator=generator(1))
    compiled = torch.compile(stage, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), stage(x))


def test_half_precision_tokens_are_read() -> None:
    view = TokenView(torch.randn(2, 9, 8).bfloat16(), prefix=1, evidence=Evidence(layer=3, depth=12))
    assert DynamicViT(Count(4), predictors()).plan(view).slots == 4


def test_saved_and_loaded_it_is_the_same(tmp_path) -> None:
    model, _ = vision_samples.make("vit")
    known = {"model": "tiny", "hash": model_hash(model)}
    one = DynamicViT(0.6, predictors(32), (1, 2, 3), known)
    one.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    two = DynamicViT.from_pretrained(tmp_path)
    assert (two.keep, two.layers, two.trained_for, two.label) == (0.6, (1, 2, 3), known, "dynamicvit:layers=1,2,3")
    state = two.predictors.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.predictors.state_dict().items())
    assert not two.predictors.training and not any(x.requires_grad for x in two.predictors.parameters())
    assert DynamicViT.from_pretrained(tmp_path, 0.3).keep == 0.3
    with reduce(model, two):
        model(vision_samples.pictures("vit"))
    other, _ = vision_samples.make("vit", seed=1)
    with pytest.raises(QuickmergeError, match="model must be the one that the predictors were trained for, tiny"):
        reduce(other, two)
    with pytest.raises(QuickmergeError, match="layer must be None or 1,2,3 for these predictors, got 2,3"):
        reduce(model, two, [2, 3])
    with pytest.raises(QuickmergeError, match="got a Removal"):
        reduce(model, two, Removal(2))


@pytest.mark.parametrize(
    "damage", ["cut", "nan", "kind", "width", "stages", "layers", "trained_for", "json", "missing"]
)
def test_damaged_folders_are_told_in_one_sentence(damage: str, tmp_path) -> None:
    made = predictors()
    if damage == "nan":
        nn.init.constant_(made[1].project.bias, torch.nan)
    DynamicViT(0.6, made).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    read = json.loads(config.read_text())
    changes = {"kind": "other", "width": 12, "stages": 2, "layers": [3], "trained_for": [[]]}
    if damage in changes:
        config.write_text(json.dumps({**read, damage: changes[damage]}))
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "json":
        config.write_text("{")
    elif damage == "missing":
        weights.unlink()
    with pytest.raises(QuickmergeError) as told:
        DynamicViT.from_pretrained(tmp_path)
    assert "\n" not in str(told.value) and str(tmp_path) in str(told.value)


def test_settings_are_checked() -> None:
    for width in (6, 0, 2.0):
        with pytest.raises(ValueError, match="width must be a"):
            Predictor(width)
    for given_ in (None, [Predictor(8)], nn.ModuleList(), nn.ModuleList([nn.Linear(2, 2)])):
        with pytest.raises(ValueError, match=r"predictors must be an nn.ModuleList of trained Predictors"):
            DynamicViT(0.5, given_)
    for layers in ((3, 6), (3, 6, 6), (6, 3, 9)):
        with pytest.raises(ValueError, match=r"layers must be 3 rising blocks, one for each predictor, got \["):
            DynamicViT(0.5, predictors(), layers)
    with pytest.raises(ValueError, match="keep must be a number"):
        DynamicViT(1.5, predictors())
    method = DynamicViT(0.5, predictors())
    with pytest.raises(ValueError, match="layers must be named for 3 predictors in a model of 3 blocks"):
        method.stages(3)
    with pytest.raises(ValueError, match=r"layers must lie in 0..7 for this model, got \[3, 6, 9\]"):
        DynamicViT(0.5, predictors(), (3, 6, 9)).stages(8)
    hidden = torch.randn(1, 5, 8)
    for more, message in [
        ({}, "layer and depth must be known"),
        ({"layer": 4, "depth": 12}, "layer must be one of 3,6,9 for these predictors, got 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            method.plan(TokenView(hidden, prefix=1, evidence=Evidence(**more)))
    with pytest.raises(ValueError, match="hidden must have 8 features for these predictors, got 12"):
        method.plan(TokenView(torch.randn(1, 5, 12), prefix=1, evidence=Evidence(layer=3, depth=12)))
    with pytest.raises(QuickmergeError, match=r"keep must be a number .* to be saved"):
        DynamicViT(Count(3), predictors()).save_pretrained("nowhere")


def test_equality_is_of_settings_and_of_the_networks_themselves() -> None:
    made = predictors()
    assert DynamicViT(0.5, made) == DynamicViT(0.5, made) != DynamicViT(0.5, predictors())
    assert hash(DynamicViT(0.5, made)) == hash(DynamicViT(0.5, made))
    assert "Predictor" not in repr(DynamicViT(0.5, made))
    assert DynamicViT(0.5, made).weights_bytes == 4 * sum(x.numel() for x in made.parameters())


def test_one_method_serves_models_on_two_devices_at_once_and_moves_for_none() -> None:
    model, _ = vision_samples.make("vit")
    elsewhere = copy.deepcopy(model).to("meta")
    pixels, method = vision_samples.pictures("vit"), DynamicViT(0.7, predictors(32))
    with torch.no_grad():
        with reduce(model, method):
            alone = model(pixels).logits
        with reduce(elsewhere, method) as far, reduce(model, method) as near:
            out = elsewhere(pixels.to("meta")).logits
            assert torch.equal(model(pixels).logits, alone)
        with reduce(model, method):
            assert torch.equal(model(pixels).logits, alone)
    assert out.is_meta and out.shape == alone.shape
    assert near.reducer is method and all(p.is_meta for p in far.reducer.predictors.parameters())
    assert not any(p.is_meta for p in method.predictors.parameters())
