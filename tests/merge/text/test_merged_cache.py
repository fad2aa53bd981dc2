"""A cache that a prompt was merged into: whatever is done to it, it goes on as if it had been filled that way."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from caches import held, past
from hosts_zoo import build, generate, pad, reduce, stored, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import quickmerge as qm
from quickmerge.errors import QuickmergeError

EXACT = 1e-10
REDUCERS = {
    "quickmerge": qm.QuickMerge(keep=0.5, layers=2, window=16, pool=3),
    "tome": qm.ToMe(keep=0.4),
    # Rows with slots of their own number, padded among each other.
    "entropy": qm.QuickMerge(keep=qm.Entropy(scale=0.5), pool=1),
}
SETTINGS: dict[str, Any] = {"layer": [1, 3], "sinks": 2, "recent": 5}
LENGTHS = (37, 26, 31)
FAMILIES = ["llama", "gemma3_text", "mistral"]


class Conversation:
    """A batch of rows: their ids, mask and positions, and the cache that holds them."""

    def __init__(self, model: Any, rows: list[Tensor], cache: Any = None) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        ids, self.mask, self.position = pad(rows, "left")
        self.logits = model(ids, attention_mask=self.mask, position_ids=self.position, **past(self.cache)).logits

    def read(self, ids: Tensor) -> Tensor:
        """Logits of further tokens ``(B, q)``."""
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        after = self.position[:, -1:] + 1 + torch.arange(ids.shape[1])
        self.position = after
        return self.model(ids, attention_mask=self.mask, position_ids=after, **past(self.cache)).logits

    def pick(self, index: Tensor) -> None:
        """Let mask and positions follow the cache's rows."""
        self.mask, self.position = self.mask[index], self.position[index]


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [tokens(1, n, seed)[0] for seed, n in enumerate(lengths)]


def close(a: Tensor, b: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


STEPS = st.one_of(
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
    st.tuples(st.just("mask"), st.lists(st.booleans(), min_size=6, max_size=6)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("copy"), st.sampled_from(["deepcopy", "pickle"])),
    st.tuples(st.just("read"), st.integers(1, 3)),
    st.tuples(st.just("crop"), st.integers(1, 3)),
    st.tuples(st.just("leave"), st.sampled_from(sorted(REDUCERS))),
)
MODELS: dict[tuple[str, str], Any] = {}


def model_of(family: str, attn: str = "sdpa") -> Any:
    if (family, attn) not in MODELS:
        # Eager attention takes its softmax in float32, in which the mask of a wider type overflows.
        MODELS[family, attn] = build(family, attn, torch.float32 if attn == "eager" else torch.float64)
    return MODELS[family, attn]


@pytest.mark.parametrize(
    ("family", "attn", "name"),
    [
        ("llama", "sdpa", "quickmerge"), ("llama", "sdpa", "tome"), ("llama", "sdpa", "entropy"),
        ("llama", "eager", "tome"), ("gemma3_text", "sdpa", "tome"), ("gemma3_text", "sdpa", "entropy"),
    ],
)  # fmt: skip
@given(steps=st.lists(STEPS, min_size=1, max_size=5))
@settings(max_examples=6, deadline=None)
def test_whatever_is_done_to_a_cache_its_rows_go_on_as_they_do_alone(
    family: str, attn: str, name: str, steps: list[tuple[str, Any]]
) -> None:
    """Rows picked, moved, repeated, copied, cropped and carried into another run, against each row read by itself."""
    model = model_of(family, attn)
    texts = rows()
    new = tokens(6, 40, 9)
    # Which text each row is of, and what it has read since.
    which, read, column = [0, 1, 2], [[] for _ in range(3)], 0
    with torch.no_grad():
        run = reduce(model, REDUCERS[name], **SETTINGS).attach()
        try:
            talk = Conversation(model, texts)
            for kind, what in steps:
                cache = talk.cache
                index = None
                if kind in ("reorder", "select"):
                    index = torch.tensor([i % len(which) for i in what])
                    cache.reorder_cache(index) if kind == "reorder" else cache.batch_select_indices(index)
                elif kind == "mask":
                    marked = torch.tensor(what[: len(which)])
                    marked[0] |= ~marked.any()
                    index = marked.nonzero().flatten()
                    cache.batch_select_indices(marked)
                elif kind == "repeat" and len(which) * what <= 6:
                    index = torch.arange(len(which)).repeat_interleave(what)
                    cache.batch_repeat_interleave(what)
                elif kind == "copy":
                    talk.cache = copy.deepcopy(cache) if what == "deepcopy" else pickle.loads(pickle.dumps(cache))
                elif kind == "read":
                    ids = new[: len(which), column : column + what]
                    column += what
                    talk.read(ids)
                    read = [r + row.tolist() for r, row in zip(read, ids, strict=True)]
                elif kind == "crop" and family == "llama":
                    gone = min(what, len(read[0]))
                    cache.crop(-gone)
                    talk.mask = talk.mask[:, : talk.mask.shape[1] - gone]
                    talk.position = talk.mask.cumsum(-1)[:, -1:] - 1
                    read = [r[: len(r) - gone] for r in read]
                elif kind == "leave":
                    run.detach()
                    run = reduce(model, REDUCERS[what], **{**SETTINGS, "layer": 2}).attach()
                if index is not None:
                    talk.pick(index)
                    which, read = [which[i] for i in index], [list(read[i]) for i in index]
            last = new[: len(which), column : column + 2]
            found = talk.read(last)
            run.detach()
            run = reduce(model, REDUCERS[name], **SETTINGS).attach()
            for i, text in enumerate(which):
                alone = Conversation(model, [texts[text]])
                if read[i]:
                    alone.read(torch.tensor([read[i]]))
                close(found[i : i + 1], alone.read(last[i : i + 1]), 1e-4 if attn == "eager" else EXACT)
        finally:
            run.detach()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", REDUCERS)
def test_a_copy_goes_on_as_the_original(family: str, name: str) -> None:
    """A long prompt is read once, and every question goes on from a copy of its cache; the original is not touched."""
    model = model_of(family)
    first, second = tokens(3, 4, 5), tokens(3, 6, 6)
    with torch.no_grad(), reduce(model, REDUCERS[name], **SETTINGS):
        talk = Conversation(model, rows())
        other = copy.copy(talk)
        other.cache = copy.deepcopy(talk.cache)
        wanted = Conversation(model, rows()).read(first)
        close(other.read(first), wanted)
        third = copy.copy(talk)
        third.cache = copy.deepcopy(talk.cache)
        close(third.read(second), talk.read(second))


def test_a_cache_goes_from_one_run_to_the_next() -> None:
    """A server has a run for each request; sizes count in attention if they did when the prompt was merged."""
    model = model_of("llama")
    more = tokens(3, 3, 8)
    for name, other in (("tome", "quickmerge"), ("quickmerge", "tome")):
        with torch.no_grad():
            with reduce(model, REDUCERS[name], **SETTINGS):
                talk = Conversation(model, rows())
            with reduce(model, REDUCERS[other], layer=2) as second:
                found = talk.read(more)
            assert second.summary().tokens_per_layer[-1] < 31 and second.summary().decode_steps == 1
            with reduce(model, REDUCERS[name], **SETTINGS):
                close(found, Conversation(model, rows()).read(more))


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_of_a_run_a_merged_cache_is_refused_in_one_sentence_and_stays_good(family: str) -> None:
    model = model_of(family)
    more = tokens(1, 3, 8)
    with torch.no_grad():
        with reduce(model, REDUCERS["tome"], **SETTINGS):
            cache = held(model(tokens(1, 40)))
            wanted = model(more, **past(copy.deepcopy(cache))).logits
        entries = stored(cache)
        with pytest.raises(QuickmergeError, match=r"holds a prompt that was merged inside quickmerge\.reduce"):
            model(more, **past(cache))
        with pytest.raises(QuickmergeError, match="holds a prompt that was merged"):
            generate(model, torch.cat([tokens(1, 40), more], 1), 2, **past(cache))
        assert stored(cache) == entries
        with reduce(model, REDUCERS["tome"], **SETTINGS):
            close(model(more, **past(cache)).logits, wanted)


def test_outside_of_a_run_a_prompt_that_was_not_merged_goes_on() -> None:
    model = model_of("llama")
    more = tokens(1, 3, 8)
    with torch.no_grad():
        with reduce(model, REDUCERS["tome"], min_tokens=256, **SETTINGS):
            cache = held(model(tokens(1, 40)))
        assert torch.equal(model(more, **past(cache)).logits, model(more, **past(held(model(tokens(1, 40))))).logits)


def test_cropping_into_a_merged_prompt_is_refused_and_changes_nothing() -> None:
    model = model_of("llama")
    with torch.no_grad(), reduce(model, REDUCERS["tome"], **SETTINGS):
        cache = held(model(tokens(1, 40)))
        model(tokens(1, 3, 4), **past(cache))
        entries = stored(cache)
        with pytest.raises(QuickmergeError, match=r"crop can take back 8 tokens here, .* got -9"):
            cache.crop(-9)
        with pytest.raises(QuickmergeError, match="as a negative number"):
            cache.crop(10)
        assert stored(cache) == entries
        cache.crop(-3)
        assert stored(cache) == [n - 3 for n in entries]


@pytest.mark.parametrize("name", REDUCERS)
def test_the_recent_tokens_of_a_prompt_can_be_taken_back_and_read_again(name: str) -> None:
    model = model_of("llama")
    texts = rows()
    more = tokens(3, 2, 8)
    with torch.no_grad(), reduce(model, REDUCERS[name], **SETTINGS):
        talk, again = Conversation(model, texts), Conversation(model, texts)
        again.cache.crop(-5)
        again.mask, again.position = again.mask[:, :-5], again.position[:, :-5]
        close(again.read(torch.stack([text[-5:] for text in texts])), talk.logits[:, -5:])
        close(again.read(more), talk.read(more))


def test_a_cache_that_was_reset_is_empty_again() -> None:
    model = model_of("gemma3_text")
    with torch.no_grad():
        with reduce(model, REDUCERS["tome"], **SETTINGS):
            cache = DynamicCache(config=model.config)
            first = model(tokens(1, 40), **past(cache)).logits
            cache.reset()
            assert torch.equal(model(tokens(1, 40), **past(cache)).logits, first)
            cache.reset()
        assert torch.equal(model(tokens(1, 30), **past(cache)).logits, model(tokens(1, 30)).logits)


def test_layers_changed_apart_are_refused() -> None:
    model = model_of("llama")
    with torch.no_grad(), reduce(model, REDUCERS["tome"], **SETTINGS):
        cache = held(model(tokens(2, 40)))
        for layer in cache.layers[1:]:
            layer.batch_select_indices(torch.tensor([0]))
        cache.layers[0].keys, cache.layers[0].values = cache.layers[0].keys[:1], cache.layers[0].values[:1]
        with pytest.raises(QuickmergeError, match="layers whose rows were changed apart"):
            model(tokens(1, 1), **past(cache))


@pytest.mark.parametrize("name", REDUCERS)
def test_threads_share_a_run_with_a_cache_each(name: str) -> None:
    """Prompts of different length, several steps of reading on, statistics of each thread's own."""
    model = model_of("llama")
    texts = [tokens(1 + i % 2, 40 + 7 * i, i) for i in range(4)]

    def work(i: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            written = generate(model, texts[i], 5).sequences
            cache = held(model(texts[i]))
            model(tokens(len(texts[i]), 3, 5), **past(cache))
            cache.crop(-2)
            return written, model(tokens(len(texts[i]), 2, 6), **past(cache)).logits

    with reduce(model, REDUCERS[name], **SETTINGS):
        wanted = [work(i) for i in range(4)]
    found: dict[int, list[Any]] = {i: [] for i in range(4)}
    start = threading.Barrier(4)
    with reduce(model, REDUCERS[name], **SETTINGS) as run:

        def loop(i: int) -> None:
            start.wait()
            for _ in range(3):
                found[i].append((*work(i), run.stats.tokens_in, run.plan.slot.shape[1]))

        threads = [threading.Thread(target=loop, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, text in enumerate(texts):
        assert len(found[i]) == 3, "a thread died"
        for written, logits, read, width in found[i]:
            assert torch.equal(written, wanted[i][0]) and read == width == text.shape[1]
            close(logits, wanted[i][1])


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_block_that_is_computed_again_finds_its_own_prompt(family: str, name: str) -> None:
    """Two prompts of one length, both read before either goes backward, and backward in another thread."""
    grads: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = build(family, dtype=torch.float64).train()
        if checkpointing:
            switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            getattr(model, f"{switch}_checkpointing_enable")()
        with reduce(model, REDUCERS[name], **SETTINGS):
            losses = [model(tokens(2, 60, s), use_cache=False).logits[:, -1].square().sum() for s in (1, 2)]
            thread = threading.Thread(target=sum(losses).backward)
            thread.start()
            thread.join()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1])
    for key, value in grads[0].items():
        close(grads[1][key], value, 1e-9)
