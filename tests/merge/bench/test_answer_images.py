"""Answers about images: what the command line asks for, against doing it by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import vlm_samples
from PIL import Image

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.answer import answer_images, clamped
from quickmerge.merge.tokens import Count
from quickmerge.models.load_vision import ask_inputs

ASKED = "what colour is it ?"


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, Any]:
    return vlm_samples.tiny_vlm()


@pytest.fixture
def images() -> list[Image.Image]:
    draws = np.random.default_rng(0)
    return [Image.fromarray(draws.integers(0, 256, (32, 32 + 8 * i, 3), dtype=np.uint8)) for i in range(2)]


@pytest.mark.parametrize("layer", [None, 1])
def test_an_answer_is_what_generate_gives_inside_a_run(vlm: Any, images: list[Image.Image], layer: int | None) -> None:
    model, processor = vlm
    reducer = qm.SCOPE(keep=Count(5))
    inputs = ask_inputs(processor, images, ASKED)
    with torch.inference_mode(), qm.reduce(model, reducer, layer):
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=1)
    found = answer_images(model, processor, images, ASKED, reducer, layer, max_new_tokens=8)
    assert (
        found.text
        == processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    )
    assert found.visual == ((16, 5), (16, 5)) and found.as_dict()["visual"] == [[16, 5], [16, 5]]
    assert found.ttft_seconds > 0 and found.stats.prefill_seconds > 0


def test_all_tokens_give_the_model_as_it_is(vlm: Any, images: list[Image.Image]) -> None:
    model, processor = vlm
    full = answer_images(model, processor, images, ASKED, None, max_new_tokens=8)
    same = answer_images(model, processor, images, ASKED, qm.SCOPE(keep=1.0), max_new_tokens=8)
    inputs = ask_inputs(processor, images, ASKED)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=1)
    told = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert full.text == same.text == told
    assert same.visual == ((16, 16), (16, 16))


def test_what_does_not_fit_the_model_is_told_before_it_runs(vlm: Any, images: list[Image.Image]) -> None:
    with pytest.raises(QuickmergeError, match="must fit the model's 128 positions, got 42 and 100 tokens"):
        answer_images(*vlm, images, ASKED, None, max_new_tokens=100)


def test_asking_for_more_than_there_is_is_noted() -> None:
    assert clamped(5, [(16, 5), (5, 5)]) is None
    assert clamped(5, []) is None
    note = clamped(20, [(16, 16), (30, 20)])
    assert note is not None and "--tokens 20 is more than an image has (16)" in note
    note = clamped(40, [(16, 16), (30, 30), (50, 40)])
    assert note is not None and "(16 to 30)" in note
