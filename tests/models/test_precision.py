"""In which numbers a model computes: what ``dtype="auto"`` takes, what it measures, and packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop
from transformers import CLIPVisionConfig, GPT2Config, LlamaConfig

import quickmerge as qm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.models import precision
from quickmerge.models.precision import ROWS, Chosen, Matrix, choose, dtype_name, matrices

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 100}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_KNOWN", {})


def with_bfloat16(monkeypatch: pytest.MonkeyPatch, has: bool = True) -> None:
    name = "avx512_bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: has, "avx2": True, "cpu_name": "bf16"})


def test_the_matrices_are_those_that_a_token_passes(tiny_llama: Any) -> None:
    """As many weights as the model's own linear layers hold, whatever else the model is made of."""
    wanted = sum(m.weight.numel() for m in tiny_llama.modules() if isinstance(m, torch.nn.Linear))
    assert sum(m.out * m.into * m.count for m in matrices(tiny_llama.config)) == wanted
    grouped = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=6, **SIZES)
    assert matrices(grouped) == [
        Matrix(24, 32, 3), Matrix(12, 32, 6), Matrix(32, 24, 3), Matrix(48, 32, 6), Matrix(32, 48, 3), Matrix(100, 32)
    ]  # fmt: skip
    assert matrices(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100))[3] == Matrix(128, 32, 4)
    with pytest.raises(UnsupportedModelError, match="dtype 'auto' needs vocab_size of a CLIPVisionConfig"):
        matrices(CLIPVisionConfig())


step = st.floats(1e-4, 1.0)


@given(float32=st.lists(step, min_size=5, max_size=5), bfloat16=st.lists(step, min_size=5, max_size=5))
@prop(60)
def test_the_faster_step_decides(float32: list[float], bfloat16: list[float]) -> None:
    found = precision.decide(dict(zip(ROWS, float32, strict=True)), dict(zip(ROWS, bfloat16, strict=True)))
    ratios = [a / b for a, b in zip(float32, bfloat16, strict=True)]
    assert (found.dtype == "bfloat16") == (ratios[0] >= 1.1 or (ratios[0] >= 1 and min(ratios[1:]) >= 1.1))
    assert found.speedup() == ratios[0]


def test_a_measurement_is_of_all_weights_and_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with_bfloat16(monkeypatch)
    config = LlamaConfig(num_attention_heads=4, **SIZES)
    found = choose(config)
    assert found.dtype in ("float32", "bfloat16") and not found.reason
    assert set(found.float32) == set(found.bfloat16) == set(ROWS)
    assert all(seconds > 0 for seconds in (*found.float32.values(), *found.bfloat16.values()))
    assert choose(LlamaConfig(num_attention_heads=4, **SIZES)) is found
    assert f"dtype auto: {found.dtype}; matrix products of a decoding step take" in str(found)
    assert found.as_dict()["threads"] == torch.get_num_threads()


@given(sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4),
       pool=st.integers(1, 4000))  # fmt: skip
@prop(40)
def test_what_is_timed_fits_and_stands_for_all(sizes: list[tuple[int, int, int]], pool: int) -> None:
    found = tuple(Matrix(*each) for each in sizes)
    layout = precision._layout(found, pool)
    assert {which for which, _ in layout} == set(range(len(found)))  # each of them is timed
    for which, matrix in enumerate(found):
        own = [rows for at, rows in layout if at == which]
        assert len(own) <= matrix.count and len(set(own)) == 1 and own[0] <= matrix.out
    least = sum(matrix.into for matrix in found)
    assert sum(rows * found[which].into for which, rows in layout) <= max(pool, pool // 2 + least)


def test_nothing_is_measured_where_nothing_is_to_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(precision, "timed", refuse)
    config = LlamaConfig(**SIZES)
    with_bfloat16(monkeypatch, False)
    assert choose(config) == Chosen("float32", "this CPU has no instructions for bfloat16")
    for has, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert choose(config, "cuda").dtype == dtype
    assert "this is mps" in str(choose(config, "mps"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_comes_in_what_was_chosen(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], dtype: str
) -> None:
    with_bfloat16(monkeypatch)
    fast = {"float32": 2.0, "bfloat16": 0.5}[dtype]
    monkeypatch.setattr(precision, "timed", lambda _: (dict.fromkeys(ROWS, 1.0), dict.fromkeys(ROWS, fast)))
    model, _ = qm.load(tiny_folder, dtype="auto")
    assert dtype_name(model) == dtype
    said = capfd.readouterr().err
    assert said.startswith(f"dtype auto: {dtype}; ") and said.count("\n") == 1
    qm.load(tiny_folder, dtype="auto", progress=False)
    assert capfd.readouterr() == ("", "")


def test_packed_weights_say_nearly_the_same(tiny_folder: Path) -> None:
    pytest.importorskip("torchao")
    plain, _ = qm.load(tiny_folder, dtype="bfloat16", progress=False)
    model, _ = qm.load(tiny_folder, dtype="int8", progress=False)
    assert (dtype_name(plain), dtype_name(model)) == ("bfloat16", "int8")
    ids = torch.tensor([[2, 3, 0, 2, 3]])
    with torch.inference_mode():
        wanted, found = plain(ids).logits.float(), model(ids).logits.float()
        one, other = plain.model.layers[0], model.model.layers[0]
        assert not torch.equal(one.mlp.up_proj.weight.float(), other.mlp.up_proj.weight.dequantize().float())
    assert float((wanted - found).norm() / wanted.norm()) < 0.05
    assert torch.equal(plain.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_what_is_missing_or_unknown_is_one_sentence(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QuickmergeError, match=r"dtype is 'int4' .*must be one of: float32, .*, int8, auto"):
        qm.load(tiny_folder, dtype="int4", progress=False)
    with pytest.raises(QuickmergeError, match="dtype is 'auto', but must be one of: float32, bfloat16, float16, flo"):
        qm.load_vision(tiny_folder, dtype="auto", progress=False)
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(QuickmergeError, match=r"dtype 'int8' needs torchao \(.*pip install 'quickmerge\[int8\]'"):
        qm.load(tiny_folder, dtype="int8", progress=False)
