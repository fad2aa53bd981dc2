"""Entries leave the cache of prompts with images: a batch goes on as its rows, alone and beside the other places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import held
from torch import Tensor
from vlm_zoo import EXACT, FAMILIES, METHODS, ROWS, model_of, prompt, row_of

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.attach import reduce_places
from quickmerge.merge.place import Merge

ALL: dict[str, Any] = {"sinks": 2, "min_tokens": 0}
CACHES = {
    "observed": qm.ObservedAttention(0.5, **ALL),
    "snapkv": qm.SnapKV(0.5, window=6, heads="adaptive", **ALL),
}
PLACES: dict[str, dict[str, Merge]] = {
    "cache alone": {},
    "text": {"text": Merge(qm.QuickMerge(keep=0.6, window=8, pool=3), 2, qm.Prefix(sinks=1, recent=2, min_tokens=0))},
    "visual": {"visual": Merge(METHODS["scope"])},
    "visual inside": {"visual": Merge(METHODS["tome"], 2)},
}
SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}


def write(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Logits ``(B, 4, V)`` of what is written greedily, and the cache."""
    out = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
    return torch.stack(out.logits, 1), held(out)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_goes_on_as_its_rows_do(family: str, name: str, place: str) -> None:
    model = model_of(family)
    with reduce_places(model, **PLACES[place], cache=CACHES[name]) as run, torch.no_grad():
        logits, cache = write(model, prompt(model, ROWS))
        assert any(layer.heads is not None for layer in cache.layers)
        stats = run.summary()
        assert stats.prompt_cache_bytes < 0.6 * stats.prompt_cache_bytes_full
        assert stats.evictor == repr(CACHES[name])
        for i in range(len(ROWS)):
            alone, _ = write(model, row_of(model, ROWS, i))
            torch.testing.assert_close(alone[0], logits[i], atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_padding_with_holes_is_refused(family: str) -> None:
    """Scores and sinks are of texts whose tokens stand side by side."""
    model = model_of(family)
    inputs = row_of(model, ROWS, 0)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][:, 1] = 0
    with (
        reduce_places(model, cache=CACHES["observed"]),
        torch.no_grad(),
        pytest.raises(QuickmergeError, match="attention_mask must pad on one side"),
    ):
        model(**inputs)
