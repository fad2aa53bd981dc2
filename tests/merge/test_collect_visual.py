"""What an image of a vision-language model's tokens is made of, where models cut images up or list their patches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
import vlm_samples
import vlm_zoo
from PIL import Image

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.collect import seen_by, visual_stage
from quickmerge.merge.tokens import Count

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
RED, BLUE = (200, 30, 30), (30, 30, 200)


def halves(width: int, height: int) -> Image.Image:
    """Red above blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (0, height // 2, width, height))
    return image


def colours(image: Image.Image) -> list[tuple[int, int, int]]:
    """In the middle of the upper and of the lower half."""
    found = [image.getpixel((image.width // 2, image.height * part // 4)) for part in (1, 3)]
    return [tuple(int(channel) for channel in colour) for colour in found]  # type: ignore[union-attr, misc]


def test_the_image_is_what_the_model_saw() -> None:
    model, processor = vlm_samples.tiny_vlm()
    # The shorter side is scaled to 32 and the centre cut out: of 3 : 1 the middle third is left.
    image = Image.new("RGB", (96, 32), "white")
    image.paste(halves(32, 32), (32, 0))
    seen, stage, stats = visual_stage(model, processor, image, "what is it ?", qm.SCOPE(keep=Count(6)))
    assert seen.size == (32, 32) and np.abs(np.subtract(colours(seen), [RED, BLUE])).max() <= 2
    assert stage is not None and stage.grid == (1, 4, 4) and stage.tokens == 6 and stats.visual_kept == 6
    assert np.asarray(seen)[:, 0].max() <= 255 and (np.asarray(seen)[8, :, 0] > 150).all()


def test_nothing_dropped_is_no_stage() -> None:
    model, processor = vlm_samples.tiny_vlm()
    for keep in (Count(16), Count(400), 1.0):
        _, stage, stats = visual_stage(model, processor, halves(32, 32), "what is it ?", qm.SCOPE(keep=keep))
        assert stage is None and stats.visual_kept == 16


def test_of_an_image_that_is_cut_into_tiles_the_whole_is_shown() -> None:
    model, words = vlm_zoo.build("idefics3"), vlm_samples.tokenizer()
    maker = hf.Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = hf.Idefics3Processor(image_processor=maker, tokenizer=words, image_seq_len=4, chat_template=TEMPLATE)
    for config in (model.config, model.model.config):
        config.image_token_id = processor.image_token_id
    model.model.image_token_id = processor.image_token_id
    seen, stage, stats = visual_stage(model, processor, halves(28, 56), "what is it ?", qm.SCOPE(keep=Count(2)))
    assert stats.images > 1  # crops, and the whole behind them
    assert np.abs(np.subtract(colours(seen), [RED, BLUE])).max() <= 12  # each crop has one colour
    assert stage is not None and stage.grid == (1, 2, 2) and stage.tokens == 2


def test_crops_that_are_put_together_form_no_grid_and_say_so() -> None:
    model, words = vlm_zoo.build("llava_next"), vlm_samples.tokenizer()
    side = vlm_zoo.SIDE
    maker = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side},
        image_grid_pinpoints=model.config.image_grid_pinpoints,
    )  # fmt: skip
    words.add_special_tokens({"extra_special_tokens": ["<image>"]})
    processor = hf.LlavaNextProcessor(
        maker, words, patch_size=vlm_zoo.PATCH, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    model.config.image_token_id = model.model.config.image_token_id = processor.image_token_id
    with pytest.raises(QuickmergeError, match="form no grid to draw in LlavaNextForConditionalGeneration"):
        visual_stage(model, processor, halves(side, 2 * side), "what is it ?", qm.SCOPE(keep=Count(2)))


@pytest.mark.parametrize("grid", [(1, 4, 6), (1, 9, 2)])
def test_patches_that_are_listed_one_by_one_are_of_the_whole_image(grid: tuple[int, int, int]) -> None:
    maker = SimpleNamespace(image_processor=SimpleNamespace())
    seen = seen_by(maker, torch.zeros(4 * grid[1] * grid[2], 588), halves(60, 40), grid)
    assert seen.width * grid[1] == seen.height * grid[2]  # patches are square
    assert colours(seen) == [RED, BLUE]


def test_pixels_that_were_not_standardised_are_shown_as_they_are() -> None:
    image = halves(8, 8)
    pixels: Any = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    maker = SimpleNamespace(image_processor=SimpleNamespace(do_normalize=False))
    assert np.array_equal(np.asarray(seen_by(maker, pixels, image, (1, 2, 2))), np.asarray(image))
