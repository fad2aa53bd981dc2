"""Inside runs, which merge a prompt or read it by clusters, drafts change nothing of what is written."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any

import pytest
import torch
from caches import held
from caches import past as past_cache
from decoding_samples import VOCABULARY, Features, Scripted, endless, greedy, prompts, tiny
from gumiho_samples import heads
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from vlm_zoo import METHODS, ROWS
from vlm_zoo import build as build_vlm
from vlm_zoo import prompt as vlm_prompt

import quickmerge as qm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.models import columns
from quickmerge.speculative import PromptLookup, SpeculativeDecoding

RUNS = ("merge", "multipole", "both")
"""What is attached."""
FEW = ("gemma3_text", "gpt_neox", "llama", "mistral")
"""Families: sliding and full blocks, parallel parts of a block, the usual one, and windows alone."""


@contextmanager
def inside(model: Any, kind: str, seed: int = 0, **merging: Any) -> Iterator[None]:
    """A model with runs on it whose settings act on prompts of a few tokens."""
    rng = Random(seed)
    with ExitStack() as stack:
        if kind in ("merge", "both"):
            method = rng.choice([qm.QuickMerge(keep=0.4), qm.ToMe(keep=0.5), qm.TopNorm(keep=0.3)])
            mode = qm.Prefix(min_tokens=merging.get("min_tokens", 0), recent=rng.choice([1, 3]), sinks=1)
            stack.enter_context(qm.reduce(model, method, [1], mode=mode))
        if kind in ("multipole", "both"):
            settings: dict[str, Any] = {"budget": rng.choice([0, 4, 1000]), "update": rng.random() < 0.8}
            settings |= {"interval": rng.choice([3, 5, 8]), "sink": rng.choice([0, 2]), "ratio": 0.5, "block": 16}
            settings |= {"coarse": rng.choice([None, 0.2]), "variance": rng.random() < 0.3}
            stack.enter_context(qm.multipole(model, **settings))
        yield


def trees(script: Tensor, seed: int, nodes: int, right: float = 0.7, binding: bool = True) -> SpeculativeDecoding:
    return SpeculativeDecoding(Scripted(script, right, seed, binding), tree=nodes)


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("family", FEW)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3), new=st.integers(1, 40), seed=seeds,
    shapes=st.lists(st.integers(1, 12), min_size=2, max_size=2),
)  # fmt: skip
@prop(4)
def test_the_text_is_that_of_the_same_run_without_drafts(
    family: str, kind: str, lengths: list[int], new: int, shapes: list[int], seed: int
) -> None:
    if family == "mistral" and kind != "merge":
        pytest.skip("no block of it reads a long past")
    model, inputs = tiny(family, seed=seed % 3), prompts(lengths, seed)
    with inside(model, kind, seed):
        wanted = greedy(model, inputs, new)
        for i, nodes in enumerate(shapes):
            drafting = trees(wanted, seed + i, nodes)
            assert torch.equal(greedy(model, inputs, new, custom_generate=drafting), wanted)
            assert drafting.stats.lossless


@pytest.mark.parametrize("kind", RUNS)
def test_what_is_compared_is_not_what_the_model_writes_alone(kind: str) -> None:
    model, inputs = tiny("llama"), prompts([40, 31])
    with inside(model, kind, 1):
        reduced = greedy(model, inputs, 30)
    assert not torch.equal(greedy(model, inputs, 30), reduced)


class Odd(LogitsProcessor):  # type: ignore[misc]
    """Depends on every token before, padding included."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = torch.arange(scores.shape[-1])
        return scores + torch.sin(place * (input_ids.sum(-1, keepdim=True) % 7 + input_ids.shape[1]))


@pytest.mark.parametrize("kind", RUNS)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3), nodes=st.integers(1, 10), seed=seeds,
    padding=st.booleans(),
)  # fmt: skip
@prop(8)
def test_ends_within_a_draft_and_processors(
    kind: str, lengths: list[int], nodes: int, padding: bool, seed: int
) -> None:
    model, inputs, rng = tiny(), prompts(lengths, seed), Random(seed)
    settings: dict[str, Any] = {
        "logits_processor": LogitsProcessorList([Odd()]),
        "repetition_penalty": rng.choice([1.0, 1.3]),
        "eos_token_id": rng.sample(range(VOCABULARY), 20) if padding else None,
        "pad_token_id": 0 if padding else None,
    }
    write = greedy if padding else endless
    with inside(model, kind, seed):
        wanted = write(model, inputs, 14, **settings)
        script = endless(model, inputs, 14, **{**settings, "eos_token_id": None})
        decoding = trees(script, seed, nodes, 0.9, binding=False)
        assert torch.equal(write(model, inputs, 14, custom_generate=decoding, **settings), wanted)


@pytest.mark.parametrize("kind", RUNS)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=2), nodes=st.integers(2, 9), seed=seeds)
@prop(5)
def test_samples_do_not_depend_on_the_draft(kind: str, lengths: list[int], nodes: int, seed: int) -> None:
    model, inputs = tiny(seed=seed % 3), prompts(lengths, seed)
    settings: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2, "temperature": 1.3}
    with inside(model, kind, seed):
        torch.manual_seed(seed)
        wanted = endless(model, inputs, 20, custom_generate=SpeculativeDecoding(PromptLookup(), tree=1), **settings)
        torch.manual_seed(seed)
        found = endless(model, inputs, 20, custom_generate=trees(wanted, seed, nodes), **settings)
    assert len(wanted) == 2 * len(lengths)
    assert torch.equal(found, wanted)


def same_cache(found: Any, wanted: Any) -> None:
    """Both hold the same keys and values, and the same tables of what was merged."""
    for mine, other in zip(found.layers, wanted.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, rtol=0, atol=1e-9)
        torch.testing.assert_close(mine.values, other.values, rtol=0, atol=1e-9)
        prompt, told = getattr(mine, "prompt", None), getattr(other, "prompt", None)
        assert (prompt is None) == (told is None)
        if prompt is not None:
            assert prompt.segments.keys() == told.segments.keys() and mine.floor == other.floor
            for a, b in zip(prompt.segments.values(), told.segments.values(), strict=True):
                assert torch.equal(a.valid, b.valid) and torch.equal(a.size, b.size)
                assert torch.equal(a.position[a.valid], b.position[b.valid])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", RUNS)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=3), nodes=st.integers(1, 9), seed=seeds)
@prop(6)
def test_the_cache_is_left_as_generate_leaves_it_and_a_second_turn_goes_on(
    kind: str, family: str, lengths: list[int], nodes: int, seed: int
) -> None:
    model, inputs = tiny(family, seed=seed % 3), prompts(lengths, seed)
    with inside(model, kind, seed):
        first = endless(model, inputs, 16, return_dict_in_generate=True)
        drafted = endless(
            model, inputs, 16, return_dict_in_generate=True, custom_generate=trees(first.sequences, seed, nodes)
        )
        assert torch.equal(drafted.sequences, first.sequences)
        same_cache(held(drafted), held(first))
        more = torch.randint(3, VOCABULARY, (len(lengths), 3), generator=torch.Generator().manual_seed(seed))
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), ids.shape[1] - max(lengths)).long()], 1)
        turn = {"input_ids": ids, "attention_mask": mask}
        wanted = endless(model, {**turn, **past_cache(copy.deepcopy(held(first)))}, 9)
        for cache in (held(drafted), held(first)):
            again = {**turn, **past_cache(copy.deepcopy(cache))}
            assert torch.equal(endless(model, again, 9, custom_generate=trees(wanted, seed + 1, nodes)), wanted)


class Collect(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("kind", RUNS)
def test_a_streamer_gets_every_token(kind: str) -> None:
    model, inputs, stream = tiny(), prompts([30]), Collect()
    with inside(model, kind, 2):
        wanted = endless(model, inputs, 20)
        endless(model, inputs, 20, custom_generate=trees(wanted, 0, 8), streamer=stream)
    assert stream.ids == wanted[0].tolist() and stream.ended


def test_heads_read_the_hidden_states_of_the_merged_model() -> None:
    model, inputs, states = tiny(), prompts([40]), []
    keep = model.model.register_forward_hook(lambda module, args, out: states.append(out[0]))
    with qm.reduce(model, qm.QuickMerge(keep=0.4), [1], mode=qm.Prefix(min_tokens=0)) as run:
        endless(model, inputs, 6)
        wanted, plan = states.copy(), run.plan
        states.clear()
        drafter = Features()
        endless(model, inputs, 6, custom_generate=SpeculativeDecoding(drafter, tree=2))
    keep.remove()
    assert plan is not None
    ids, valid, features, positions = drafter.prompt
    assert features.shape[1] == plan.slots < 40 and torch.equal(valid, plan.valid)
    assert torch.equal(positions, plan.position) and torch.equal(ids, inputs["input_ids"].gather(1, plan.position))
    torch.testing.assert_close(features, wanted[0], rtol=0, atol=1e-12)
    # With the last token the text is done, and nobody asks for more drafts.
    found, read = torch.cat(drafter.seen), torch.cat([one[0] for one in wanted[1:-1]])
    torch.testing.assert_close(found, read, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", RUNS)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3), seed=seeds)
@prop(4)
def test_heads_and_lookup_draft_inside_runs(kind: str, lengths: list[int], seed: int) -> None:
    model, inputs = tiny(), prompts(lengths, seed, vocabulary=12)
    drafters = {"heads": heads(model, seed), "lookup": PromptLookup(ngram=1, length=4)}
    with inside(model, kind, seed):
        wanted = endless(model, inputs, 20)
        for drafter in drafters.values():
            decoding = SpeculativeDecoding(drafter, tree=6)
            assert torch.equal(endless(model, inputs, 20, custom_generate=decoding), wanted)


@given(batch=st.sampled_from([[[0]], ROWS]), nodes=st.integers(1, 9), seed=seeds)
@pytest.mark.parametrize("multipole", [False, True])
@pytest.mark.parametrize(("family", "method", "layer", "positions"), [
    ("llava", "scope", 0, "consecutive"), ("llava", "random", 2, "kept"), ("qwen2_5_vl", "random", 0, "kept"),
    ("qwen3_vl", "scope", 0, "kept"), ("smolvlm", "tome", 0, "kept"), ("idefics3", "attention", 2, "kept"),
])  # fmt: skip
@prop(2)
def test_visual_tokens(
    family: str, method: str, layer: int, positions: str, multipole: bool, batch: list[list[int]], nodes: int, seed: int
) -> None:
    model = build_vlm(family).double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in vlm_prompt(model, batch).items()}
    with ExitStack() as stack:
        stack.enter_context(qm.reduce(model, METHODS[method], layer, positions=positions))
        if multipole:
            stack.enter_context(qm.multipole(model, budget=4, interval=5, sink=2, ratio=0.5, block=16))
        wanted = endless(model, inputs, 18)
        assert torch.equal(endless(model, inputs, 18, custom_generate=trees(wanted, seed, nodes)), wanted)


# What can't be done, and what a pass may hold.


def test_block_causal_mode_reads_no_trees() -> None:
    model, inputs = tiny(), prompts([30])
    with (
        qm.reduce(model, qm.QuickMerge(keep=0.4), mode=qm.BlockCausal(chunk=8, window=4)),
        pytest.raises(
            UnsupportedModelError, match=r"can't read draft trees here: block_causal mode .* use prefix mode"
        ),
    ):
        greedy(model, inputs, 5, custom_generate=SpeculativeDecoding(PromptLookup()))


def test_clusters_must_be_read_by_two_tokens_at_least() -> None:
    model, inputs = tiny(), prompts([30])
    with (
        qm.multipole(model, queries=1),
        pytest.raises(QuickmergeError, match=r"queries must be at least 2 in multipole attention.*got 1"),
    ):
        greedy(model, inputs, 5, custom_generate=SpeculativeDecoding(PromptLookup(), tree=4))


@given(tokens=st.integers(1, 60), interval=st.integers(1, 9), sink=st.integers(0, 4))
@prop(20)
def test_room_ends_where_the_next_tokens_are_clustered(tokens: int, interval: int, sink: int) -> None:
    """Read one by one, the tokens within the room see the clusters of the first of them, and the next one others."""
    model, inputs = tiny(), prompts([tokens])
    with torch.no_grad(), qm.multipole(model, interval=interval, sink=sink, ratio=1.0, budget=2):
        out = model(**inputs, use_cache=True)
        cache, seen = held(out), []
        rooms = columns.room(cache)
        assert rooms is not None
        for step in range(rooms[0] + 2):
            model(input_ids=torch.tensor([[5 + step]]), **past_cache(cache), use_cache=True)
            clusters = cache.layers[0].clusters
            seen.append(0 if clusters is None else int(clusters.end[0]))
    assert len(set(seen[:-1])) == 1 and seen[-1] > seen[0]


def test_a_model_is_proven_outside_of_its_runs() -> None:
    """A run that merges even the shortest texts doesn't make a model look like one that can't read a tree."""
    model = copy.deepcopy(tiny())
    with qm.reduce(model, qm.QuickMerge(keep=0.2), [1], mode=qm.Prefix(min_tokens=0, recent=1, sinks=0)) as run:
        wanted = endless(model, prompts([20]), 8)
        assert torch.equal(endless(model, prompts([20]), 8, custom_generate=trees(wanted, 0, 4)), wanted)
        assert run.summary().tokens_in == 20


def test_what_is_timed_is_no_prompt_of_the_run() -> None:
    """Nothing that a user said of his own prompt, such as what to protect, is asked about the text that is timed."""
    model, inputs, drafting = copy.deepcopy(tiny()), prompts([30]), SpeculativeDecoding(PromptLookup())
    asked = []

    def protect(ids: Tensor) -> Tensor:
        asked.append(ids)
        return torch.zeros(1, 30, dtype=torch.bool)

    with qm.reduce(model, qm.QuickMerge(keep=0.4), [1], mode=qm.Prefix(min_tokens=0, protect=protect)):
        endless(model, inputs, 8, custom_generate=drafting)
    assert len(asked) == 1 and drafting.stats.measure_seconds > 0


def test_passes_that_read_clusters_are_timed_behind_their_own_text() -> None:
    model, inputs, drafting = copy.deepcopy(tiny()), prompts([30]), SpeculativeDecoding(PromptLookup())
    plain = endless(model, inputs, 8)
    assert torch.equal(endless(model, inputs, 8, custom_generate=drafting), plain)
    stats = drafting.stats
    assert stats.measure_seconds > 0 == stats.measure_behind_seconds
    merge = qm.reduce(model, qm.QuickMerge(keep=0.4), [1], mode=qm.Prefix(min_tokens=0))
    with merge as run, qm.multipole(model, budget=4, interval=5, sink=2, ratio=0.5, block=16) as clusters:
        wanted = endless(model, inputs, 8)
        assert torch.equal(endless(model, inputs, 8, custom_generate=drafting), wanted)
        stats = drafting.stats
        assert 0 < stats.measure_behind_seconds <= stats.measure_seconds and stats.seconds > 0
        # Nothing of it is counted as written.
        assert run.summary().decode_steps == clusters.summary().decode_steps == stats.passes
