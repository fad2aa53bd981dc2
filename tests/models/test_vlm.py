"""Loading vision-language models, and asking them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import vision_samples
import vlm_samples
from PIL import Image
from safetensors.torch import load_file, save_file

import quickmerge as qm
from quickmerge.errors import DamagedWeightsError, QuickmergeError, UnknownModelError, UnsupportedModelError
from quickmerge.merge.train.new_vlm import new_vlm
from quickmerge.models import ask_inputs, load_vlm

TEXT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TOWER: dict[str, Any] = {**vision_samples.SIZE, **vision_samples.IMAGE}


def made() -> tuple[Any, Any]:
    torch.manual_seed(0)
    shown = hf.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    language = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    tower = hf.Dinov2Model(hf.Dinov2Config(**TOWER, mlp_ratio=2))
    return new_vlm(tower, language, vlm_samples.tokenizer(), shown, layers=(2, 4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in made():
        part.save_pretrained(tmp_path / "vlm")
    return tmp_path / "vlm"


def test_a_folder_loads_as_it_was_saved(folder: Path) -> None:
    model, processor = made()
    again, read = qm.load_vlm(folder, progress=False)
    assert isinstance(again, hf.LlavaForConditionalGeneration) and not again.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert type(read.image_processor) is hf.BitImageProcessorPil and read.tokenizer.padding_side == "left"
    picture = Image.new("RGB", (40, 30), "red")
    one, two = (ask_inputs(each, [picture], "what is it ?") for each in (processor, read))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(model(**one).logits, again(**two).logits)


def test_how_it_is_held_can_be_chosen(folder: Path) -> None:
    model, _ = load_vlm(folder, dtype="bfloat16", attn_implementation="eager", progress=False)
    assert model.dtype == torch.bfloat16 and model.config.text_config._attn_implementation == "eager"
    with pytest.raises(QuickmergeError, match="dtype is 'int4'"):
        load_vlm(folder, dtype="int4", progress=False)


def test_other_families_load(tmp_path: Path) -> None:
    config = hf.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **TOWER}, text_config={"model_type": "llama", **TEXT},
        image_token_index=39, image_grid_pinpoints=[[32, 32], [32, 64]],
    )  # fmt: skip
    hf.LlavaNextForConditionalGeneration(config).save_pretrained(tmp_path)
    _, processor = made()
    hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        processor.tokenizer, patch_size=8, num_additional_image_tokens=1, vision_feature_select_strategy="default",
    ).save_pretrained(tmp_path)  # fmt: skip
    model, read = load_vlm(tmp_path, progress=False)
    assert isinstance(model, hf.LlavaNextForConditionalGeneration) and isinstance(read, hf.LlavaNextProcessor)
    assert isinstance(read.image_processor, hf.LlavaNextImageProcessorPil)


def test_a_question_is_put_behind_its_images(folder: Path) -> None:
    model, processor = load_vlm(folder, progress=False)
    for mode in ("RGB", "L", "RGBA", "P"):
        inputs = ask_inputs(processor, [Image.new(mode, (40, 30))] * 2, "what is it ?")
        assert inputs["pixel_values"].shape == (2, 3, 32, 32)
        told = processor.tokenizer.decode(inputs["input_ids"][0])
        assert told.count("<image>") == 32 and told.index("<image>") < told.index("what is it ?")
        assert model(**inputs).logits.isfinite().all()
    plain = ask_inputs(processor, [], "what is it ?")
    assert set(plain) == {"input_ids", "attention_mask"} and not (plain["input_ids"] == processor.image_token_id).any()


def test_questions_that_can_not_be_put(folder: Path) -> None:
    _, processor = load_vlm(folder, progress=False)
    with pytest.raises(QuickmergeError, match="question must hold some text, got none"):
        ask_inputs(processor, [], " \n")
    with pytest.raises(QuickmergeError, match="question must not hold <image>, which stands for an image"):
        ask_inputs(processor, [], "what is <image> ?")
    processor.chat_template = None
    with pytest.raises(QuickmergeError, match="the LlavaProcessor has no chat template"):
        ask_inputs(processor, [], "what is it ?")


def test_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).save_pretrained(tmp_path / "text")
    hf.Dinov2Model(hf.Dinov2Config(**TOWER, mlp_ratio=2)).save_pretrained(tmp_path / "vision")
    for name, message in (
        (tmp_path / "text", r"reads text alone \(LlamaForCausalLM\): give one that reads images and text"),
        (tmp_path / "vision", r"is not a vision-language model \(Dinov2Model\)"),
        ("smollm2-135m", "is a language model, not a vision-language model: open it with load, or make one"),
        ("vit-small-14", "is a vision model, not a vision-language model: open it with load_vision"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            load_vlm(name, progress=False)


def test_a_folder_that_is_not_there_or_not_whole(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="no model is called 'nope': give a local model folder, or a hub id"):
        load_vlm("nope", progress=False)
    weights = load_file(folder / "model.safetensors")
    save_file({name: weights[name] for name in sorted(weights)[1:]}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedWeightsError, match="1 tensors are missing"):
        load_vlm(folder, progress=False)
    (folder / "model.safetensors").write_bytes(b"12345678901")
    with pytest.raises(DamagedWeightsError, match="its header is cut off"):
        load_vlm(folder, progress=False)


def test_a_processor_that_is_missing_or_garbled(folder: Path) -> None:
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="has no usable processor"):
        load_vlm(folder, progress=False)
    (folder / "processor_config.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"has no (usable )?processor"):
        load_vlm(folder, progress=False)


@pytest.mark.skipif(hf.utils.is_torchvision_available(), reason="torchvision is installed")
def test_a_video_processor_needs_torchvision(folder: Path) -> None:
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4},
    )  # fmt: skip
    hf.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    parts = {"image_processor": {"image_processor_type": "Qwen2VLImageProcessor"},
             "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"}}  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor", **parts}))
    with pytest.raises(UnsupportedModelError, match="prepares video too, which needs torchvision: install torchvision"):
        load_vlm(folder, progress=False)
