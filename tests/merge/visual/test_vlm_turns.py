"""A further turn behind a prompt whose visual tokens became fewer, by plain ``generate`` with all ids and the cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from caches import held, past
from torch import Tensor
from vlm_zoo import FAMILIES, FLAT, METHODS, ROWS, build, prompt

import quickmerge as qm
from quickmerge.models.columns import stored

SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def double(family: str, rows: list[list[int]]) -> tuple[Any, dict[str, Any]]:
    model = build(family).double()
    return model, {k: v.double() if v.is_floating_point() else v for k, v in prompt(model, rows).items()}


def turn(inputs: dict[str, Any], out: Any, more: Tensor) -> tuple[Tensor, Tensor]:
    """All ids of two turns, and which are no padding."""
    ids = torch.cat([out.sequences, more], 1)
    behind = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    return ids, torch.cat([inputs["attention_mask"], behind], 1)


@torch.no_grad()
def by_hand(model: Any, ids: Tensor, mask: Tensor, cache: Any, read: int) -> Tensor:
    """What the model writes when it is given the new ids alone, and a mask for everything read so far."""
    new, written = ids[:, read:], []
    for _ in range(SETTINGS["max_new_tokens"]):
        out = model(input_ids=new, attention_mask=mask, **past(cache), use_cache=True)
        new = out.logits[:, -1:].argmax(-1)
        written.append(new)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.cat(written, 1)


@pytest.mark.parametrize("rows", [[[0]], ROWS], ids=["one row", "three rows"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "layer"), [("scope", 0), ("random", [0, 2])])
def test_generate_goes_on_as_from_the_new_ids_alone(
    family: str, method: str, layer: Any, rows: list[list[int]]
) -> None:
    model, inputs = double(family, rows)
    with qm.reduce(model, METHODS[method], layer):
        out = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
        cache, read = held(out), out.sequences.shape[1] - 1
        assert cache.get_seq_length() == read > stored(cache.layers[0])
        ids, mask = turn(inputs, out, torch.tensor([[5, 9, 11]] * len(rows)))
        wanted = by_hand(model, ids, mask, copy.deepcopy(cache), read)
        found = model.generate(input_ids=ids, attention_mask=mask, **past(copy.deepcopy(cache)), **SETTINGS)
        assert torch.equal(found[:, ids.shape[1] :], wanted)
        with pytest.raises(qm.QuickmergeError, match=r"rows|attention_mask must have a column for each"):
            model(input_ids=ids[:, read:], attention_mask=mask[:, 1:], **past(cache), use_cache=True)


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_positions_counted_anew_go_on_in_a_further_turn(family: str) -> None:
    assert family in FLAT
    model, inputs = double(family, [[0]])
    with qm.reduce(model, METHODS["random"], positions="consecutive"):
        out = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
        ids, mask = turn(inputs, out, torch.tensor([[5, 9, 11]]))
        wanted = by_hand(model, ids, mask, copy.deepcopy(held(out)), out.sequences.shape[1] - 1)
        found = model.generate(input_ids=ids, attention_mask=mask, **past(held(out)), **SETTINGS)
    assert torch.equal(found[:, ids.shape[1] :], wanted)


def test_what_was_written_is_taken_back_and_read_again() -> None:
    model, inputs = double("llava", [[0]])
    with qm.reduce(model, METHODS["scope"]):
        out = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
        cache, length = held(out), held(out).get_seq_length()
        cache.crop(-3)
        assert cache.get_seq_length() == length - 3
        found = model.generate(
            input_ids=out.sequences[:, :-2], attention_mask=torch.ones_like(out.sequences[:, :-2]), **past(cache),
            max_new_tokens=2, do_sample=False,
        )  # fmt: skip
        cache.reset()
        assert cache.get_seq_length() == 0
    assert torch.equal(found, out.sequences)
