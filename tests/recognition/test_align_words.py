"""A recogniser's projector that says best what stands on its tokens, in closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from scene_samples import COLOURS, small_recognizer

from quickmerge.datasets.annotated import Annotated, Placed
from quickmerge.errors import QuickmergeError
from quickmerge.recognition import Recognizer
from quickmerge.recognition.train import EMPTY, RIDGE, LabelledScenes, align_words, pixel_format, train_recognizer
from quickmerge.training import TrainingConfig
from quickmerge.training.align import patch_texts, word_embedding


def halves(folder: Path, recognizer: Recognizer, count: int = 10) -> LabelledScenes:
    """Images of which one half has a colour, and a box that says so."""
    scenes, names = [], list(COLOURS)
    folder.mkdir()
    for number in range(count):
        name, left = names[number % 3], number % 2 * 16
        image = Image.new("RGB", (32, 32), (120 + number, 120, 120))
        image.paste(COLOURS[name], (left, 0, left + 16, 32))
        image.save(folder / f"{number}.png")
        box = (float(left), 0.0, left + 16.0, 32.0)
        scenes.append(Annotated(folder / f"{number}.png", (name,), (), (Placed(name, box),)))
    return LabelledScenes(scenes, pixel_format(recognizer))


@pytest.mark.parametrize("kept", [False, True])
def test_it_is_the_weighted_ridge_regression(tmp_path: Path, kept: bool) -> None:
    recognizer = small_recognizer()
    dataset = halves(tmp_path / "data", recognizer)
    features = torch.cat([recognizer.features(dataset.pixels(index)[None]) for index in range(10)]).detach()
    if kept:
        dataset.keep(features)
    before = {name: value.clone() for name, value in recognizer.state_dict().items()}
    explained = align_words(recognizer, dataset, pictures=10)
    table = recognizer.language.get_input_embeddings().weight.detach()
    side = round(features.shape[1] ** 0.5)
    rows, wanted, weights = [], [], []
    for index in range(9):  # the last tenth is held out
        for patch, text in enumerate(patch_texts(dataset.pictures[index], (side, side))):  # type: ignore[arg-type]
            rows.append(features[index, patch].double())
            word = table.mean(0) if text is None else word_embedding(recognizer.labels.tokenizer, table, text)
            wanted.append(word.double())
            weights.append((EMPTY if text is None else 1.0) ** 0.5)
    a, b, w = torch.stack(rows), torch.stack(wanted), torch.tensor(weights).double()[:, None]
    ridge = (RIDGE * float((w * a).square().sum(0).mean())) ** 0.5 * torch.eye(a.shape[1], dtype=torch.float64)
    want = torch.linalg.lstsq(
        torch.cat([w * a, ridge]), torch.cat([w * b, torch.zeros(len(ridge), b.shape[1]).double()])
    )
    torch.testing.assert_close(recognizer.projector.weight.double(), want.solution.T, rtol=1e-4, atol=1e-6)
    assert explained > 0.5
    changed = {name for name, value in recognizer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"projector.weight"}


def test_what_can_not_be_aligned_by_is_named(tmp_path: Path) -> None:
    recognizer = small_recognizer()
    dataset = halves(tmp_path / "data", recognizer, 2)
    with pytest.raises(ValueError, match="images must be a whole number of at least 1, got 0"):
        align_words(recognizer, dataset, pictures=0)
    dataset.keep(torch.randn(2, 12, recognizer.projector.in_features))
    with pytest.raises(QuickmergeError, match="image tokens must be a square grid to be aligned, got 12"):
        align_words(recognizer, dataset, pictures=2)
    bare = LabelledScenes([Annotated(p.path, p.labels, ()) for p in dataset.pictures], pixel_format(recognizer))
    with pytest.raises(QuickmergeError, match=r"images must have objects .* got none"):
        align_words(recognizer, bare, pictures=2)


def test_training_begins_aligned_and_a_resumed_run_does_not_begin_anew(tmp_path: Path) -> None:
    def run(out: str, resume: bool = False, **changes: object) -> Recognizer:
        recognizer = small_recognizer()
        config = TrainingConfig(**{"steps": 4, "batch": 2, "save_every": 2, **changes})  # type: ignore[arg-type]
        train_recognizer(recognizer, dataset, config, tmp_path / out, align=6, resume=resume)
        return recognizer

    dataset = halves(tmp_path / "data", small_recognizer(), 6)
    whole = run("whole")
    run("parts", max_minutes=1e-6)
    resumed = run("parts", resume=True)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    still = run("still", learning_rate=1e-12)
    aligned = small_recognizer()
    align_words(aligned, dataset, pictures=6)
    torch.testing.assert_close(still.projector.weight, aligned.projector.weight)
    with pytest.raises(ValueError, match="align must be a whole number of at least 0, got -1"):
        train_recognizer(aligned, dataset, TrainingConfig(steps=1), tmp_path / "bad", align=-1)
