"""Entropy budgets whose mean share is known, measured on the shipped document."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts_zoo import build
from tokenizer_samples import byte_level

import quickmerge as qm
from quickmerge.data import demo_document
from quickmerge.merge.calibrate import WINDOWS, calibrated, spread_of
from quickmerge.merge.reducers import Uniform
from quickmerge.merge.tokens import Entropy


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", vocab_size=512)


def shares(model: Any, reducer: Any, layer: Any) -> list[float]:
    """What is kept of each of the windows that a calibration reads: the mean over the blocks above the merge."""
    ids = byte_level().encode(demo_document(), add_special_tokens=False)
    found = []
    for i in range(WINDOWS):
        start = (len(ids) - 128) * i // (WINDOWS - 1)
        with torch.no_grad(), qm.reduce(model, reducer, layer, min_tokens=0, tokenizer=byte_level()) as run:
            model(torch.tensor([ids[start : start + 128]]), logits_to_keep=1)
        counts = run.summary().tokens_per_layer[1:]
        found.append(sum(counts) / len(counts) / 128)
    return found


@pytest.mark.parametrize("layer", [1, qm.Schedule((1, 3), 0.5)])
@pytest.mark.parametrize("reducer", [qm.QuickMerge.paper(), qm.QuickMerge()], ids=["paper", "default"])
def test_the_mean_share_is_what_was_asked_for(model: Any, reducer: Any, layer: Any) -> None:
    made = calibrated(model, byte_level(), reducer, 0.5, layer, tokens=100)
    assert isinstance(made.keep, Entropy) and made.keep.scale > 0
    assert sum(shares(model, made, layer)) / WINDOWS == pytest.approx(0.5, abs=0.01)
    # A number, so that it is the same again, and can be saved.
    assert calibrated(model, byte_level(), reducer, 0.5, layer, tokens=100) == made


def test_a_method_without_a_saliency_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="budget Entropy needs a saliency, and this reducer has none"):
        calibrated(model, byte_level(), Uniform(), 0.5, 1, tokens=64)
    with pytest.raises(ValueError, match=r"keep must be a number in \(0, 1\]"):
        calibrated(model, byte_level(), qm.QuickMerge.paper(), 1.5, 1)
    assert all(0 < each <= 1 for each in spread_of(model, byte_level(), qm.QuickMerge.paper(), 1, tokens=64))


def test_a_recipe_keeps_the_number(tmp_path: Any) -> None:
    recipe = qm.Recipe(merge=qm.QuickMerge.paper(keep=0.42))
    recipe.save_pretrained(tmp_path)
    assert qm.Recipe.from_pretrained(tmp_path) == recipe
