"""The draft heads that ship, on the real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quickmerge as qm
from quickmerge.data import GUMIHOS, demo_document

MOST = 25 * 2**20


@pytest.mark.parametrize("name", GUMIHOS)
def test_they_are_small_and_say_what_they_are_for(name: str) -> None:
    folder = qm.shipped_gumiho(name)
    assert folder is not None
    assert sum(path.stat().st_size for path in folder.iterdir()) < MOST
    assert qm.Gumiho.from_pretrained(folder).config.trained_for["model"] == name
    assert qm.shipped_gumiho("no such") is None


def test_they_save_passes_and_change_nothing(smollm2: tuple[Any, Any]) -> None:
    """On the shipped document, which no training has seen."""
    model, tokenizer = smollm2
    folder = qm.shipped_gumiho("smollm2-135m")
    assert folder is not None
    inputs = tokenizer(demo_document()[:600], return_tensors="pt")
    decoding = qm.SpeculativeDecoding(qm.Gumiho.from_pretrained(folder), tree=8)
    wanted = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    found = model.generate(**inputs, max_new_tokens=40, do_sample=False, custom_generate=decoding)
    assert torch.equal(found, wanted)
    assert decoding.stats.tokens_per_pass > 1.15
