"""Heads of a vision tower shared out over two processes choose the same tokens as in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm_llava
import vllm_squares
from vllm_samples import engine, written

import quickmerge as qm

pytestmark = pytest.mark.vllm

TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
NAMES = {
    "qwen2_5_vl": "QuickmergeQwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "QuickmergeQwen3VLForConditionalGeneration",
}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


@pytest.mark.parametrize(
    ("tower", "reducer"),
    [("clip", qm.SCOPE(keep=0.3)), ("siglip", qm.QuickMergeVision(keep=0.4, proportional=False))],
    ids=["clip", "siglip"],
)
def test_llava(tmp_path: Path, tower: str, reducer: qm.Reducer) -> None:
    folder = vllm_llava.folder_of(tmp_path, tower)
    wanted = vllm_llava.references(folder, reducer)
    with engine(folder, hf_overrides=vllm_llava.asked(reducer), limit_mm_per_prompt={"image": 2}, **TWO) as llm:
        assert written(llm, vllm_llava.prompts()) == wanted


@pytest.mark.parametrize("family", NAMES)
def test_qwen(tmp_path: Path, family: str) -> None:
    folder, reducer = vllm_squares.folder_of(tmp_path, family), qm.SCOPE(keep=0.3)
    wanted = vllm_squares.references(folder, reducer)
    overrides = vllm_squares.asked(NAMES[family], reducer)
    with engine(folder, hf_overrides=overrides, limit_mm_per_prompt={"image": 2}, **TWO) as llm:
        assert written(llm, vllm_squares.prompts()) == wanted
