"""Fine-tuning a classifier."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf
import vision_samples
from strategies import generator
from torch import Tensor
from training_samples import lines, same
from transformers import AutoModelForImageClassification

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.train.classify import Classify, classify, evaluate, new_classifier, train_classifier
from quickmerge.models.encoder import find_encoder
from quickmerge.models.part import save_model
from quickmerge.training import TrainingConfig

BARE = {
    "vit": hf.ViTModel, "beit": hf.BeitModel, "dinov2": hf.Dinov2Model, "registers": hf.Dinov2WithRegistersModel,
    "clip": hf.CLIPVisionModel, "siglip": hf.SiglipVisionModel,
}  # fmt: skip


class Corners:
    """Images that are bright on the left or on the right."""

    def __init__(self, count: int = 16, seed: int = 0) -> None:
        self.items = 0.3 * torch.randn(count, 3, 32, 32, generator=generator(seed))
        for index, item in enumerate(self.items):
            item[..., 16:] += 2.0 * (index % 2)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.items[index], index % 2

    def fingerprint(self) -> str:
        return str(float(self.items.sum()))


def config(**changes) -> TrainingConfig:
    usual = {"steps": 4, "batch": 4, "learning_rate": 3e-3, "log_every": 1, "save_every": 2}
    return TrainingConfig(**{**usual, **changes})


def two() -> object:
    """A vision transformer with a new head of two classes."""
    model, _ = vision_samples.make("vit")
    torch.manual_seed(3)
    return new_classifier(model, ["left", "right"])


@pytest.mark.parametrize("family", BARE)
def test_a_new_classifier_has_the_features_of_the_model(family: str) -> None:
    settings = vision_samples.CLASSIFIERS[family][1]()
    torch.manual_seed(1)
    model = BARE[family](getattr(settings, "vision_config", settings)).eval()
    if family in ("clip", "siglip"):
        with pytest.raises(UnsupportedModelError, match="no image classifier around a"):
            new_classifier(model, ["left", "right"])
        model = hf.CLIPModel(settings) if family == "clip" else hf.SiglipModel(settings)
        model.eval()
    made = new_classifier(model, ["left", "right"])
    pixels = vision_samples.pictures(family)
    with torch.no_grad():
        wanted = find_encoder(model).base(pixels).last_hidden_state
        assert torch.equal(find_encoder(made).base(pixels).last_hidden_state, wanted)
        assert classify(made, pixels).shape == (2, 2)
    assert made.config.id2label == {0: "left", 1: "right"} and made.config.label2id == {"left": 0, "right": 1}
    assert model.config.id2label != made.config.id2label


def test_a_classifier_of_these_classes_stays_and_of_others_gets_a_new_head() -> None:
    model, _ = vision_samples.make("vit")
    assert new_classifier(model, ["a", "b", "c"]) is model
    for classes in (["b", "a", "c"], ["a", "b"], ["a", "b", "c", "d"]):
        made = new_classifier(model, classes)
        assert made is not model and made.config.num_labels == len(classes)
    for classes in (["a"], ["a", "a"]):
        with pytest.raises(QuickmergeError, match="classes must be at least two different names"):
            new_classifier(model, classes)


def test_the_loss_is_cross_entropy_with_smoothed_labels() -> None:
    goal = Classify(two(), smoothing=0.3)
    pixels, labels = Corners(3).items, torch.tensor([0, 1, 0])
    with torch.no_grad():
        told = goal([pixels, labels], 0.0)
        logits = goal.model(pixels).logits
    total = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        p = [math.exp(v) / sum(math.exp(w) for w in row) for v in row]
        total -= sum(math.log(p[c]) * (0.3 / 2 + 0.7 * (c == label)) for c in range(2)) / 3
    assert float(told["loss"]) == pytest.approx(total, rel=1e-5)
    assert float(told["accuracy"]) == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_learns_and_leaves_an_ordinary_folder(precision: str, tmp_path) -> None:
    model = two()
    result = train_classifier(
        model, None, Corners(), config(steps=40, save_every=40, precision=precision), tmp_path, backbone_rate=1.0
    )
    assert result.finished and lines(tmp_path)[-1]["loss"] < lines(tmp_path)[0]["loss"]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert same(loaded, model.eval()) and loaded.config.id2label == {0: "left", 1: "right"}
    assert evaluate(loaded, Corners(20, seed=5), batch=8) > 0.9
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints", "config.json", "metrics.jsonl", "model.safetensors"
    }  # fmt: skip
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_backbone_has_its_own_rate(tmp_path) -> None:
    goal = Classify(two(), backbone_rate=0.2)
    assert {goal.group_of(name) for name, _ in goal.named_parameters()} == {"backbone", "head"}
    assert (goal.rate_of("backbone", 0.5), goal.rate_of("head", 0.5)) == (0.2, 1.0)
    model = two()
    before = {name: value.clone() for name, value in model.named_parameters()}
    train_classifier(model, None, Corners(), config(), tmp_path, backbone_rate=0.0)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_steps_of_the_two_rates_are_as_long_as_they_say(tmp_path) -> None:
    """AdamW's first step moves every weight by its rate."""
    model = two()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    settings = config(steps=1, learning_rate=1e-2, schedule="constant", weight_decay=0.0)
    train_classifier(model, None, Corners(), settings, tmp_path, backbone_rate=0.1)
    moved = {name: float((value.detach() - before[name]).abs().max()) for name, value in model.named_parameters()}
    assert moved["classifier.weight"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["vit.layers.0.attention.q_proj.weight"] == pytest.approx(1e-3, rel=1e-2)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path) -> None:
    whole = two()
    train_classifier(whole, None, Corners(), config(), tmp_path / "whole")
    for turn in range(5):
        parts = two()
        stops = config(max_minutes=1e-6)
        if train_classifier(parts, None, Corners(), stops, tmp_path / "parts", resume=turn > 0).finished:
            break
    assert turn > 1 and same(whole, parts) and lines(tmp_path / "whole") == lines(tmp_path / "parts")
    with pytest.raises(QuickmergeError, match=r"smoothing was 0\.1 when"):
        train_classifier(two(), None, Corners(), config(), tmp_path / "parts", smoothing=0.0, resume=True)


def test_images_of_another_size_are_read() -> None:
    model, _ = vision_samples.make("vit")
    assert classify(model, torch.randn(1, 3, 48, 40)).shape == (1, 3)


def test_evaluate_counts_every_image_once() -> None:
    model, data = two(), Corners(7)
    with torch.no_grad():
        right = sum(int(model(pixels[None]).logits.argmax()) == label for pixels, label in (data[i] for i in range(7)))
    assert evaluate(model, data, batch=3) == pytest.approx(right / 7)


def test_bad_input_is_told_in_one_sentence(tmp_path) -> None:
    bare, _ = vision_samples.make("dinov3")
    with pytest.raises(UnsupportedModelError, match="model must be an image classifier"):
        Classify(bare)
    with pytest.raises(UnsupportedModelError, match="no image classifier around a DINOv3ViTModel"):
        new_classifier(bare, ["a", "b"])
    for name in ("smoothing", "backbone_rate"):
        with pytest.raises(ValueError, match=rf"{name} must be a number in \[0, 1\], got 2"):
            Classify(two(), **{name: 2})
    (tmp_path / "file").write_text("")
    with pytest.raises(QuickmergeError, match="file can't be written"):
        save_model(tmp_path / "file", two(), None)
