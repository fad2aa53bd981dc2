"""A projector that is told what stands on each patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
import vision_samples
import vlm_samples
from PIL import Image

from quickmerge.datasets.annotated import Annotated, Placed, Question
from quickmerge.datasets.labelled import PixelFormat
from quickmerge.datasets.questions import AskedImages
from quickmerge.errors import QuickmergeError
from quickmerge.merge.train.answers import scaled_inputs
from quickmerge.merge.train.new_vlm import new_vlm
from quickmerge.training.align import align_projector, patch_texts, word_embedding


def picture(folder: Path, size: tuple[int, int], *objects: Placed) -> Annotated:
    path = folder / f"{len(list(folder.iterdir()))}.png"
    image = Image.new("RGB", size, "white")
    for one in objects:
        image.paste(one.text, tuple(map(int, one.box)))  # texts are colours here
    image.save(path)
    return Annotated(path, (), (Question("colour", "what is it ?", "red"),), objects)


def test_a_patch_belongs_to_the_smallest_box_over_its_centre(tmp_path: Path) -> None:
    big, small = Placed("red", (0, 0, 32, 16)), Placed("blue", (9, 0, 16, 8))
    told = patch_texts(picture(tmp_path, (32, 32), small, big), (4, 4))
    assert told == ["red", "blue", "red", "red", *["red"] * 4, *[None] * 8]
    assert patch_texts(picture(tmp_path, (32, 32), Placed("red", (0, 0, 4, 4))), (4, 4)) == [None] * 16


def test_boxes_are_scaled_and_cut_as_the_image_is(tmp_path: Path) -> None:
    # twice as wide as high: a quarter is cut off on both sides
    wide = picture(tmp_path, (128, 64), Placed("red", (32, 0, 64, 64)), Placed("blue", (0, 0, 32, 64)))
    assert patch_texts(wide, (4, 4)) == ["red", "red", None, None] * 4


def test_the_words_of_a_text_are_summed_to_the_length_of_one() -> None:
    tokenizer, table = vlm_samples.tokenizer(), torch.randn(40, 8)
    one, two = (tokenizer.convert_tokens_to_ids(word) for word in ("red", "shape"))
    torch.testing.assert_close(word_embedding(tokenizer, table, "red"), table[one])
    torch.testing.assert_close(word_embedding(tokenizer, table, "red shape"), (table[one] + table[two]) / 2**0.5)


def asked(tmp_path: Path, placed: bool) -> tuple[Any, Any, AskedImages]:
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shown = hf.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tower = hf.Dinov2Config(**vision_samples.SIZE, **vision_samples.IMAGE, mlp_ratio=2)
    language = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=40, **text))
    model, processor = new_vlm(hf.Dinov2Model(tower), language, vlm_samples.tokenizer(), shown, layers=(2, 3))
    (tmp_path / "images").mkdir()
    corners = [(x, y, x + 16, y + 16) for x in (0, 16) for y in (0, 16)]
    pictures = []
    for number in range(20):
        colours = [(("red", "blue")[number + k & 1], corners[(number + 3 * k) % 4]) for k in range(2)]
        objects = [Placed(colour, box) for colour, box in colours] if placed else []
        pictures.append(picture(tmp_path / "images", (32, 32), *objects))
    form = PixelFormat.of(processor.image_processor)
    more = {"image_tokens": 16, "image_token": model.config.image_token_id}
    return model, processor, AskedImages(pictures, processor.tokenizer, form, **more)


def test_the_projector_comes_to_say_what_is_there(tmp_path: Path) -> None:
    model, processor, dataset = asked(tmp_path, placed=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shares: list[float] = []
    with scaled_inputs(model, dataset, fresh=True):
        explained = align_projector(
            model, dataset, processor.tokenizer, pictures=20, epochs=400, progress=shares.append
        )  # fmt: skip
    assert explained > 0.9
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("model.multi_modal_projector.") for name in changed)
    # each patch is nearest to its own word
    table = model.get_input_embeddings().weight
    texts = patch_texts(dataset.pictures[0], (4, 4))
    made = model.get_image_features(pixel_values=dataset.pixels(0)[None]).pooler_output[0]
    words = {word: word_embedding(processor.tokenizer, table, word) for word in ("red", "blue")}
    for patch, word in enumerate(texts):
        if word is not None:
            assert max(words, key=lambda each: F.cosine_similarity(made[patch], words[each], dim=0)) == word


def test_images_without_objects_can_not_align(tmp_path: Path) -> None:
    model, processor, dataset = asked(tmp_path, placed=False)
    with pytest.raises(QuickmergeError, match="images must have objects"):
        align_projector(model, dataset, processor.tokenizer, pictures=4)
