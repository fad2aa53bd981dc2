"""A LLaVA made of a vision encoder and a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
import vision_samples
import vlm_samples
from PIL import Image
from transformers import AutoModelForCausalLM

from quickmerge.datasets.images import ImageFolder
from quickmerge.datasets.labelled import PixelFormat
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.train.new_vlm import IMAGE, new_vlm
from quickmerge.models.encoder import find_encoder

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 1,
}  # fmt: skip
LANGUAGES = {
    "llama": hf.LlamaConfig(**SMALL),
    "llama-tied": hf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": hf.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma3_text": hf.Gemma3TextConfig(**{**SMALL, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_neox": hf.GPTNeoXConfig(**SMALL),
}
VISIONS = {"dinov2": 1, "clip": 1, "vit": 1, "siglip": 0}


def language(name: str = "llama-tied") -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(LANGUAGES[name]).eval()


def vision(name: str = "dinov2") -> Any:
    torch.manual_seed(2)
    kind, settings, _ = vision_samples.CLASSIFIERS[name]
    return kind(settings()).eval()


def processor(height: int = 32, width: int = 32) -> Any:
    return hf.BitImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": height, "width": width}, image_mean=[0.4] * 3,
        image_std=[0.3] * 3,
    )  # fmt: skip


def asked(made: Any, image: Image.Image, question: str = "what is it ?") -> Any:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return made.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGES)
def test_text_alone_is_read_as_the_language_model_reads_it(name: str) -> None:
    given = language(name)
    before = {key: value.clone() for key, value in given.state_dict().items()}
    tokenizer = vlm_samples.tokenizer()
    model, made = new_vlm(vision(), given, tokenizer, processor(), layers=(1, 3))
    ids = torch.randint(0, 20, (2, 11))
    torch.testing.assert_close(model(ids).logits[..., :40], given(ids).logits, rtol=0, atol=0)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == bool(LANGUAGES[name].tie_word_embeddings)
    # what was given stays as it was
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items())
    assert given.config.vocab_size == 40 and IMAGE not in tokenizer.get_vocab() and tokenizer.chat_template is None
    image = made.tokenizer.convert_tokens_to_ids(IMAGE)
    assert image == model.config.image_token_id == made.image_token_id < model.get_input_embeddings().num_embeddings


def test_the_vocabulary_grows_by_one_row_that_is_the_mean() -> None:
    config = hf.LlamaConfig(**{**SMALL, "vocab_size": len(vlm_samples.tokenizer())})
    torch.manual_seed(1)
    given = AutoModelForCausalLM.from_config(config)
    model, made = new_vlm(vision(), given, vlm_samples.tokenizer(), processor(), layers=(1,))
    for new, old in (
        (model.get_input_embeddings().weight, given.get_input_embeddings().weight),
        (model.lm_head.weight, given.lm_head.weight),
    ):
        assert len(new) == len(old) + 1 == len(made.tokenizer)
        torch.testing.assert_close(new[-1], old.mean(0))


@pytest.mark.parametrize("name", VISIONS)
@pytest.mark.parametrize("layers", [(1, 3), (4,), (0, 2, 4)])
def test_the_projector_reads_the_patches_of_all_depths(name: str, layers: tuple[int, ...]) -> None:
    given = vision(name)
    model, made = new_vlm(given, language(), vlm_samples.tokenizer(), processor(), layers=layers)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        hidden = find_encoder(given).base(pixels, output_hidden_states=True).hidden_states
        read = torch.cat([hidden[layer][:, VISIONS[name] :] for layer in layers], -1)
        want = model.model.multi_modal_projector(read)
        got = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    assert want.shape[1] == 16 == model.config.image_seq_length
    torch.testing.assert_close(got, want)
    inputs = asked(made, Image.new("RGB", (50, 41), "red"))
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= inputs["input_ids"].shape[1] + 3


def test_images_of_other_sizes_and_shapes() -> None:
    model, made = new_vlm(vision(), language(), vlm_samples.tokenizer(), processor(48, 24), layers=(2,))
    inputs = asked(made, Image.new("RGB", (64, 64), "blue"))
    assert inputs["pixel_values"].shape[-2:] == (48, 24)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 18 == model.config.image_seq_length
    assert model(**inputs).logits.isfinite().all()


def test_a_square_image_loses_nothing_and_is_what_training_shows(tmp_path: Path) -> None:
    _, made = new_vlm(vision(), language(), vlm_samples.tokenizer(), processor(), layers=(2,))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    form = PixelFormat.of(made.image_processor)
    pixels = made.image_processor([Image.open(tmp_path / "a.png")], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(form.plain(pixels) * 255, torch.tensor(noise).permute(2, 0, 1).float())
    trained = form.standardised(ImageFolder([tmp_path / "a.png"], (form.height, form.width))[0])
    torch.testing.assert_close(pixels, trained)


def test_generation_ends_where_a_turn_does() -> None:
    given = language()
    given.generation_config.eos_token_id = 7
    model, made = new_vlm(vision(), given, vlm_samples.tokenizer(), processor(), layers=(2,))
    assert model.generation_config.eos_token_id == [7, made.tokenizer.eos_token_id]
    assert given.generation_config.eos_token_id == 7


def test_the_type_of_the_language_model_is_kept() -> None:
    model, _ = new_vlm(vision(), language().to(torch.bfloat16), vlm_samples.tokenizer(), processor(), layers=(2,))
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": ()}, QuickmergeError, "layers must be different whole numbers from 0 to 4, got"),
        ({"layers": (1, 1)}, QuickmergeError, "layers must be different whole numbers"),
        ({"layers": (5,)}, QuickmergeError, "layers must be different whole numbers"),
        ({"layers": (-1,)}, ValueError, "each of layers must be a whole number of at least 0, got -1"),
        ({"vision": "registers"}, UnsupportedModelError, "at most a class token in front of its patches"),
        ({"language": "bert"}, UnsupportedModelError, "language must be a causal language model"),
        ({"processor": (30, 32)}, QuickmergeError, "patches of 8 pixels fill, got 30 x 32"),
        ({"vision": "clip", "processor": (40, 40)}, QuickmergeError, "vision takes no images of 40 x 40 pixels"),
    ],
)
def test_what_does_not_fit_is_told(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    words = hf.BertModel(hf.BertConfig(**{**vision_samples.SIZE, "vocab_size": 40}))
    given = words if changes.get("language") == "bert" else language()
    with pytest.raises(error, match=message):
        new_vlm(
            vision(changes.get("vision", "dinov2")), given, vlm_samples.tokenizer(),
            processor(*changes.get("processor", (32, 32))), layers=changes.get("layers", (2,)),
        )  # fmt: skip
