import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, ViTConfig, ViTModel

from quickmerge.errors import DamagedWeightsError, QuickmergeError, UnknownModelError, UnsupportedModelError
from quickmerge.models import MODELS, load


def test_smollm2_knows_the_capital_of_france(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])


def test_smollm2_is_ready_to_generate(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert not model.training
    assert model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49152)
    assert getattr(model.config, "quantization_config", None) is None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id is not None
    assert tokenizer.model_max_length == 8192


def test_smollm2_keeps_its_chat_template(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_splits_digits_and_the_white_space_before_them(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    assert tokenizer.tokenize("a\n\n12  34") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3", "4"]
    text = "def f(x):\n\treturn 3.14  # naïve — test\n\n\n2026"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_folder_loads_as_it_was_saved(tiny_folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    model, tokenizer = load(tiny_folder, progress=False)
    ids = torch.tensor([[2, 3, 0, 2]])
    assert torch.equal(model(ids).logits, tiny_llama(ids).logits)
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "</s>"


def test_dtype_and_attention_are_those_asked_for(tiny_folder: Path) -> None:
    model, _ = load(str(tiny_folder), dtype="bfloat16", attn_implementation="eager", progress=False)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert load(tiny_folder, dtype=torch.float64, progress=False)[0].dtype == torch.float64


def test_loading_is_silent(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(tiny_folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m'?"),
        ("SmolLM2-135M", "did you mean 'smollm2-135m'?"),
        ("zebra", "no model is called 'zebra'"),
        ("", "no model is called ''"),
        ("/no/such/folder", "there is no folder '/no/such/folder'"),
        ("./folder", "there is no folder './folder'"),
        ("a/b/c", "there is no folder 'a/b/c'"),
    ],
)
def test_an_unknown_name_says_what_is_allowed(given: str, said: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        load(given)
    assert said in str(caught.value)
    assert all(word in str(caught.value) for word in (*MODELS, "local model folder", "hub id"))
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownModelError, match="the hub has no model 'nobody/nothing-at-all'"):
        load("nobody/nothing-at-all", progress=False)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"")
    with pytest.raises(UnknownModelError, match="is a file: give the folder"):
        load(tmp_path / "weights")


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"is not a causal language model \(ViTModel\)"):
        load(tmp_path, progress=False)


def test_a_folder_without_a_tokenizer_is_refused(tiny_folder: Path) -> None:
    for path in tiny_folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UnsupportedModelError, match="has no usable tokenizer"):
        load(tiny_folder, progress=False)


def test_missing_tensors_are_damage_and_not_random_numbers(tiny_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tiny_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedWeightsError, match=r"1 tensors are missing, model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tiny_folder, progress=False)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("dtype", "float23", "did you mean 'float32'.*must be one of: float32, bfloat16"),
        ("dtype", torch.int8, "dtype is 'int8'"),
        ("device", "gpu", "device is 'gpu'.*it has: cpu"),
        ("device", "cuda:99", "device is 'cuda:99'"),
        ("attn_implementation", "sdpaa", "did you mean 'sdpa'.*must be one of: .*eager"),
    ],
)
def test_a_wrong_option_names_itself(tiny_folder: Path, option: str, value: Any, said: str) -> None:
    with pytest.raises(QuickmergeError, match=said):
        load(tiny_folder, progress=False, **{option: value})


def test_the_package_loads_nothing_heavy_by_itself() -> None:
    import subprocess

    code = "import sys, quickmerge.models; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
