"""Qwen2.5-VL in vLLM with fewer visual tokens writes what it writes in transformers inside `qm.reduce`."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_samples import engine, written
from vllm_squares import METHODS, asked, folder_of, prompts, references

pytestmark = pytest.mark.vllm

FAMILY, NAME = "qwen2_5_vl", "QuickmergeQwen2_5_VLForConditionalGeneration"


@pytest.mark.parametrize("method", METHODS)
def test_it_writes_what_transformers_write(tmp_path: Path, method: str) -> None:
    reducer = METHODS[method]
    folder = folder_of(tmp_path, FAMILY)
    wanted, plain = references(folder, reducer), references(folder, METHODS["everything"])
    with engine(folder, hf_overrides=asked(NAME, reducer), limit_mm_per_prompt={"image": 2}) as llm:
        together = written(llm, prompts())
        alone = [written(llm, [each])[0] for each in prompts()]
    assert together == wanted and alone == wanted
    assert (method == "everything") == (wanted == plain)


def test_prompts_read_in_chunks_write_the_same(tmp_path: Path) -> None:
    folder, reducer = folder_of(tmp_path, FAMILY), METHODS["scope"]
    wanted = references(folder, reducer)
    settings = {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "disable_chunked_mm_input": False}
    with engine(folder, hf_overrides=asked(NAME, reducer), limit_mm_per_prompt={"image": 2}, **settings) as llm:
        assert written(llm, prompts()) == wanted
