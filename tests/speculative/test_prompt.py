"""Prompts of text and images, read as ``generate`` reads them."""

from __future__ import annotations

import pytest
import torch
from decoding_samples import FAMILIES, Scripted, prompts, tiny
from vlm_zoo import FAMILIES as SEEING
from vlm_zoo import ROWS, model_of, prompt

from quickmerge.errors import QuickmergeError
from quickmerge.models.compat import given_cache
from quickmerge.speculative import SpeculativeDecoding
from quickmerge.speculative.prompt import read_prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_each_row_reads_alone(family: str) -> None:
    model, inputs = tiny(family), prompts([4, 9, 1])
    found = read_prompt(model, inputs["input_ids"], {"attention_mask": inputs["attention_mask"]}, features=True)
    assert found.features is not None
    assert found.target.columns.holes
    for row, n in enumerate([4, 9, 1]):
        ids = inputs["input_ids"][row : row + 1, -n:]
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids).last_hidden_state
            wanted = model(input_ids=ids).logits[0, -1]
        assert torch.allclose(found.features[row, -n:], hidden[0], atol=1e-10)
        assert torch.allclose(found.logits[row], wanted, atol=1e-10)
        assert found.positions[row, -n:].tolist() == list(range(n))
        assert found.valid[row].tolist() == [False] * (9 - n) + [True] * n
    assert found.target.columns.length.tolist() == [9, 9, 9]
    assert found.target.columns.offset.tolist() == [-5, 0, -8]


@pytest.mark.parametrize("family", SEEING)
def test_images_are_seen_and_positions_go_on_behind_them(family: str) -> None:
    model = model_of(family)
    inputs = prompt(model, ROWS)
    wanted = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    decoding = SpeculativeDecoding(Scripted(wanted, 0.9), tree=6)
    found = model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=decoding)
    assert torch.equal(found, wanted)
    assert decoding.stats.tokens_per_pass > 1


def test_a_cache_of_which_blocks_keep_different_numbers_is_told() -> None:
    model, inputs = tiny(), prompts([5])
    layer = model.base_model.layers[1]

    def drop(module: object, args: object, kwargs: dict[str, object]) -> None:
        cache = given_cache(kwargs)
        cache.layers[0].keys = cache.layers[0].keys[:, :, 1:]  # type: ignore[attr-defined]

    hook = layer.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        with pytest.raises(
            QuickmergeError, match=r"every block must keep keys and values of the 5 tokens of the prompt.*got \[4, 5\]"
        ):
            read_prompt(model, inputs["input_ids"], {})
    finally:
        hook.remove()
