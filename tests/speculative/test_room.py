"""How deep trees may be."""

from __future__ import annotations

import pytest
import torch
from decoding_samples import Scripted, endless, prompts, tiny
from transformers import LlamaConfig

from quickmerge.speculative import SpeculativeDecoding
from quickmerge.speculative.prompt import Room

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 12,
    "factor": 2.0,
    "short_factor": [1.0, 1.0],
    "long_factor": [3.0, 5.0],
}


def test_no_deeper_than_the_text_and_the_context() -> None:
    room = Room(LlamaConfig(max_position_embeddings=20))
    assert room.depths([5, 9], [4, 1]) == [3, 0]
    assert room.depths([17, 18, 19, 25], [9, 9, 9, 9]) == [2, 1, 0, 0]


def test_no_tree_stands_on_both_sides_of_a_change_of_the_embedding() -> None:
    room = Room(LlamaConfig(max_position_embeddings=64, rope_parameters=LONGROPE))
    assert room.bounds == [12]
    assert room.depths([3, 9], [9, 9]) == [2, 2]  # the longest row decides
    assert room.depths([11], [9]) == [0]
    assert room.depths([12, 3], [9, 9]) == [8, 8]


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_texts_that_pass_the_change_are_those_of_plain_generate(rope: str) -> None:
    parameters = LONGROPE if rope == "longrope" else {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    context = 64 if rope == "longrope" else 12
    model = tiny("llama", max_position_embeddings=context)
    config = type(model.config)(**{**model.config.to_dict(), "rope_parameters": parameters})
    torch.manual_seed(3)
    made = type(model)(config).double().eval()
    inputs = prompts([5])
    wanted = endless(made, inputs, 24)
    for seed in range(4):
        decoding = SpeculativeDecoding(Scripted(wanted, 1.0, seed), tree=8)
        assert torch.equal(endless(made, inputs, 24, custom_generate=decoding), wanted)
        assert decoding.stats.passes < 23
