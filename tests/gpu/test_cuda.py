"""What only a GPU can show: the same results as on the CPU, no waits, less memory, and the kernels in their place.

`make gpu` runs these; elsewhere they are skipped by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import vision_samples
from decoding_samples import greedy, prompts, tiny
from torch import Tensor

import quickmerge as qm
from quickmerge.bench.harness import mark, settled
from quickmerge.multipole import triton_decode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make gpu runs these")
CUDA = torch.device("cuda")

MERGED: dict[str, Callable[[], qm.Recipe]] = {
    "prefix": lambda: qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.4), mode=qm.Prefix(min_tokens=0))),
    "ToMe, sizes kept": lambda: qm.Recipe(merge=qm.Merge(qm.ToMe(keep=0.4), mode=qm.Prefix(min_tokens=0))),
    "block-causal": lambda: qm.Recipe(merge=qm.Merge(qm.QuickMerge(0.5, pool=1), 1, qm.BlockCausal(chunk=16))),
    "SnapKV": lambda: qm.Recipe(cache=qm.SnapKV(keep=0.3)),
    "Multipole": lambda: qm.Recipe(attention=qm.Multipole(budget=16, sink=2)),
}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Products in float32 as the CPU has them."""
    was = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = was


def model_on(device: torch.device, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    return deepcopy(tiny(**more)).to(device, dtype)


def padded(name: str) -> dict[str, Tensor]:
    """Rows of different lengths, where the way takes them."""
    return prompts((70, 70) if name == "block-causal" else (70, 53))


def on(device: torch.device, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.to(device) for name, each in inputs.items()}


@pytest.mark.parametrize("name", MERGED)
def test_logits_are_those_of_the_cpu(name: str) -> None:
    """In float64, as a choice between tokens is a step: what rounds otherwise could keep another one."""
    found = []
    for device in (torch.device("cpu"), CUDA):
        inputs = on(device, padded(name))
        model = model_on(device)
        with torch.inference_mode(), qm.apply(model, MERGED[name]()):
            out = greedy(model, inputs, 6, output_logits=True, return_dict_in_generate=True)
        found.append((out.sequences.cpu(), torch.stack(out.logits).cpu()))
    (ids, logits), (ids_there, logits_there) = found
    assert torch.equal(ids, ids_there)
    torch.testing.assert_close(logits_there, logits, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MERGED)
def test_half_precision_writes(name: str, dtype: torch.dtype) -> None:
    model, inputs = model_on(CUDA, dtype), on(CUDA, padded(name))
    with torch.inference_mode(), qm.apply(model, MERGED[name]()):
        out = greedy(model, inputs, 6, output_logits=True, return_dict_in_generate=True)
    assert torch.stack(out.logits).isfinite().all()


@pytest.mark.parametrize("drafter", [qm.PromptLookup(ngram=2), qm.SuffixDecoding()])
def test_drafts_leave_the_text(drafter: Any) -> None:
    model, inputs = model_on(CUDA), on(CUDA, prompts((20, 31, 9)))
    plain = greedy(model, inputs, 40)
    with qm.apply(model, qm.Recipe(decoding=drafter)) as run:
        assert torch.equal(greedy(model, inputs, 40), plain)
        assert run.summary()["decoding"].passes > 0


def test_a_model_that_is_left_is_the_same() -> None:
    model, inputs = model_on(CUDA, torch.float32), on(CUDA, prompts((70, 53)))
    before = model(**inputs).logits
    for name, make in MERGED.items():
        with qm.apply(model, make()):
            greedy(model, on(CUDA, padded(name)), 3)
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("name", ["prefix", "SnapKV"])
def test_a_step_waits_for_nothing(name: str) -> None:
    """CUDA's own word for it: what makes the host wait raises."""
    model, inputs = model_on(CUDA, torch.float32), on(CUDA, prompts((70, 70)))
    token = inputs["input_ids"][:, -1:]
    with torch.inference_mode(), qm.apply(model, MERGED[name]()):
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.ones(2, 71, dtype=torch.long, device=CUDA)
        model(token, attention_mask=mask, past_key_values=cache, use_cache=True)
        mask = torch.ones(2, 72, dtype=torch.long, device=CUDA)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(token, attention_mask=mask, past_key_values=cache, use_cache=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_merged_prompt_takes_less_memory() -> None:
    model = model_on(CUDA, torch.float32, max_position_embeddings=8192)
    inputs = on(CUDA, prompts((6000,)))

    def held(recipe: qm.Recipe) -> int:
        with torch.inference_mode(), qm.apply(model, recipe):
            cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
        del cache
        return held

    held(qm.Recipe())
    assert held(MERGED["prefix"]()) < held(qm.Recipe())


def test_the_kernels_take_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """And write what torch's own operations do."""
    pytest.importorskip("triton")
    model, inputs = model_on(CUDA, torch.bfloat16), on(CUDA, prompts((200,)))
    calls, kernels = [], triton_decode.attend_triton

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return kernels(*args, **kwargs)

    monkeypatch.setattr("quickmerge.multipole.attend.attend_triton", counted)
    recipe, found = qm.Recipe(attention=qm.Multipole(budget=16, sink=2)), []
    for switch in ("1", "0"):
        monkeypatch.setenv(triton_decode.SWITCH, switch)
        calls.clear()
        with torch.inference_mode(), qm.apply(model, recipe):
            out = greedy(model, inputs, 4, output_logits=True, return_dict_in_generate=True)
        assert bool(calls) == (switch == "1")
        found.append(torch.stack(out.logits)[:2].float())
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("reducer", [qm.ToMe(keep=0.5), qm.QuickMerge(keep=0.5)])
def test_images_are_those_of_the_cpu(reducer: Any) -> None:
    model, _ = vision_samples.make("vit")
    model, images = model.double(), vision_samples.pictures("vit").double()
    found = []
    for device in (torch.device("cpu"), CUDA):
        with torch.inference_mode(), qm.reduce(model.to(device), replace(reducer)):
            found.append(vision_samples.answer(model(images.to(device))).cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-8)


def test_seconds_are_the_devices() -> None:
    """The host is long past a product that the device is busy with."""
    big = torch.randn(4096, 4096, device=CUDA)
    big @ big
    torch.cuda.synchronize()
    began = mark(CUDA)
    for _ in range(50):
        big @ big
    lapse = mark(CUDA) - began
    assert float(lapse) > 50 * 2 * 4096**3 / 1e15  # no card does a petaflop a second in float32
    assert settled(type("Held", (), {"lapse": lapse})()) is not None
