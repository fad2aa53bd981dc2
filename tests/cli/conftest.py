from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
import vision_samples
from PIL import Image


@pytest.fixture
def run(capsys, monkeypatch):
    """Call the command line in this process: (exit code, stdout, stderr)."""
    from quickmerge.cli import main

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quickmerge", *map(str, args)])
        capsys.readouterr()  # what fixtures printed, such as the bar of a model that is saved, is not the command's
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Bright on the left or on the right."""
    draws = np.random.default_rng(0)
    for label in ("left", "right"):
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True)
        for number in range(6):
            pixels = draws.integers(0, 100, (32, 32, 3), dtype=np.uint8)
            pixels[:, :16] += np.uint8(150 * (label == "left"))
            pixels[:, 16:] += np.uint8(150 * (label == "right"))
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A vision transformer without a classifier."""
    torch.manual_seed(0)
    config = hf.ViTConfig(**vision_samples.SIZE, **vision_samples.IMAGE)
    hf.ViTModel(config).save_pretrained(tmp_path / "tiny")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A classifier of the two classes that was never trained."""
    torch.manual_seed(0)
    labels = {"id2label": {0: "left", 1: "right"}, "label2id": {"left": 0, "right": 1}}
    config = hf.ViTConfig(**vision_samples.SIZE, **vision_samples.IMAGE, **labels)
    hf.ViTForImageClassification(config).save_pretrained(tmp_path / "classifier")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"
