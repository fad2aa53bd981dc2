"""LLaVA in vLLM with fewer visual tokens writes what it writes in transformers inside `qm.reduce`."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_llava import METHODS, asked, folder_of, prompts, references
from vllm_samples import STEPS, engine, written

import quickmerge as qm

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_it_writes_what_transformers_write(tmp_path: Path, tower: str, method: str) -> None:
    reducer = METHODS[method]
    folder = folder_of(tmp_path, tower)
    wanted = references(folder, reducer)
    plain = references(folder, qm.SCOPE(keep=1.0))
    with engine(folder, hf_overrides=asked(reducer), limit_mm_per_prompt={"image": 2}) as llm:
        together = written(llm, prompts())
        alone = [written(llm, [each])[0] for each in prompts()]
    assert together == wanted and alone == wanted
    assert all(len(each) == STEPS for each in wanted)
    assert (method == "everything") == (wanted == plain)


def test_prompts_read_in_chunks_write_the_same(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "clip", layer=-1)
    reducer = METHODS["scope"]
    wanted = references(folder, reducer)
    settings = {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "disable_chunked_mm_input": False}
    with engine(folder, hf_overrides=asked(reducer), limit_mm_per_prompt={"image": 2}, **settings) as llm:
        assert written(llm, prompts()) == wanted
