"""Gumiho in the engine: the text is the target's own, whatever the heads say; and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from decoding_samples import FAMILIES, greedy, prompts, tiny
from gumiho_samples import SHAPES, heads
from hypothesis import given, settings
from hypothesis import strategies as st

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.speculative.gumiho import Gumiho


def spoken(model, inputs, made: Gumiho, nodes: int, new: int = 20, **more):
    engine = qm.SpeculativeDecoding(made, tree=nodes)
    return greedy(model, inputs, new, custom_generate=engine, **more), engine.stats


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fta", ["off", "duplicate"])
def test_greedy_text_is_the_targets_own(family: str, fta: str) -> None:
    model, inputs = tiny(family), prompts([7, 3, 5])
    made = Gumiho(heads(model, drafted=torch.arange(0, 97, 3)).network, fta=fta, beam=3)
    text, stats = spoken(model, inputs, made, 10)
    assert torch.equal(text, greedy(model, inputs, 20))
    assert stats.lossless


@given(shape=st.sampled_from(list(SHAPES)), seed=st.integers(0, 500), nodes=st.integers(2, 20),
       lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3))  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_any_heads_any_prompts(shape: str, seed: int, nodes: int, lengths: list[int]) -> None:
    """Prompts of a single token too, of which parallel heads have no earlier pair."""
    model, inputs = tiny(), prompts(lengths, seed=seed)
    text, _ = spoken(model, inputs, heads(model, seed=seed, **SHAPES[shape]), nodes, 12)
    assert torch.equal(text, greedy(model, inputs, 12))


@pytest.mark.parametrize("dtype", [torch.float32, "bfloat16"])
def test_heads_of_another_type_than_the_target(dtype: torch.dtype | str) -> None:
    model, inputs = tiny(), prompts([4, 6])
    made = heads(model)
    before = made.network.fusion.weight.clone()
    text, _ = spoken(model, inputs, Gumiho(made.network, dtype=dtype), 9)
    assert torch.equal(text, greedy(model, inputs, 20))
    assert torch.equal(made.network.fusion.weight, before) and made.network.fusion.weight.dtype == torch.float64


def test_full_tree_attention_as_published_is_lossy() -> None:
    """Of a few models at least one writes another text than it would alone, and the engine says that it may."""
    differ = 0
    for seed in range(6):
        model, inputs = tiny(seed=seed), prompts([6, 6, 6], seed=seed)
        network = heads(model, seed=seed, serial=1, serial_layers=1, heads=3).network
        text, stats = spoken(model, inputs, Gumiho(network, beam=2, fta="reference"), 12)
        differ += not torch.equal(text, greedy(model, inputs, 20))
        assert not stats.lossless
        exact, stats = spoken(model, inputs, Gumiho(network, beam=2, fta="duplicate"), 12)
        assert torch.equal(exact, greedy(model, inputs, 20)) and stats.lossless
    assert differ


def test_the_heads_are_used_again_and_trained_on() -> None:
    """A second text starts anew, and heads that were changed in between draft as they are now."""
    model, inputs = tiny(), prompts([6, 4])
    made = heads(model)
    _, first = spoken(model, inputs, made, 10)
    spoken(model, prompts([9], seed=3), made, 10)
    _, again = spoken(model, inputs, made, 10)
    assert (first.passes, first.accepted) == (again.passes, again.accepted)
    half = Gumiho(made.network, dtype=torch.bfloat16)
    spoken(model, inputs, half, 10)
    torch.nn.init.zeros_(made.network.fusion.weight)
    spoken(model, inputs, half, 10)
    assert half._work is not None and not bool(half._work[1].fusion.weight.any())


def test_another_model_is_refused() -> None:
    made = heads(tiny())
    with pytest.raises(QuickmergeError, match=r"were trained for another model \(weights .* got a LlamaForCausalLM"):
        spoken(tiny(seed=1), prompts([4]), made, 8)
    with pytest.raises(QuickmergeError, match="must have 97 tokens in its vocabulary"):
        spoken(tiny(vocab_size=50), prompts([4], vocabulary=50), made, 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beam": 0}, "beam must be a whole number of at least 1, got 0"),
        (
            {"fta": "dupliacte"},
            "fta must be one of off, duplicate, reference, got 'dupliacte' .did you mean 'duplicate'",
        ),
        ({"dtype": torch.int8}, "dtype must be a floating-point type of torch or its name, or None, got torch.int8"),
        ({"dtype": "bfloat"}, "dtype must be a floating-point type of torch or its name, or None, got 'bfloat'"),
    ],
)
def test_limits(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gumiho(heads().network, **wrong)
