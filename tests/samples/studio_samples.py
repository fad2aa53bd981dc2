"""Tiny models for the studio, each in a folder, a text for them, and the studio served in a thread."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
import vision_samples
import vlm_samples
from batch_samples import TEXT, save_tiny
from PIL import Image

from quickmerge.serve.studio import Shelf, Way

DOCUMENT = " ".join(TEXT.split()[:130])
"""Some 300 tokens of the tiny tokenizer."""
QUESTION = "What is it?"


def save_vit(folder: Path) -> Path:
    """A vision transformer of four blocks with 16 patches, random weights."""
    torch.manual_seed(0)
    config = hf.Dinov2Config(**vision_samples.SIZE, image_size=32, patch_size=8, mlp_ratio=2)
    hf.Dinov2Model(config).eval().save_pretrained(folder)
    side = vlm_samples.SIDE
    hf.BitImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_models(folder: Path) -> list[str]:
    """A language model, a vision transformer and a vision-language model, as ``--model`` takes them."""
    makers = (("writer", save_tiny), ("seer", save_vit), ("asked", vlm_samples.save))
    return [str(make(folder / name)) for name, make in makers]


def image(seed: int = 0, kind: str = "png") -> bytes:
    """An image file of 48 x 40 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@contextmanager
def served(shelf: Shelf, further: Sequence[Way] = ()) -> Iterator[str]:
    """The address of a studio, which ends with the block."""
    from quickmerge.serve.studio import serve

    found: dict[str, Any] = {}
    there = threading.Event()

    def ready(address: str, end: Any) -> None:
        found.update(address=address, end=end)
        there.set()

    thread = threading.Thread(target=serve, args=(shelf, further), kwargs={"port": 0, "ready": ready}, daemon=True)
    thread.start()
    assert there.wait(60)
    try:
        yield found["address"]
    finally:
        found["end"]()
        thread.join(20)
        assert not thread.is_alive()
