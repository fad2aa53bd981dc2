"""Evicting in a model: what is written afterwards is what the model writes when it is shown the same entries alone."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial
from typing import Any

import pytest
import torch
from caches import held, past
from hosts_zoo import DEPTH, build, generate, pad, stored, tokens, window_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import quickmerge as qm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.cache import EVICTORS, Evictor
from quickmerge.merge.cache.evictor import choose, layer_counts
from quickmerge.merge.cache.packed import shape_of
from quickmerge.merge.cache.view import CacheView
from quickmerge.models.decoder import Decoder, find_decoder, watch
from quickmerge.models.rotary import Rotary

EXACT = 1e-9
ALL = {"sinks": 2, "min_tokens": 0}
METHODS: dict[str, Evictor] = {
    "observed": qm.ObservedAttention(0.5, **ALL),
    "norm": qm.AttentionNorm(0.4, window=8, kernel=3, **ALL),
    "snapkv": qm.SnapKV(0.6, window=6, kernel=3, heads="adaptive", **ALL),
    "expected": qm.ExpectedAttention(0.5, future=4, **ALL),
    "lagkv": qm.LagKV(0.7, lag=6, **ALL),
    "keydiff": qm.KeyDiff(0.5, heads="adaptive", floor=0.0, **ALL),
    "streaming": qm.StreamingLLM(0.4, **ALL),
}
LENGTHS = (37, 26, 31)


def reduce(model: Any, method: Any, **more: Any) -> Any:
    return qm.reduce(model, method, recent=3, **more)


def model_of(family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    return build(family, attn, dtype)


def close(a: Tensor, b: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# The truth: the plain model, whose every query is shown some entries of the prompt and no others. ---------------------


class Shown:
    """Stands in front of the attention of a plain model and hides entries of the prompt, of every key head others."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.kept: dict[int, Tensor] = {}
        self.views: dict[int, CacheView] = {}
        self.valid = torch.zeros(0)

    def attend(self, layer: int, call: Any, module: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        query, key, value = args[:3]
        if layer not in self.kept:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            position = (self.valid.long().cumsum(-1) - 1).clamp_min(0)
            window = window_of(self.decoder.config, layer)
            attention = self.decoder.attentions[layer]
            rotary = partial(Rotary.of, self.decoder.base, attention, layer, wanted="")
            self.views[layer] = CacheView(query, key, value, self.valid, position, scaling, window, rotary=rotary)
            return call(module, *args, **kwargs)
        q, n = query.shape[2], key.shape[2]
        kept = self.kept[layer]
        places = torch.arange(self.total - n, self.total)  # columns of the given text that the keys are of
        mine = torch.arange(self.total - q, self.total)
        sees = (places <= mine[:, None])[None, None].expand(len(query), query.shape[1], -1, -1).clone()
        window = window_of(self.decoder.config, layer)
        if window is not None:
            sees &= (mine[:, None] - places) < window
        groups = query.shape[1] // kept.shape[1]
        prompt = places < kept.shape[2]
        shown = kept[..., places.clamp_max(kept.shape[2] - 1)].repeat_interleave(groups, 1)
        sees &= torch.where(prompt, shown, torch.ones_like(shown))[:, :, None]
        if self.decoder.attention == "eager":
            mask: Tensor = torch.where(sees, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
        else:
            mask = sees
        return call(
            module, query, key, value, mask, *args[4:], **{k: v for k, v in kwargs.items() if k != "attention_mask"}
        )


def truth(model: Any, method: Evictor, rows: list[Tensor], more: list[Tensor], recent: int = 3) -> list[Tensor]:
    """Logits of further turns, row by row, by a cache that still holds everything."""
    found: list[list[Tensor]] = []
    for row in rows:
        decoder = find_decoder(model)
        shown = Shown(decoder)
        shown.valid = torch.ones(1, len(row), dtype=torch.bool)
        undo = watch(decoder, shown)
        try:
            # Full attention layers alone, so that nothing is gone that a window would have lost.
            cache = DynamicCache()
            with torch.no_grad():
                model(row[None], **past(cache))
                full, there = [], []
                for layer in range(DEPTH):
                    window = window_of(model.config, layer)
                    full.append(len(row) if window is None else min(len(row), window - 1))
                    there.append(full[-1])
                counts = layer_counts(method.keep, there, full)
                kept = {}
                for layer, view in shown.views.items():
                    scores, n = method.scores(view)[..., len(row) - there[layer] :], there[layer]
                    tail = min(recent, len(row) - 1)
                    some = choose(method, scores, shown.valid, torch.tensor([counts[layer]]), tail)
                    kept[layer] = torch.cat([some.new_zeros(*some.shape[:2], len(row) - n), some], -1)
                shown.kept = kept
                out, shown.total = [], len(row)
                for turn in more:
                    shown.total += len(turn)
                    place = torch.arange(shown.total - len(turn), shown.total)[None]
                    out.append(model(turn[None], position_ids=place, **past(cache)).logits)
        finally:
            undo()
        found.append(out)
    return [torch.cat(turn) for turn in zip(*found, strict=True)]


class Conversation:
    """A batch of rows and the cache that holds them."""

    def __init__(self, model: Any, rows: list[Tensor], side: str = "left") -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)
        ids, self.mask, self.position = pad(rows, side)
        self.logits = model(ids, attention_mask=self.mask, position_ids=self.position, **past(self.cache)).logits
        self.next = self.mask.sum(-1, keepdim=True)

    def read(self, ids: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        after = self.next + torch.arange(ids.shape[1])
        self.next = self.next + ids.shape[1]
        return self.model(ids, attention_mask=self.mask, position_ids=after, **past(self.cache)).logits

    def pick(self, index: Tensor) -> None:
        self.mask, self.next = self.mask[index], self.next[index]


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [tokens(1, n, seed)[0] for seed, n in enumerate(lengths)]


TURNS = [tokens(1, 1, 7)[0], tokens(1, 5, 8)[0], tokens(1, 1, 9)[0], tokens(1, 1, 10)[0]]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("family", "attn"), [("llama", "sdpa"), ("qwen3", "eager"), ("mistral", "sdpa"), ("gemma3_text", "sdpa")]
)
def test_a_batch_goes_on_as_each_row_with_the_chosen_entries_shown(family: str, attn: str, name: str) -> None:
    """Padding, heads with entries of their own, windows in positions, several turns of one and more tokens."""
    dtype = torch.float32 if attn == "eager" else torch.float64
    model, method = model_of(family, attn, dtype), METHODS[name]
    wanted = truth(model, method, rows(), TURNS)
    with torch.no_grad(), reduce(model, method):
        talk = Conversation(model, rows())
        for turn, logits in zip(TURNS, wanted, strict=True):
            close(talk.read(turn.expand(3, -1)), logits, 2e-4 if attn == "eager" else EXACT)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_padding_on_the_right_is_padding(family: str) -> None:
    model, method = model_of(family), METHODS["observed"]
    wanted = truth(model, method, rows(), TURNS)
    with torch.no_grad(), reduce(model, method):
        talk = Conversation(model, rows(), "right")
        for turn, logits in zip(TURNS, wanted, strict=True):
            close(talk.read(turn.expand(3, -1)), logits)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_kvzip_is_what_a_second_reading_by_hand_says(family: str) -> None:
    """Chunks of 12 tokens with 3 before them, each behind the whole prompt, and scored against its own entries."""
    model, method = model_of(family), qm.KVzip(0.5, chunk=12, overlap=3, **ALL)
    row = rows()[0]
    n = len(row)
    decoder = find_decoder(model)
    shown = Shown(decoder)
    scores = {layer: torch.zeros(1, 2, n) for layer in range(DEPTH)}
    undo = watch(decoder, shown)
    try:
        with torch.no_grad():
            for start in range(0, n, 12):
                low, high = max(0, start - 3), min(n, start + 12)
                part = row[low:high]
                cache = DynamicCache()
                shown.valid = torch.ones(1, n, dtype=torch.bool)
                model(row[None], **past(cache))
                shown.valid = torch.ones(1, n + len(part), dtype=torch.bool)
                place = torch.arange(n, n + len(part))[None]
                model(part[None], position_ids=place, **past(cache))
                for layer, view in shown.views.items():
                    window = window_of(model.config, layer)
                    first = low if window is None else max(low, n - window + 1)  # what a window has lost has no score
                    for h in range(4):
                        keys = torch.cat([view.key[0, h // 2, first:high], view.key[0, h // 2, n:]])
                        m = max(0, high - first)
                        for i in range(len(part)):
                            logits = (keys[: m + i + 1] @ view.query[0, h, i]) * view.scaling
                            best = scores[layer][0, h // 2, first : max(first, high)]
                            best.copy_(torch.maximum(best, logits.softmax(0)[:m].float()))
    finally:
        undo()
    with torch.no_grad(), reduce(model, method) as run:
        talk = Conversation(model, [row])
        found = [talk.read(turn[None]) for turn in TURNS]
    assert run.summary().decode_steps == len(TURNS)
    shown = Shown(decoder)
    shown.valid = torch.ones(1, n, dtype=torch.bool)
    undo = watch(decoder, shown)
    try:
        with torch.no_grad():
            cache = DynamicCache()
            model(row[None], **past(cache))
            full = [n if (w := window_of(model.config, i)) is None else w - 1 for i in range(DEPTH)]
            counts = layer_counts(method.keep, full, full)
            for layer in range(DEPTH):
                m = full[layer]
                some = choose(method, scores[layer][..., -m:], shown.valid, torch.tensor([counts[layer]]), 3)
                shown.kept[layer] = torch.cat([some.new_zeros(1, some.shape[1], n - m), some], -1)
            shown.total = n
            for turn, logits in zip(TURNS, found, strict=True):
                shown.total += len(turn)
                place = torch.arange(shown.total - len(turn), shown.total)[None]
                close(logits, model(turn[None], position_ids=place, **past(cache)).logits)
    finally:
        undo()


@pytest.mark.parametrize("side", ["left", "right"])
def test_kvzip_of_a_batch_is_that_of_its_rows(side: str) -> None:
    model, method = model_of("llama"), qm.KVzip(0.5, chunk=10, overlap=4, **ALL)
    with torch.no_grad(), reduce(model, method):
        talk = Conversation(model, rows(), side)
        found = talk.read(TURNS[1].expand(3, -1))
        for i, row in enumerate(rows()):
            close(found[i : i + 1], Conversation(model, [row]).read(TURNS[1][None]))


def test_kvzip_goes_with_a_merge_and_with_drafts_behind_the_prompt() -> None:
    model, method = model_of("llama"), qm.KVzip(0.4, chunk=16, overlap=4, **ALL)
    ids = tokens(1, 60)
    with torch.no_grad(), reduce(model, qm.QuickMerge(keep=0.6, spans="none"), layer=2, min_tokens=0, cache=method):
        cache = DynamicCache(config=model.config)
        model(ids, logits_to_keep=4, **past(cache))
        other = DynamicCache(config=model.config)
        model(ids[:, :57], logits_to_keep=1, **past(other))
        # What is read with a prompt sees all of it, and what is left of the prompt is the same.
        model(ids[:, 57:], **past(other))
        assert stored(cache) == stored(other)
        for one, two in zip(cache.layers, other.layers, strict=True):
            assert shape_of(one) == shape_of(two)
            close(one.keys[:, :, :-3], two.keys[:, :, :-3])


# Laws ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVICTORS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_keep_one_is_the_model_bit_for_bit(family: str, name: str) -> None:
    model = model_of(family, dtype=torch.float32)
    ids = tokens(2, 40)
    wanted = generate(model, ids)
    with reduce(model, EVICTORS[name](keep=1.0, min_tokens=0)):
        found = generate(model, ids)
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, wanted.logits, strict=True))
    assert torch.equal(generate(model, ids).sequences, wanted.sequences)


def test_the_prompt_itself_is_read_with_all_entries() -> None:
    model = model_of("llama", dtype=torch.float32)
    ids = tokens(1, 40)
    with torch.no_grad():
        wanted = model(ids).logits
        with reduce(model, METHODS["snapkv"]):
            assert torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("name", ["observed", "snapkv"])
def test_generate_is_reading_on_by_hand(name: str) -> None:
    model = model_of("llama")
    ids = tokens(1, 40)
    with torch.no_grad(), reduce(model, METHODS[name]):
        written = generate(model, ids, 6)
        talk = Conversation(model, [ids[0]])
        for step in range(1, 6):
            logits = talk.read(written.sequences[:, 39 + step : 40 + step])[:, -1]
            close(logits.float(), written.logits[step], 1e-5)


@pytest.mark.parametrize("name", ["observed", "snapkv", "keydiff"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_beams_of_a_batch_equal_beams_of_its_rows(family: str, name: str) -> None:
    model = model_of(family)
    ids, mask, _ = pad(rows(), "left")
    with reduce(model, METHODS[name]):
        found = generate(model, ids, 5, attention_mask=mask, num_beams=3).sequences[:, -5:]
        for i, row in enumerate(rows()):
            assert torch.equal(generate(model, row[None], 5, num_beams=3).sequences[0, -5:], found[i])


STEPS = st.one_of(
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("copy"), st.sampled_from(["deepcopy", "pickle"])),
    st.tuples(st.just("read"), st.integers(1, 3)),
    st.tuples(st.just("crop"), st.integers(1, 3)),
    st.tuples(st.just("leave"), st.just("another run")),
)


@pytest.mark.parametrize(
    ("family", "name", "merge"),
    [
        ("llama", "observed", False), ("llama", "snapkv", False), ("llama", "keydiff", True),
        ("gemma3_text", "observed", False), ("gemma3_text", "keydiff", True), ("llama", "tome", True),
    ],
)  # fmt: skip
@given(steps=st.lists(STEPS, min_size=1, max_size=5))
@settings(max_examples=6, deadline=None)
def test_whatever_is_done_to_a_cache_its_rows_go_on_as_they_do_alone(
    family: str, name: str, merge: bool, steps: list[tuple[str, Any]]
) -> None:
    model = model_of(family)
    reducer = qm.ToMe(keep=0.6) if name == "tome" else qm.QuickMerge(keep=0.6, window=8, pool=3)
    method = METHODS.get(name, qm.KeyDiff(0.4, heads="adaptive", **ALL))

    def begin() -> Any:
        more: dict[str, Any] = {"sinks": 2, "min_tokens": 0, "layer": [1, 3]} if merge else {}
        return (reduce(model, reducer, cache=method, **more) if merge else reduce(model, method)).attach()

    texts, new = rows(), tokens(6, 40, 9)
    which, read, column = [0, 1, 2], [[] for _ in range(3)], 0
    run = begin()
    try:
        with torch.no_grad():
            talk = Conversation(model, texts)
            for kind, what in steps:
                cache, index = talk.cache, None
                if kind in ("reorder", "select"):
                    index = torch.tensor([i % len(which) for i in what])
                    cache.reorder_cache(index) if kind == "reorder" else cache.batch_select_indices(index)
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
                    talk.mask, talk.next = talk.mask[:, : talk.mask.shape[1] - gone], talk.next - gone
                    read = [r[: len(r) - gone] for r in read]
                elif kind == "leave":
                    run.detach()
                    run = reduce(model, qm.ToMe(keep=0.5), layer=2, min_tokens=0).attach()
                if index is not None:
                    talk.pick(index)
                    which, read = [which[i] for i in index], [list(read[i]) for i in index]
            last = new[: len(which), column : column + 2]
            found = talk.read(last)
            run.detach()
            run = begin()
            for i, text in enumerate(which):
                alone = Conversation(model, [texts[text]])
                if read[i]:
                    alone.read(torch.tensor([read[i]]))
                close(found[i : i + 1], alone.read(last[i : i + 1]))
    finally:
        run.detach()


def test_two_threads_evict_for_themselves() -> None:
    model = model_of("llama")
    texts = [tokens(1, 40, seed) for seed in range(4)]
    with reduce(model, METHODS["snapkv"]):
        wanted = [generate(model, ids, 8).sequences for ids in texts]
        found: dict[int, Tensor] = {}

        def work(i: int) -> None:
            found[i] = generate(model, texts[i], 8).sequences

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[i], wanted[i]) for i in range(4))


# Memory --------------------------------------------------------------------------------------------------------------


def memory(cache: Any) -> int:
    """Bytes of every tensor storage that a cache holds on to, each once."""
    seen: dict[int, int] = {}

    def visit(thing: Any) -> None:
        if isinstance(thing, Tensor):
            seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            for each in thing.values():
                visit(each)
        elif hasattr(thing, "__dict__") and not isinstance(thing, type) and type(thing).__name__ != "PromptState":
            visit(vars(thing))

    for layer in cache.layers:
        visit(vars(layer))
    return sum(seen.values())


@pytest.mark.parametrize("method", [*METHODS.values(), qm.KVzip(0.4, **ALL)], ids=lambda m: m.label)
def test_memory_is_really_free(method: Evictor) -> None:
    model = build("llama", dtype=torch.float32, max_position_embeddings=2048)
    ids = tokens(1, 400)
    with torch.no_grad():
        full = held(model(ids, use_cache=True))
        with reduce(model, method) as run:
            cache = held(model(ids, use_cache=True))
            stats = run.summary()
            assert stored(cache) == stored(full) == [400] * DEPTH
            # Tables of heads take a little: a bit and a place for each.
            assert memory(cache) < (method.keep + 0.08) * memory(full)
            assert stats.cache_bytes == pytest.approx(memory(cache), rel=0.02)
            assert stats.cache_bytes_full == memory(full)
            assert f"evicted: {method!r}" in str(stats)


def test_a_batch_of_rows_of_different_length_takes_no_memory_for_padding() -> None:
    model = build("llama", dtype=torch.float32, hidden_size=256)
    with torch.no_grad(), reduce(model, qm.KeyDiff(0.5, **ALL)):
        talk = Conversation(model, [tokens(1, 400)[0], tokens(1, 50, 1)[0]])
        each = 4 * 2 * 2 * 64 * DEPTH
        assert memory(talk.cache) < 1.03 * each * 225


def test_prompts_of_few_tokens_keep_all() -> None:
    model = model_of("llama", dtype=torch.float32)
    with torch.no_grad(), reduce(model, qm.KeyDiff(0.3, min_tokens=32)):
        talk = Conversation(model, [tokens(1, 40)[0], tokens(1, 20, 1)[0]])
        first = talk.read(tokens(2, 2))
    with torch.no_grad():
        plain = Conversation(model, [tokens(1, 20, 1)[0]])
        torch.testing.assert_close(first[1:], plain.read(tokens(2, 2)[1:]), rtol=1e-4, atol=1e-5)


def test_half_precision_runs_and_stays_near() -> None:
    ids = tokens(2, 40)
    for name in ("observed", "expected", "lagkv", "snapkv"):
        with torch.no_grad():
            logits = []
            for dtype in (torch.float32, torch.bfloat16):
                model = build("llama", dtype=dtype)
                with reduce(model, METHODS[name]):
                    talk = Conversation(model, list(ids))
                    logits.append(talk.read(tokens(2, 2, 5)).float())
            assert bool(logits[1].isfinite().all())


# What can't be -------------------------------------------------------------------------------------------------------


def test_what_can_not_be_is_named() -> None:
    model = build("llama", dtype=torch.float32, max_position_embeddings=64)
    other = qm.KeyDiff(0.5)
    with pytest.raises(QuickmergeError, match="cache must be left out beside keydiff"):
        qm.reduce(model, other, cache=0.3)
    with pytest.raises(QuickmergeError, match="cache must be None in block_causal mode"):
        qm.reduce(model, qm.QuickMerge(keep=0.4), mode="block_causal", cache=other)
    with pytest.raises(QuickmergeError, match="layer must be None where nothing is merged, got 2"):
        qm.reduce(model, other, 2)
    with pytest.raises(ValueError, match="reducer must be a quickmerge reducer"):
        qm.reduce(model, None)
    with (
        pytest.raises(QuickmergeError, match="kvzip for 40 tokens in a model of 64 positions"),
        reduce(model, qm.KVzip(0.5, min_tokens=0)),
    ):
        generate(model, tokens(1, 40))
    with pytest.raises(QuickmergeError, match="kvzip for inputs_embeds"), reduce(model, qm.KVzip(0.5, min_tokens=0)):
        model(inputs_embeds=model.get_input_embeddings()(tokens(1, 20)))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    moving = build("llama", rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match="cache must be another method than expected"):
        qm.reduce(moving, qm.ExpectedAttention(0.5))


def test_without_a_cache_nothing_is_scored() -> None:
    model = model_of("llama", dtype=torch.float32)
    ids = tokens(1, 40)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        with reduce(model, METHODS["observed"]) as run:
            assert torch.equal(model(ids, use_cache=False).logits, wanted)
        assert run.summary().cache_bytes == 0
