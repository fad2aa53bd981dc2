"""Training a recogniser: random orders, kept features, and runs that go on as if never stopped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from scene_samples import small_recognizer, write_scenes

from quickmerge.datasets.annotated import Annotated, read_annotated
from quickmerge.errors import QuickmergeError
from quickmerge.recognition import Recognizer
from quickmerge.recognition.train import (
    LabelledScenes,
    collate_scenes,
    feature_bytes,
    pixel_format,
    read_features,
    train_recognizer,
)
from quickmerge.training import TrainingConfig


@pytest.fixture
def scenes(tmp_path: Path) -> list[Annotated]:
    return read_annotated(write_scenes(tmp_path / "scenes"))


def dataset_of(scenes, recognizer: Recognizer) -> LabelledScenes:
    return LabelledScenes(scenes, pixel_format(recognizer))


def test_labels_come_in_a_random_order_that_the_generator_decides(scenes) -> None:
    dataset = dataset_of(scenes, small_recognizer())
    torch.manual_seed(0)
    orders = [tuple(dataset[1]["labels"]) for _ in range(40)]
    assert set(orders) == {("green square", "red circle"), ("red circle", "green square")}
    assert min(Counter(orders).values()) > 8
    torch.manual_seed(0)
    assert [tuple(dataset[1]["labels"]) for _ in range(40)] == orders


def test_kept_features_are_those_of_the_pixels(scenes) -> None:
    recognizer = small_recognizer()
    dataset = dataset_of(scenes, recognizer)
    items = [dataset[index] for index in range(len(dataset))]
    wanted = recognizer.features(torch.stack([item["pixels"] for item in items]))
    seen: list[int] = []
    kept = read_features(recognizer, dataset, batch=4, advance=seen.append)
    assert seen == [4, 4, 1] and kept.dtype == torch.bfloat16
    assert torch.equal(kept, wanted.bfloat16())
    assert feature_bytes(recognizer, dataset) == kept.numel() * 2
    halved = read_features(recognizer, dataset, shrink=lambda x: x[:, ::2])
    assert torch.equal(halved, kept[:, ::2])
    dataset.keep(kept)
    batch = collate_scenes([dataset[2], dataset[5]])
    assert sorted(batch) == ["features", "labels"] and torch.equal(batch["features"], kept[[2, 5]])
    with pytest.raises(ValueError, match=r"features must be \(9, tokens, width\) for 9 images, got \(8, 16, 32\)"):
        dataset.keep(kept[:8])


def test_training_teaches_the_colours(scenes, tmp_path: Path) -> None:
    recognizer = small_recognizer()
    dataset = dataset_of(scenes, recognizer)
    before = {name: value.clone() for name, value in recognizer.vision.state_dict().items()}
    config = TrainingConfig(steps=60, batch=9, learning_rate=5e-3, save_every=60)
    result = train_recognizer(recognizer, dataset, config, tmp_path / "out")
    assert result.finished and result.metrics["loss"] < 0.75
    assert all(torch.equal(value, before[name]) for name, value in recognizer.vision.state_dict().items())
    loaded = Recognizer.from_pretrained(tmp_path / "out")
    pixels = torch.stack([dataset.pixels(index) for index in range(9)])
    for row, scene in zip(loaded.recognize(pixels, top=2), scenes, strict=True):
        assert {guess.label for guess in row[: len(scene.labels)]} == set(scene.labels)


@pytest.mark.parametrize("objective", ["paper", "reference"])
def test_a_stopped_run_goes_on_to_the_same_weights(scenes, tmp_path: Path, objective: str) -> None:
    config = {"steps": 4, "batch": 3, "save_every": 2}

    def run(out: str, resume: bool = False, **changes) -> Recognizer:
        recognizer = small_recognizer(1)
        dataset = dataset_of(scenes, recognizer)
        train_recognizer(
            recognizer, dataset, TrainingConfig(**config, **changes), tmp_path / out, objective=objective, resume=resume
        )
        return recognizer

    whole = run("whole")
    run("parts", max_minutes=1e-9)
    parts = run("parts", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not [path for path in (tmp_path / "parts").rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    with pytest.raises(QuickmergeError, match="fingerprint objective was"):
        recognizer = small_recognizer(1)
        other = "paper" if objective == "reference" else "reference"
        train_recognizer(
            recognizer, dataset_of(scenes, recognizer), TrainingConfig(**config), tmp_path / "parts", objective=other,
            resume=True,
        )  # fmt: skip


def test_images_without_labels_are_left_out(scenes) -> None:
    form = pixel_format(small_recognizer())
    without = SimpleNamespace(path=scenes[0].path, labels=())
    dataset = LabelledScenes([without, *scenes], form)
    assert len(dataset) == 9 and dataset.unlabelled == 1 and dataset.describe(0) == "0.png"
    assert dataset.fingerprint() == LabelledScenes(scenes, form).fingerprint()
    assert dataset.fingerprint() != LabelledScenes(scenes[::-1], form).fingerprint()
    with pytest.raises(QuickmergeError, match="at least one image must have labels, got 1 images without"):
        LabelledScenes([without], form)
