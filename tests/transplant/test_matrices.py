from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from transplant_samples import FAMILIES, SIZE, model_folder, tensors

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.transplant.checkpoint import Matrices, find_matrices, open_checkpoint

NAMES = {
    "llama": ("model.embed_tokens.weight", "lm_head.weight", None),
    "llama tied": ("model.embed_tokens.weight", None, None),
    "qwen2": ("model.embed_tokens.weight", None, None),
    "gpt2": ("transformer.wte.weight", None, None),
    "neox": ("gpt_neox.embed_in.weight", "embed_out.weight", None),
    "phi": ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"),
    "gemma3": ("model.embed_tokens.weight", None, None),
}


def find(folder: Path, **more: Any) -> Matrices:
    return find_matrices(open_checkpoint(folder), hf.AutoConfig.from_pretrained(folder), **more)


def rewrite(folder: Path, change: Any) -> None:
    given = {name: value.clone() for name, value in tensors(folder).items()}
    save_file(change(given), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_matrices_of_each_family_are_found(tmp_path: Path, family: str) -> None:
    found = find(model_folder(tmp_path / "m", family))
    named = tuple(None if entry is None else entry.name for entry in (found.input, found.output, found.bias))
    assert named == NAMES[family] and found.rows == 420 and not found.twins


def test_a_checkpoint_of_the_bare_model_has_no_prefix(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "gpt2")
    rewrite(folder, lambda given: {name.removeprefix("transformer."): value for name, value in given.items()})
    assert find(folder).input.name == "wte.weight"


def test_a_tied_matrix_may_be_saved_twice(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "llama tied")
    rewrite(folder, lambda given: {**given, "lm_head.weight": given["model.embed_tokens.weight"].clone()})
    found = find(folder)
    assert found.output is None and [twin.name for twin in found.twins] == ["lm_head.weight"]
    # transformers unties what differs, whatever the config says
    rewrite(folder, lambda given: {**given, "lm_head.weight": given["model.embed_tokens.weight"] + 1})
    found = find(folder)
    assert found.output is not None and found.output.name == "lm_head.weight" and not found.twins


def test_a_tied_matrix_may_be_saved_under_the_name_of_the_output(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "llama tied")
    rewrite(folder, lambda given: {name.replace("model.embed_tokens", "lm_head"): v for name, v in given.items()})
    found = find(folder)
    assert found.input.name == "lm_head.weight" and found.output is None


def test_an_encoder_lends_its_rows_and_keeps_its_tokenizer(tmp_path: Path) -> None:
    hf.BertModel(hf.BertConfig(vocab_size=50, max_position_embeddings=32, **SIZE)).save_pretrained(tmp_path)
    assert find(tmp_path, donor=True).input.name == "embeddings.word_embeddings.weight"
    with pytest.raises(UnsupportedModelError, match=r"not a causal language model \(BertModel\)"):
        find(tmp_path)


def test_a_model_with_more_rows_for_each_token_is_refused(tmp_path: Path) -> None:
    own = {"layer_types": ["full_attention"], "activation_sparsity_pattern": [0.0], "num_kv_shared_layers": 0}
    own |= {"altup_num_inputs": 2, "laurel_rank": 4, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    sizes = {**SIZE, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 1, "vocab_size": 64}
    config = hf.Gemma3nTextConfig(**{**sizes, **own})
    hf.Gemma3nForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="keeps more for each token than embeddings"):
        find(tmp_path)


def test_rows_that_are_no_plain_numbers_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "llama tied")
    name = "model.embed_tokens.weight"
    rewrite(folder, lambda given: {**given, name: given[name].to(torch.int8)})
    with pytest.raises(QuickmergeError, match="must be saved in one of F64, F32, F16, BF16, got I8"):
        find(folder)
