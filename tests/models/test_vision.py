from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from quickmerge.errors import DamagedWeightsError, QuickmergeError, UnknownModelError, UnsupportedModelError
from quickmerge.models import VISION_MODELS, load_vision

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}


def bit() -> BitImageProcessorPil:
    return BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})


def save(model: Any, folder: Path, processor: Any = None) -> Path:
    model.save_pretrained(folder)
    (processor or bit()).save_pretrained(folder)
    return folder


def dinov2() -> Dinov2Config:
    torch.manual_seed(0)
    return Dinov2Config(**SIZES, patch_size=8, num_labels=3)


def vit() -> ViTConfig:
    torch.manual_seed(0)
    return ViTConfig(**SIZES, intermediate_size=32, patch_size=8, num_labels=3)


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Dinov2ForImageClassification, Path]:
    model = Dinov2ForImageClassification(dinov2()).eval()
    return model, save(model, tmp_path / "classifier")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_features_and_classes_are_those_of_the_saved_model(
    classifier: tuple[Dinov2ForImageClassification, Path], photo: Path
) -> None:
    saved, folder = classifier
    bare, processor = load_vision(folder, progress=False)
    whole, _ = load_vision(str(folder), task="classify", progress=False)
    assert (type(bare), type(whole)) == (Dinov2Model, Dinov2ForImageClassification)
    assert not bare.training and not whole.training
    with Image.open(photo) as image:
        pixels = processor([image, image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32) and pixels.dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(whole(pixels).logits, saved(pixels).logits)
        assert torch.equal(bare(pixels).last_hidden_state, saved.dinov2(pixels).last_hidden_state)


def test_the_processor_takes_paths_too(classifier: tuple[Any, Path], photo: Path) -> None:
    _, processor = load_vision(classifier[1], progress=False)
    with Image.open(photo) as image:
        expected = processor([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor([str(photo)], return_tensors="pt")["pixel_values"], expected)


def test_the_processor_needs_no_torchvision(classifier: tuple[Any, Path]) -> None:
    _, processor = load_vision(classifier[1], progress=False)
    assert isinstance(processor, BitImageProcessorPil)


def test_a_bare_model_of_a_classifier_has_no_pooler_of_random_numbers(tmp_path: Path) -> None:
    saved = ViTForImageClassification(vit()).eval()
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    model, _ = load_vision(save(saved, tmp_path, processor), progress=False)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model(pixels)
        assert torch.equal(output.last_hidden_state, saved.vit(pixels).last_hidden_state)
    assert output.pooler_output is None


def test_a_pooler_that_was_saved_is_kept(tmp_path: Path) -> None:
    saved = ViTModel(vit()).eval()
    model, _ = load_vision(save(saved, tmp_path), progress=False)
    assert torch.equal(model.pooler.dense.weight, saved.pooler.dense.weight)


def test_a_model_without_tokens_is_a_vision_model_too(tmp_path: Path) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    model, _ = load_vision(save(ResNetModel(ResNetConfig(**sizes)), tmp_path), progress=False)
    assert isinstance(model, ResNetModel)


def test_dtype_and_attention_are_those_asked_for(classifier: tuple[Any, Path]) -> None:
    model, _ = load_vision(classifier[1], dtype="bfloat16", attn_implementation="eager", progress=False)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_loading_is_silent(classifier: tuple[Any, Path], capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    load_vision(classifier[1])
    assert capfd.readouterr() == ("", "")


def one_sentence(error: BaseException) -> bool:
    return "\n" not in str(error) and not str(error).endswith(".")


def test_a_language_model_is_refused(tiny_folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(UnsupportedModelError, match=r"is not a vision model \(LlamaForCausalLM\)") as caught:
        load_vision(tiny_folder, progress=False)
    assert one_sentence(caught.value)


@pytest.mark.parametrize("task", ["features", "classify"])
def test_a_model_that_also_reads_text_is_refused(tmp_path: Path, task: Any) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 8, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})
    with pytest.raises(UnsupportedModelError, match=r"is not a vision model \(CLIPModel\).*images alone"):
        load_vision(save(CLIPModel(config), tmp_path), progress=False, task=task)


def test_an_encoder_of_text_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, vocab_size=8)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"is not a vision model \(BertModel\)"):
        load_vision(tmp_path, progress=False)


def test_a_model_without_a_head_can_not_classify(tmp_path: Path) -> None:
    folder = save(Dinov2Model(dinov2()), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"no classification head \(Dinov2Model\): give task='features'"):
        load_vision(folder, task="classify", progress=False)


def test_a_folder_without_a_processor_is_refused(classifier: tuple[Any, Path]) -> None:
    (classifier[1] / "preprocessor_config.json").unlink()
    with pytest.raises(UnsupportedModelError, match="has no usable image processor") as caught:
        load_vision(classifier[1], progress=False)
    assert one_sentence(caught.value)


@pytest.mark.parametrize(("task", "name"), [("features", "dinov2.layernorm.weight"), ("classify", "classifier.weight")])
def test_missing_tensors_are_damage_and_not_random_numbers(classifier: tuple[Any, Path], task: Any, name: str) -> None:
    weights = load_file(classifier[1] / "model.safetensors")
    del weights[name]
    save_file(weights, classifier[1] / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedWeightsError, match=f"1 tensors are missing, {name.removeprefix('dinov2.')}"):
        load_vision(classifier[1], task=task, progress=False)


@pytest.mark.parametrize("given", ["vit-smal-14", "zebra", "", "/no/such/folder"])
def test_an_unknown_name_says_what_is_allowed(given: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        load_vision(given)
    assert all(word in str(caught.value) for word in (*VISION_MODELS, "local model folder", "hub id"))
    assert ("did you mean 'vit-small-14'?" in str(caught.value)) == (given == "vit-smal-14")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("task", "feature", r"did you mean 'features'\?\), but must be one of: features, classify"),
        ("task", None, "task is None, but must be one of"),
        ("dtype", "float23", "did you mean 'float32'"),
        ("device", "gpu", "device is 'gpu'"),
        ("attn_implementation", "sdpaa", "did you mean 'sdpa'"),
    ],
)
def test_a_wrong_option_names_itself(classifier: tuple[Any, Path], option: str, value: Any, said: str) -> None:
    with pytest.raises(QuickmergeError, match=said):
        load_vision(classifier[1], progress=False, **{option: value})
