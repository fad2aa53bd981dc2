"""Vision transformers under a policy: masked is gathered, and gradients reach whoever decides."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import vision_samples
from strategies import generator
from torch import Tensor, nn

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.attach import reduce
from quickmerge.merge.reducers.dynamicvit import DynamicViT, Predictor
from quickmerge.merge.tokens.removal import gumbel_keep
from quickmerge.merge.vision.policy import policy_vit
from quickmerge.models.decoder import PREFIX

FAMILIES = [*vision_samples.CLASSIFIERS, *vision_samples.BARE]
LAYERS = (1, 2, 3)


def predictors(stages: int = 3, seed: int = 0) -> nn.ModuleList:
    torch.manual_seed(seed)
    made = nn.ModuleList(Predictor(32) for _ in range(stages))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def best(made: nn.ModuleList, keep: float, gradient: bool = False):
    """The decisions of inference: the int(N keep^s) likeliest of those left, one at least; with or without gradient."""

    def decide(stage: int, patches: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            score = made[stage](patches, mask)[..., 0].masked_fill(mask == 0, -torch.inf)
        left = max(1, int(patches.shape[1] * keep ** (stage + 1) + 1e-9))
        chosen = torch.zeros_like(mask).scatter(1, score.topk(left, -1).indices, 1.0)
        return chosen.requires_grad_() if gradient else chosen

    return decide


def drawn(made: nn.ModuleList, seed: int = 0):
    draws = generator(seed)
    return lambda stage, patches, mask: gumbel_keep(made[stage](patches, mask), generator=draws)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("keep", "attention"), [(0.7, "sdpa"), (0.4, "eager")])
def test_masked_is_gathered(family: str, keep: float, attention: str) -> None:
    """With inference's decisions, by the masked softmax and by the model's own attention with a mask."""
    model, prefix = vision_samples.make(family)
    model.set_attn_implementation(attention)
    made, pixels = predictors(), vision_samples.pictures(family)
    with torch.no_grad(), reduce(model, DynamicViT(keep, made, LAYERS)):
        gathered = model(pixels)
    with torch.no_grad(), policy_vit(model, LAYERS, best(made, keep)) as run:
        fast = model(pixels)
    with policy_vit(model, LAYERS, best(made, keep, gradient=True)) as soft:
        masked = model(pixels)
    assert run.prefix == prefix
    assert [m.sum(-1).unique().tolist() for m in run.masks] == [m.sum(-1).unique().tolist() for m in soft.masks]
    for one in (fast, masked):
        got, wanted = vision_samples.answer(one), vision_samples.answer(gathered)
        if got.ndim == 3:  # a bare model's tokens: only those that were kept are there when gathered
            kept = torch.cat([torch.ones(len(got), prefix), run.masks[-1]], 1) > 0
            got = got[kept].view(wanted.shape)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(soft.features, run.features, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_dropped_does_not_count(family: str) -> None:
    """Other numbers in the place of dropped patches change nothing of what the model answers."""
    model, prefix = vision_samples.make(family)
    pixels, junk = vision_samples.pictures(family), False

    def decide(stage: int, patches: Tensor, mask: Tensor) -> Tensor:
        chosen = mask.clone()
        chosen[:, stage::3] = 0
        chosen[:, 1] = 1
        if junk:
            patches[(chosen * mask) == 0] = 3.0
        return chosen

    with torch.no_grad(), policy_vit(model, (1, 2), decide):
        clean = vision_samples.answer(model(pixels))
        junk = True
        littered = vision_samples.answer(model(pixels))
    if clean.ndim == 2:
        torch.testing.assert_close(littered, clean, atol=1e-6, rtol=1e-5)
    else:
        torch.testing.assert_close(littered[:, :prefix], clean[:, :prefix], atol=1e-6, rtol=1e-5)
        assert not torch.equal(littered, clean)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_predictor_and_masks_only_shrink(family: str) -> None:
    model, _ = vision_samples.make(family)
    made = predictors()
    with policy_vit(model.train(), LAYERS, drawn(made)) as run:
        answer = vision_samples.answer(model(vision_samples.pictures(family, batch=3)))
    answer.square().sum().backward()
    for stage, predictor in enumerate(made):
        for name, parameter in predictor.named_parameters():
            assert bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any()), (stage, name)
    for one, two in pairwise(run.masks):
        assert bool((two <= one).all()) and set(two.unique().tolist()) <= {0.0, 1.0}
    assert bool(run.masks[2].sum() < run.masks[0].sum())


def test_the_same_seed_draws_the_same_masks() -> None:
    model, _ = vision_samples.make("vit")
    pixels = vision_samples.pictures("vit")
    found = []
    for seed in (1, 1, 2):
        with policy_vit(model, LAYERS, drawn(predictors(), seed)) as run:
            model(pixels)
        found.append(torch.stack(run.masks))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_batch_is_its_rows() -> None:
    model, _ = vision_samples.make("registers")
    pixels, made = vision_samples.pictures("registers", batch=3), predictors()
    with torch.no_grad(), policy_vit(model, LAYERS, best(made, 0.5)):
        whole = model(pixels).logits
        rows = torch.cat([model(one[None]).logits for one in pixels])
    torch.testing.assert_close(whole, rows, atol=1e-5, rtol=1e-4)


def everything(stage: int, patches: Tensor, mask: Tensor) -> Tensor:
    return torch.ones_like(mask).requires_grad_()


def nothing(stage: int, patches: Tensor, mask: Tensor) -> Tensor:
    return (mask * 0).requires_grad_()


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_the_model_and_keeping_nothing_is_finite(family: str) -> None:
    model, _ = vision_samples.make(family)
    pixels = vision_samples.pictures(family)
    with torch.no_grad():
        dense = vision_samples.answer(model(pixels))
    with policy_vit(model, LAYERS, everything):
        torch.testing.assert_close(vision_samples.answer(model(pixels)), dense, atol=1e-5, rtol=1e-4)
    with policy_vit(model, LAYERS, nothing):
        assert bool(vision_samples.answer(model(pixels)).isfinite().all())


@pytest.mark.parametrize("family", ["vit", "dinov2", "siglip"])
def test_other_sizes_and_small_shares(family: str) -> None:
    """Larger images that are no square, at a tenth of the patches."""
    model, _ = vision_samples.make(family)
    pixels = vision_samples.pictures(family, size=(64, 40))
    more = {} if family == "dinov2" else {"interpolate_pos_encoding": True}
    made = predictors()
    with torch.no_grad(), reduce(model, DynamicViT(0.1, made, LAYERS)):
        gathered = model(pixels, **more).logits
    with policy_vit(model, LAYERS, drawn(made)) as run:
        logits = model(pixels, **more).logits
    logits.sum().backward()
    assert run.masks[0].shape == (2, 40) and bool(gathered.isfinite().all())
    assert all(bool(x.grad.isfinite().all()) for x in made.parameters())


def test_bfloat16_autocast_keeps_masks_and_softmax_in_float32() -> None:
    model, _ = vision_samples.make("beit")
    made, pixels = predictors(), vision_samples.pictures("beit")
    with policy_vit(model, LAYERS, best(made, 0.5, gradient=True)):
        wanted = model(pixels).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with policy_vit(model, LAYERS, best(made, 0.5, gradient=True)) as run:
            got = model(pixels).logits
        with torch.no_grad(), policy_vit(model, LAYERS, best(made, 0.5)):
            fast = model(pixels).logits
    assert run.masks[0].dtype == torch.float32
    for one in (got, fast):
        torch.testing.assert_close(one.float(), wanted, atol=0.1, rtol=0.1)


def test_it_leaves_the_model_as_it_was(untouched) -> None:
    model = untouched(vision_samples.make("vit")[0])
    pixels = vision_samples.pictures("vit")
    dense = model(pixels).logits
    run = policy_vit(model, LAYERS, nothing)
    with pytest.raises(RuntimeError, match="on purpose"), run:
        raise RuntimeError("on purpose")
    with run, pytest.raises(UnsupportedModelError, match="already inside a quickmerge run"):
        run.__enter__()
    with run, pytest.raises(UnsupportedModelError, match="already inside a quickmerge run"):
        policy_vit(model, LAYERS, nothing)
    assert torch.equal(model(pixels).logits, dense)
    assert not model.config._attn_implementation.startswith(PREFIX)


def test_bad_input_is_told_in_one_sentence() -> None:
    model, _ = vision_samples.make("vit")
    for layers in ((), (3, 2), (4,), (1, 1), (True,)):
        with pytest.raises(ValueError, match=r"layers must be rising blocks in 0..3, got"):
            policy_vit(model, layers, nothing)
    run = policy_vit(model, LAYERS, lambda stage, patches, mask: mask[:, :3])
    with pytest.raises(QuickmergeError, match="must see a forward of its model first"):
        _ = run.masks
    with run, pytest.raises(ValueError, match=r"decide must give \(batch, patches\) \(2, 16\), got \(2, 3\)"):
        model(vision_samples.pictures("vit"))
    with pytest.raises(QuickmergeError, match="did not come to its end"):
        _ = run.features
    model.activation_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match="activation_checkpointing_disable"):
        run.__enter__()
