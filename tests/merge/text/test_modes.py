"""The two modes as objects: their checks, their names, and that an object and loose settings are one thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.text.modes import as_mode


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: qm.Prefix(sinks=-1), "sinks"),
        (lambda: qm.Prefix(recent=0), "recent"),
        (lambda: qm.Prefix(min_tokens=1.5), "min_tokens"),
        (lambda: qm.Prefix(protect=3), "protect"),
        (lambda: qm.BlockCausal(sinks=-1), "sinks"),
        (lambda: qm.BlockCausal(chunk=1), "chunk"),
        (lambda: qm.BlockCausal(window=0), "window"),
        (lambda: as_mode("prefix", {"window": 3}), "window is no setting of prefix mode"),
        (lambda: as_mode("block_causal", {"min_tokens": 3}), "min_tokens is no setting of block_causal mode"),
        (lambda: as_mode("sideways", {}), "mode must be one of prefix, block_causal"),
        (lambda: as_mode(qm.Prefix(), {"sinks": 3}), r"sinks must stand in the mode, Prefix\(sinks=...\)"),
    ],
)
def test_what_is_wrong_is_named(make: Any, named: str) -> None:
    with pytest.raises((ValueError, QuickmergeError), match=named):
        make()


def test_a_setting_that_nobody_has_is_an_unexpected_argument(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'sink'"):
        qm.reduce(tiny_llama, qm.Uniform(keep=0.5), sink=3)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "mode, loose",
    [
        (qm.Prefix(sinks=1, recent=2, min_tokens=0), {"sinks": 1, "recent": 2, "min_tokens": 0}),
        (qm.BlockCausal(sinks=1, chunk=4, window=3), {"mode": "block_causal", "sinks": 1, "chunk": 4, "window": 3}),
    ],
)
def test_an_object_and_loose_settings_give_the_same_logits(
    mode: Any, loose: dict[str, Any], tiny_llama: LlamaForCausalLM
) -> None:
    ids = torch.randint(2, 60, (2, 23), generator=torch.Generator().manual_seed(0))
    found = []
    for settings in ({"mode": mode}, loose):
        with torch.no_grad(), qm.reduce(tiny_llama, qm.Uniform(keep=0.5), 1, **settings) as run:
            found.append(tiny_llama(ids).logits)
        assert run.summary().tokens_in == 23
    assert torch.equal(*found)
