"""Training a small prior over the patches of images."""

from __future__ import annotations

import json
import random

import pytest
import torch
from strategies import generator
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.merge.prior import CollapseError, Prior, PriorConfig
from quickmerge.merge.prior.layout import layout_of, predict, read_slots, slot_loss
from quickmerge.merge.prior.model import BACKWARD, FORWARD
from quickmerge.merge.prior.train_patches import PriorPatches, train_prior_patches, unpatchify
from quickmerge.merge.reducers import Uniform
from quickmerge.training import TrainingConfig


class Slopes:
    """Images that grow brighter in some direction, with a little noise: what comes next can be told."""

    def __init__(self, count: int, shape: tuple[int, ...] = (3, 12, 20), seed: int = 0) -> None:
        draws = generator(seed)
        rows = torch.linspace(0, 1, shape[-2])[:, None]
        columns = torch.linspace(0, 1, shape[-1])
        tilt = torch.rand(count, 2, *[1] * len(shape), generator=draws) * 0.5
        noise = 0.02 * torch.randn(count, *shape, generator=draws)
        self.items = (tilt[:, 0] * rows + tilt[:, 1] * columns + noise).clamp(0, 1)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        return self.items[index]

    def fingerprint(self) -> str:
        return str(float(self.items.sum()))


def objective(features: int = 48, axes: int = 2, **more) -> PriorPatches:
    """On patches of 4 by 4, with every weight drawn."""
    torch.manual_seed(0)
    settings = {"keeps": [0.5], "patch": 4}
    settings |= {name: more.pop(name) for name in ("keeps", "patch", "reducer") if name in more}
    shape = {"width": 16, "layers": 2, "heads": 2, "pool": 0, "saliency": False, **more}
    goal = PriorPatches(Prior(PriorConfig(features=features, axes=axes, **shape)), **settings)
    for parameter in goal.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.3)
    return goal


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_training_lowers_the_loss(kind: str, tmp_path) -> None:
    shape = (3, 12, 20) if kind == "images" else (3, 3, 8, 12)
    config = TrainingConfig(steps=60, batch=4, learning_rate=5e-3, log_every=1, save_every=60)
    result = train_prior_patches(
        Slopes(16, shape), config, tmp_path, keeps=[0.5, 1.0], patch=4, kind=kind, width=16, layers=1, heads=2
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result.finished
    for name in ("ar", "ar_back", "error", "error_back"):
        values = [line[name] for line in lines]
        assert sum(values[-10:]) < sum(values[:10]) - 0.3, name
    assert lines[-1]["error"] < 0.6
    assert all(0.5 < line["spread"] < 2 for line in lines)
    prior = Prior.from_pretrained(tmp_path)
    assert prior.config.axes == (2 if kind == "images" else 3) and prior.config.generates
    assert prior.config.trained_for == {
        "kind": kind, "patches": [4, 4], "size": list(shape[-2:]), "frames": 1 if kind == "images" else 3,
        "keeps": [0.5, 1.0], "reducers": ["grid", "grid"],
    }  # fmt: skip


@pytest.mark.parametrize(("shape", "axes"), [((2, 3, 12, 20), 2), ((2, 3, 3, 12, 4), 3)])
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_no_slot_is_influenced_by_pixels_of_later_ones(shape, axes: int, keep: float) -> None:
    goal = objective(axes=axes, keeps=[keep]).double().eval()
    prior = goal.prior
    pictures = torch.rand(shape, generator=generator(1), dtype=torch.float64)
    plan = goal.reducers[0].plan(goal.view(pictures))
    pictures.requires_grad_()
    view = goal.view(pictures)
    slots, layout = plan.merge(view.hidden), layout_of(prior, view, plan)
    # which slot each pixel is in
    frames = shape[1] if axes == 3 else None
    owner = unpatchify(plan.slot[..., None] * torch.ones(1, 1, prior.config.features), 4, shape[-2:], frames)
    for direction in (FORWARD, BACKWARD):
        _, _, each = slot_loss(prior, read_slots(prior, slots, layout, direction), slots, layout, direction)
        for k in range(plan.slots - 1):
            (grad,) = torch.autograd.grad(each[:, k].sum(), pictures, retain_graph=True)
            # Targets are detached: what gradient there is comes through what was read.
            unread = owner <= k if direction == BACKWARD else owner > k
            assert bool((grad[unread] == 0).all()) and bool((grad[~unread] != 0).any())


def test_the_error_is_the_share_of_variance_that_is_not_explained() -> None:
    """Patch by patch: the mean against the content of the slot that the patch is in, in pixels."""
    goal = objective(directions="forward").double().eval()
    batch = Slopes(3).items.double()
    goal.calibrate(list(batch))
    prior, view = goal.prior, goal.view(batch)
    plan = goal.reducers[0].plan(view)
    slots, guess = plan.merge(view.hidden), predict(prior, view, plan)
    apart = unpatchify(plan.unmerge(slots - guess), 4, (12, 20))
    later = unpatchify((plan.slot[..., None] > 0) * torch.ones(48), 4, (12, 20)).bool()
    share = apart[later].square().mean() * 48 / prior.std.square().sum()
    torch.testing.assert_close(goal(batch, 0.0)["error"], share)


@pytest.mark.parametrize("head", ["gaussian", "mixture"])
def test_gradients_are_those_of_finite_differences(head: str) -> None:
    goal = objective(head=head).double().eval()
    batch = torch.rand(2, 3, 12, 20, generator=generator(3), dtype=torch.float64)
    goal.calibrate(list(batch))
    goal(batch, 0.0)["loss"].backward()
    step = 1e-5
    encoder = goal.prior.encoder
    for parameter, place in [
        (encoder.anchor.weight, (3, 5)), (encoder.geometry.weight, (2, 9)), (goal.prior.where.weight, (4, 1)),
        (goal.prior.trunk.blocks[0].qkv.weight, (20, 6)), (goal.prior.direction.weight, (1, 3)),
    ]:  # fmt: skip
        with torch.no_grad():
            parameter[place] += step
            above = goal(batch, 0.0)["loss"]
            parameter[place] -= 2 * step
            below = goal(batch, 0.0)["loss"]
            parameter[place] += step
        torch.testing.assert_close(parameter.grad[place], (above - below) / (2 * step), atol=1e-6, rtol=1e-3)


def test_nearness_has_the_gradient_of_finite_differences() -> None:
    goal = objective(axes=3).double().eval()
    batch = torch.rand(2, 3, 3, 8, 12, generator=generator(4), dtype=torch.float64)
    goal.calibrate(list(batch))
    goal(batch, 0.0)["loss"].backward()
    parameter, step = goal.prior.nearness, 1e-5
    for at in range(4):
        with torch.no_grad():
            parameter[at] += step
            above = goal(batch, 0.0)["loss"]
            parameter[at] -= 2 * step
            below = goal(batch, 0.0)["loss"]
            parameter[at] += step
        torch.testing.assert_close(parameter.grad[at], (above - below) / (2 * step), atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize(("axes", "shape"), [(2, (3, 12, 20)), (3, (3, 3, 8, 12))])
def test_every_parameter_learns(axes: int, shape: tuple[int, ...]) -> None:
    goal = objective(axes=axes)
    goal(Slopes(3, shape).items, 0.0)["loss"].backward()
    for name, parameter in goal.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_unmerged_patches_score_as_if_there_were_no_reducer() -> None:
    batch = Slopes(2).items
    one, other = objective(keeps=[1.0]), objective(keeps=[1.0], reducer=Uniform)
    assert torch.equal(one(batch, 0.0)["loss"], other(batch, 0.0)["loss"])
    assert float(one(batch, 0.0)["spread"]) == pytest.approx(1)


def test_each_step_draws_a_keep() -> None:
    goal, batch = objective(keeps=[0.2, 1.0]), Slopes(2).items
    random.seed(0)
    assert len({round(goal(batch, 0.0)["loss"].item(), 5) for _ in range(12)}) == 2


def test_images_of_one_colour_do_not_count_as_collapsed() -> None:
    goal = objective(directions="forward")
    flat = torch.full((2, 3, 12, 20), 0.25)
    told = goal(flat, 0.0)
    assert float(told["spread"]) == 1 and bool(told["loss"].isfinite())
    assert "ar_back" not in told
    mixed = torch.stack([flat[0], Slopes(1)[0]])
    assert float(goal(mixed, 0.0)["spread"]) > 0.3


def test_a_merge_that_makes_all_slots_the_same_is_named() -> None:
    """Columns of two colours in turn, and pairs of them merged: every slot is of the colour between."""
    striped = torch.zeros(1, 3, 8, 32)
    striped.view(1, 3, 8, 4, 2, 4)[:, :, :, :, 0] = 1
    pairs = objective(reducer=lambda keep: Pairs(keep))
    with pytest.raises(CollapseError, match="the merged sequence has collapsed"):
        pairs(striped, 0.0)


class Pairs(Uniform):
    """Merges every patch with its neighbour."""

    name = "pairs"

    def plan(self, view):
        from quickmerge.merge.tokens import MergePlan
        from quickmerge.merge.tokens.plan import next_anchor

        anchor = (view.position % 2 == 1) & view.valid
        return MergePlan.from_anchors(view, anchor, next_anchor(view, anchor))


def test_settings_are_checked(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"keeps must be shares in \(0, 1\], got \[1.5\]"):
        objective(keeps=[1.5])
    with pytest.raises(ValueError, match="prior must be of images, with pool 0 and axes 2 or 3, got pool=4 and axes=1"):
        objective(pool=4, axes=1)
    with pytest.raises(ValueError, match=r"batch must be images \(B, C, H, W\) for this prior, got shape \(2, 3, 3"):
        objective()(torch.zeros(2, 3, 3, 8, 8), 0.0)
    with pytest.raises(ValueError, match="hidden must have 48 features for this prior, got 16"):
        objective()(torch.rand(2, 1, 8, 8), 0.0)
    config = TrainingConfig(steps=1, batch=1)
    for data, kind, message in [
        (Slopes(2), "image", "kind must be one of images, videos, got 'image'"),
        (Slopes(2), "videos", r"dataset must hold clips \(T, C, H, W\) for kind 'videos', got items of shape \(3, 12"),
        (Slopes(2, (3, 13, 20)), "images", "patch must divide the sides of the image, 13 x 20, got 4 x 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_prior_patches(data, config, tmp_path, keeps=[0.5], patch=4, kind=kind, width=16, heads=2)
    with pytest.raises(QuickmergeError, match="at least one item"):
        train_prior_patches([], config, tmp_path, keeps=[0.5], patch=4, kind="images")
