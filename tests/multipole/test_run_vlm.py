"""Multipole attention in vision-language models, with all of their visual tokens and with fewer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from vlm_zoo import METHODS, ROWS, build, prompt

import quickmerge as qm
from quickmerge.errors import UnsupportedModelError
from quickmerge.models.decoder import _WATCHED, PREFIX

TOLD: dict[str, Any] = {"sink": 2, "interval": 4, "ratio": 0.25}


def write(model: Any, inputs: dict[str, Any], steps: int = 8) -> Any:
    return model.generate(
        **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip


def all_close(found: Any, wanted: Any) -> None:
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def assert_free(model: Any) -> None:
    """No run is attached; transformers' own hooks, by which a tower hands out its layers, stay."""
    for name, module in model.named_modules():
        assert module not in _WATCHED, f"{name} is still watched"
        config = getattr(module, "config", None)
        assert config is None or not str(config._attn_implementation).startswith(PREFIX), name


@pytest.mark.parametrize("family", ["idefics3", "llava", "qwen2_5_vl", "qwen3_vl"])
def test_it_reads_images_as_it_reads_text(family: str) -> None:
    model = build(family)
    inputs = prompt(model, ROWS)
    wanted = write(model, inputs)
    with qm.multipole(model, **TOLD, budget=1000):
        all_close(write(model, inputs), wanted)
    with qm.multipole(model, **TOLD, budget=8) as run:
        out = write(model, inputs)
    assert all(bool(step.isfinite().all()) for step in out.logits)
    assert_free(model)
    assert run.summary().rows == 3 and run.summary().rows_read < run.summary().rows_dense


@pytest.mark.parametrize("order", ["reduce first", "multipole first"])
@pytest.mark.parametrize(("family", "method"), [("llava", "scope"), ("qwen2_vl", "random"), ("smolvlm", "scope")])
def test_it_goes_with_fewer_visual_tokens(family: str, method: str, order: str) -> None:
    model = build(family)
    inputs = prompt(model, ROWS)
    with qm.reduce(model, METHODS[method]) as alone:
        wanted = write(model, inputs)
    with ExitStack() as stack:
        for kind in ("reduce", "multipole") if order == "reduce first" else ("multipole", "reduce"):
            if kind == "reduce":
                run = stack.enter_context(qm.reduce(model, METHODS[method]))
            else:
                stack.enter_context(qm.multipole(model, **TOLD, budget=1000))
        all_close(write(model, inputs), wanted)
    assert_free(model)
    assert run.summary().visual_kept == alone.summary().visual_kept < alone.summary().visual_in


def test_places_in_a_grid_cannot_be_turned_back() -> None:
    with pytest.raises(UnsupportedModelError, match=r"space must be 'rotated' for Qwen2_5_VL.*places in a grid"):
        qm.multipole(build("qwen2_5_vl"), space="windowed")
    assert qm.multipole(build("llava"), space="windowed").settings.space == "windowed"
