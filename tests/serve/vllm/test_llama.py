"""Prompts merged inside vLLM's Llama write what they write in transformers inside `qm.reduce(layer=...)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from vllm_samples import TEXT, VOCABULARY, by_transformers, engine, save, tokenizer, written

import quickmerge as qm
from quickmerge.recipe import Recipe

pytestmark = pytest.mark.vllm

NAME = "QuickmergeLlamaForCausalLM"
LENGTHS = (183, 130, 233, 40)
"""Tokens of the prompts; the last one is read in full."""
MODE = qm.Prefix(min_tokens=64)
METHODS = {
    "quickmerge": qm.QuickMerge(keep=0.4, spans="none"),
    "attention": qm.Attention(keep=qm.Count(70)),
    "tome": qm.ToMe(keep=0.5, proportional=False),
    "uniform": qm.Uniform(keep=0.3),
    "everything": qm.Uniform(keep=1.0),
}


def folder_of(folder: Path) -> str:
    """A random Llama of six blocks."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**TEXT, "num_hidden_layers": 6})
    return save(folder, hf.LlamaForCausalLM(config).eval(), tokenizer())


def prompts() -> list[list[int]]:
    noise = torch.Generator().manual_seed(3)
    return [[1, *torch.randint(11, VOCABULARY, (n - 1,), generator=noise).tolist()] for n in LENGTHS]


def asked(reducer: qm.Reducer, layer: int = 3) -> dict[str, Any]:
    return {"architectures": [NAME], "quickmerge": Recipe(merge=qm.Merge(reducer, layer=layer, mode=MODE)).as_dict()}


def references(folder: str, reducer: qm.Reducer, layer: int = 3) -> list[list[int]]:
    model = hf.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for ids in prompts():
        with qm.reduce(model, reducer, layer=layer, mode=MODE):
            found.append(by_transformers(model, {"input_ids": torch.tensor([ids])}))
    return found


SETTINGS: dict[str, Any] = {
    "enable_chunked_prefill": False, "max_num_batched_tokens": 1024, "max_num_seqs": 4, "enable_prefix_caching": False,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_it_writes_what_transformers_write(tmp_path: Path, method: str) -> None:
    reducer, folder = METHODS[method], folder_of(tmp_path)
    wanted, plain = references(folder, reducer), references(folder, METHODS["everything"])
    every = [{"prompt_token_ids": ids} for ids in prompts()]
    with engine(folder, hf_overrides=asked(reducer), **SETTINGS) as llm:
        together = written(llm, every)
        alone = [written(llm, [each])[0] for each in every]
    assert together == wanted and alone == wanted
    assert wanted[3] == plain[3] and (method == "everything") == (wanted == plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enforce_eager", False),
        ("enable_prefix_caching", True),
        ("enable_chunked_prefill", True),
        ("tensor_parallel_size", 2),
    ],
)
def test_what_can_not_be_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from quickmerge.serve.vllm.llama import QuickmergeLlama

    usual = {**SETTINGS, "enforce_eager": True, "dtype": "float32", "max_model_len": 512, name: value}
    settings = EngineArgs(model=folder_of(tmp_path), hf_overrides=asked(METHODS["uniform"]), **usual)
    with pytest.raises(qm.QuickmergeError, match=f"{name} must be"):
        QuickmergeLlama(vllm_config=settings.create_engine_config())


def test_a_cache_too_small_for_all_is_refused(tmp_path: Path) -> None:
    """The last test of the module, since an engine that failed breaks later ones in its process."""
    settings = {**SETTINGS, "max_num_seqs": 8192, "max_num_batched_tokens": 8192}
    folder, wanted = folder_of(tmp_path), asked(METHODS["uniform"])
    refused = pytest.raises(Exception, match="max_num_seqs must be")
    with engine(folder, hf_overrides=wanted, **settings) as llm, refused:
        written(llm, [{"prompt_token_ids": prompts()[0]}])
