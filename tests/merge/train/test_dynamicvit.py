"""Training DynamicViT: its losses, who is trained, and what is left in the folder."""

from __future__ import annotations

import json
import math

import pytest
import torch
import vision_samples
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, up_to
from torch import Tensor
from training_samples import lines
from transformers import AutoModelForImageClassification

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.attach import reduce
from quickmerge.merge.reducers.dynamicvit import DynamicViT
from quickmerge.merge.train.classify import evaluate, train_classifier
from quickmerge.merge.train.dynamicvit import (
    DynamicViTObjective,
    DynamicViTSettings,
    feature_loss,
    logit_loss,
    ratio_loss,
    train_dynamicvit,
)
from quickmerge.merge.vision.policy import policy_vit
from quickmerge.training import TrainingConfig


class Blobs:
    """Images whose upper left corner tells their class."""

    def __init__(self, count: int = 24, seed: int = 0) -> None:
        draws = generator(seed)
        self.labels = torch.randint(3, (count,), generator=draws).tolist()
        self.items = 0.3 * torch.randn(count, 3, 32, 32, generator=draws)
        for item, label in zip(self.items, self.labels, strict=True):
            item[label, :8, :8] += 2

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.items[index], self.labels[index]

    def fingerprint(self) -> str:
        return str(float(self.items.sum()))


def batch(count: int = 4, seed: int = 0) -> list[Tensor]:
    data = Blobs(count, seed)
    return [data.items, torch.tensor(data.labels)]


def objective(family: str = "vit", **more) -> DynamicViTObjective:
    model, _ = vision_samples.make(family)
    torch.manual_seed(0)
    return DynamicViTObjective(model, **{"layers": (1, 2, 3), **more})


def config(**changes) -> TrainingConfig:
    usual = {"steps": 6, "batch": 4, "learning_rate": 1e-3, "log_every": 1, "save_every": 2}
    return TrainingConfig(**{**usual, **changes})


# The losses --------------------------------------------------------------------------------------------------------


@prop(15)
@given(up_to(3), up_to(3), st.integers(1, 9), st.floats(0.05, 0.95), st.integers(0, 999))
def test_ratio_loss_is_its_slow_statement(stages: int, rows: int, patches: int, keep: float, seed: int) -> None:
    draws = generator(seed)
    masks = [(torch.rand(rows, patches, generator=draws) < 0.5).float() for _ in range(stages)]
    total = 0.0
    for s in range(stages):
        for b in range(rows):
            share = sum(masks[s][b].tolist()) / patches
            total += (share - keep ** (s + 1)) ** 2 / (stages * rows)
    assert float(ratio_loss(masks, keep)) == pytest.approx(total, rel=1e-5, abs=1e-9)


def test_ratio_loss_is_zero_at_exactly_the_shares() -> None:
    masks = [torch.zeros(3, 16) for _ in range(3)]
    for stage, mask in enumerate(masks):
        mask[:, : 16 // 2 ** (stage + 1)] = 1
    assert float(ratio_loss(masks, 0.5)) == 0 < float(ratio_loss(masks, 0.6))


@prop(15)
@given(up_to(4), st.integers(2, 6), st.integers(0, 999))
def test_logit_loss_is_the_divergence_from_the_teacher(rows: int, classes: int, seed: int) -> None:
    student, teacher = 3 * torch.randn(2, rows, classes, generator=generator(seed))
    total = 0.0
    for b in range(rows):
        p, q = (
            [math.exp(v) / sum(math.exp(w) for w in x[b].tolist()) for v in x[b].tolist()] for x in (teacher, student)
        )
        total += sum(a * math.log(a / c) for a, c in zip(p, q, strict=True)) / rows
    assert float(logit_loss(student, teacher)) == pytest.approx(total, rel=1e-4, abs=1e-6)
    assert float(logit_loss(student, student)) == pytest.approx(0, abs=1e-7)


@prop(15)
@given(up_to(3), st.integers(1, 6), st.integers(0, 999))
def test_feature_loss_looks_at_kept_patches_only(rows: int, patches: int, seed: int) -> None:
    student, teacher = torch.randn(2, rows, patches, 5, generator=generator(seed))
    mask = (torch.rand(rows, patches, generator=generator(seed + 1)) < 0.5).float().requires_grad_()
    apart = [
        (float(student[b, i, c]) - float(teacher[b, i, c])) ** 2
        for b in range(rows) for i in range(patches) for c in range(5) if mask[b, i] > 0
    ]  # fmt: skip
    loss = feature_loss(student.requires_grad_(), teacher, mask)
    assert float(loss.detach()) == pytest.approx(sum(apart) / len(apart) if apart else 0.0, rel=1e-5, abs=1e-9)
    loss.backward()
    assert mask.grad is None
    assert not bool(student.grad[mask.detach() == 0].any())


# The objective -----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_sum_of_what_the_model_gives_under_its_masks() -> None:
    weights = DynamicViTSettings(classes=0.7, ratio=3.0, logits=0.2, features=0.9, smoothing=0.2)
    goal = objective(settings=weights, keep=0.6)
    pixels, labels = batch()
    with torch.no_grad():
        dense = goal.model(pixels, output_hidden_states=False).logits.double().log_softmax(-1)
        features = goal.model.vit(pixels).last_hidden_state[:, 1:].double()
        goal.model.classifier.weight += 0.1  # the teacher is the model as it was
        torch.manual_seed(5)
        told = goal([pixels, labels], 0.0)
        torch.manual_seed(5)
        with policy_vit(goal.model, goal.layers, goal.decide) as run:
            logits = goal.model(pixels).logits.double().log_softmax(-1)
    spread = torch.full((4, 3), 0.2 / 3, dtype=torch.float64)
    spread[range(4), labels] += 0.8
    kept = run.masks[-1].bool()
    assert bool(kept.any())
    shares = [(m.double().mean(-1) - 0.6 ** (s + 1)).square().mean() for s, m in enumerate(run.masks)]
    terms = {
        "classes": -(spread * logits).sum(-1).mean(),
        "ratio": sum(shares) / 3,
        "logits": (dense.exp() * (dense - logits)).sum(-1).mean(),
        "features": (run.features.double() - features)[kept].square().mean(),
    }
    for name, value in terms.items():
        assert float(told[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    total = 0.7 * terms["classes"] + 3.0 * terms["ratio"] + 0.2 * terms["logits"] + 0.9 * terms["features"]
    assert float(told["loss"]) == pytest.approx(float(total), rel=1e-4)
    assert float(told["kept"]) == pytest.approx(float(kept.double().mean()))


@pytest.mark.parametrize("family", ["vit", "beit", "dinov2", "registers", "siglip", "clip"])
def test_what_shall_learn_has_a_gradient_and_what_shall_not_has_none(family: str) -> None:
    goal = objective(family).train()
    goal(batch(), 0.0)["loss"].backward()
    for name, value in goal.predictors.named_parameters():
        assert bool(value.grad.isfinite().all()) and bool(value.grad.any()), name
    learns = {
        name for name, value in goal.model.named_parameters() if value.grad is not None and bool(value.grad.any())
    }
    assert any("q_proj.weight" in name for name in learns) and any("classifier.weight" in name for name in learns)
    assert not any(part in name for name in learns for part in ("cls_token", "class_embedding", "position_embedding"))
    assert not any("teacher" in name or "outside" in name for name in goal.state_dict())
    assert not any(value.requires_grad for value in goal._outside[0].model.parameters())
    assert goal.model.training and not goal._outside[0].model.training


def test_rates_of_predictors_and_backbone() -> None:
    goal = objective(settings=DynamicViTSettings(backbone_rate=0.02, frozen=0.25))
    groups = {goal.group_of(name) for name, _ in goal.named_parameters()}
    assert groups == {"predictors", "backbone"}
    assert [goal.rate_of("backbone", progress) for progress in (0, 0.24, 0.25, 0.9)] == [0, 0, 0.02, 0.02]
    assert [goal.rate_of("predictors", progress) for progress in (0, 0.9)] == [1, 1]


@pytest.mark.parametrize("keep", [0.1, 0.3])
def test_small_shares_and_half_precision_stay_finite(keep: float, tmp_path) -> None:
    model, _ = vision_samples.make("dinov2")
    train_dynamicvit(
        model, None, Blobs(), config(precision="bf16", learning_rate=0.05), tmp_path, name="tiny", keep=keep,
        layers=(1, 2, 3),
    )  # fmt: skip
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path))


def test_larger_images_than_the_model_was_made_for() -> None:
    goal = objective().train()
    told = goal([torch.randn(2, 3, 48, 40), torch.tensor([0, 2])], 0.0)
    told["loss"].backward()
    assert bool(told["loss"].isfinite())


# Runs --------------------------------------------------------------------------------------------------------------


def test_training_holds_the_ratio_and_keeps_what_tells_the_class(tmp_path) -> None:
    """One patch of sixteen tells the class, and before the first block no other token knows of it.

    Predictors must learn to keep that one, which chance does in 4 of 16 images.
    """
    model, _ = vision_samples.make("vit")
    data, fresh = Blobs(64), Blobs(60, seed=9)
    steps = config(steps=40, batch=16, learning_rate=3e-3, save_every=90)
    train_classifier(model, None, data, steps, tmp_path / "c", backbone_rate=1.0)
    assert evaluate(model, fresh) > 0.95
    steps = config(steps=120, batch=16, learning_rate=1e-2, save_every=120)
    settings = DynamicViTSettings(frozen=1.0)
    train_dynamicvit(
        model, None, data, steps, tmp_path / "d", name="tiny", keep=0.3, layers=(0,), settings=settings
    )  # fmt: skip
    ratios = [line["ratio"] for line in lines(tmp_path / "d")]
    assert sum(ratios[-12:]) < 0.4 * sum(ratios[:12])
    trained = AutoModelForImageClassification.from_pretrained(tmp_path / "d" / "backbone").eval()
    with torch.no_grad(), reduce(trained, DynamicViT.from_pretrained(tmp_path / "d")) as run:
        trained(fresh.items)
        assert run.summary().tokens_per_block == [5, 5, 5, 5]
        there = (run.call.last.position == 1).any(-1).float().mean()
        assert evaluate(trained, fresh) > 0.95
    assert float(there) > 0.9


def test_what_is_saved_is_what_was_trained(tmp_path) -> None:
    model, _ = vision_samples.make("vit")
    train_dynamicvit(model, None, Blobs(), config(), tmp_path, name="tiny", keep=0.6, layers=(1, 3))
    assert {path.name for path in tmp_path.iterdir()} == {
        "backbone", "checkpoints", "config.json", "metrics.jsonl", "model.safetensors"
    }  # fmt: skip
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    read = json.loads((tmp_path / "config.json").read_text())
    assert (read["keep"], read["layers"], read["trained_for"]["base"]) == (0.6, [1, 3], "tiny")
    method = DynamicViT.from_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "backbone").eval()
    pixels = vision_samples.pictures("vit")
    with torch.no_grad(), reduce(loaded, method):
        saved = loaded(pixels).logits
    with torch.no_grad(), reduce(model.eval(), method):
        torch.testing.assert_close(model(pixels).logits, saved)
    original, _ = vision_samples.make("vit")
    with pytest.raises(QuickmergeError, match="model must be the one that the predictors were trained for, backbone"):
        reduce(original, method)


def test_an_untrained_backbone_is_named_and_not_saved(tmp_path) -> None:
    model, _ = vision_samples.make("vit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = DynamicViTSettings(backbone_rate=0.0)
    train_dynamicvit(model, None, Blobs(), config(), tmp_path, name="tiny", layers=(1, 2), settings=settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "backbone").exists()
    method = DynamicViT.from_pretrained(tmp_path)
    assert method.trained_for["model"] == "tiny"
    with reduce(vision_samples.make("vit")[0], method):
        pass


def test_the_backbone_stands_still_at_first(tmp_path) -> None:
    model, _ = vision_samples.make("vit")
    before = {name: value.clone() for name, value in model.named_parameters()}
    settings = DynamicViTSettings(frozen=0.5)
    run = {"name": "tiny", "layers": (1, 2), "settings": settings}
    train_dynamicvit(model, None, Blobs(), config(max_minutes=1e-6), tmp_path, **run)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    model, _ = vision_samples.make("vit")
    train_dynamicvit(model, None, Blobs(), config(), tmp_path, **run, resume=True)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert "vit.layers.0.attention.q_proj.weight" in changed and "classifier.bias" in changed
    assert not any("cls_token" in name or "position_embeddings" in name for name in changed)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path) -> None:
    run = {"name": "tiny", "layers": (1, 2), "settings": DynamicViTSettings(frozen=0.2)}
    whole, _ = vision_samples.make("vit")
    train_dynamicvit(whole, None, Blobs(), config(), tmp_path / "whole", **run)
    for turn in range(7):  # one step each
        parts, _ = vision_samples.make("vit")
        stops = config(max_minutes=1e-6)
        result = train_dynamicvit(parts, None, Blobs(), stops, tmp_path / "parts", **run, resume=turn > 0)
        if result.finished:
            break
    assert turn > 3 and lines(tmp_path / "whole") == lines(tmp_path / "parts")
    one, two = (DynamicViT.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    pairs = zip(one.predictors.state_dict().values(), two.predictors.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, parts.state_dict()[name]) for name, a in whole.state_dict().items())
    with pytest.raises(QuickmergeError, match=r"keep was 0\.7 when"):
        train_dynamicvit(parts, None, Blobs(), config(), tmp_path / "parts", **run, keep=0.5, resume=True)


def test_bad_input_is_told_in_one_sentence(tmp_path) -> None:
    for keep in (0, 1, 1.5, True, "0.5"):
        with pytest.raises(ValueError, match=r"keep must be a number in \(0, 1\), got"):
            objective(keep=keep)
    with pytest.raises(ValueError, match=r"layers must be rising blocks in 0..3, got \(2, 7\)"):
        objective(layers=(2, 7))
    bare, _ = vision_samples.make("dinov3")
    with pytest.raises(UnsupportedModelError, match=r"model must be an image classifier .* got a DINOv3ViTModel"):
        DynamicViTObjective(bare)
    for name, value in [("ratio", -1), ("frozen", 1.5), ("smoothing", True), ("temperature", 0), ("logits", math.nan)]:
        with pytest.raises(ValueError, match=f"{name} must be a number"):
            DynamicViTSettings(**{name: value})
    with pytest.raises(QuickmergeError, match="at least one item"):
        model, _ = vision_samples.make("vit")
        train_dynamicvit(model, None, [], config(), tmp_path, name="tiny", layers=(1,))
