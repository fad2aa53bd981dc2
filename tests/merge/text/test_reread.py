"""A prompt that is read twice: the second reading is that of a shorter text, and what follows goes on behind it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from caches import held, past
from hosts_zoo import DEPTH, ZOO, build, generate, pad, reduce, tokens, window_of
from torch import Tensor

import quickmerge as qm
from quickmerge.merge.bench.cost import model_shape
from quickmerge.merge.cache import (
    AttentionNorm,
    ExpectedAttention,
    KeyDiff,
    KVzip,
    LagKV,
    ObservedAttention,
    SnapKV,
    StreamingLLM,
)
from quickmerge.merge.tokens import AttentionTrace, Count, Evidence, TokenView

REDUCERS: dict[str, Any] = {
    "gemfilter": qm.GemFilter(keep=0.4, block=2, pool=3),
    "softmax": qm.GemFilter(keep=0.4, block=1, softmax=True),
    "specprefill": qm.SpecPrefill(keep=0.4, block=2, layers=2, window=3, pool=3, chunk=4),
}
LENGTHS = (37, 26, 31)
ALONE: dict[str, Any] = {"sinks": 1, "recent": 2}
named = pytest.mark.parametrize("name", REDUCERS)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def rows_of(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [tokens(1, n, seed)[0] for seed, n in enumerate(lengths)]


def shorter(model: Any, reducer: Any, row: Tensor, kept: Tensor, extra: Tensor) -> Tensor:
    """Logits of the plain model for the tokens of a row that were kept and what follows, at the method's positions."""
    ids = torch.cat([row[kept], extra])[None]
    places = torch.cat([kept, len(row) + torch.arange(len(extra))])[None]
    if reducer.positions == "consecutive":
        places = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        logits: Tensor = model(ids, position_ids=places, attention_mask=torch.ones_like(ids)).logits
    return logits[0]


# What is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ZOO)
@named
def test_what_is_kept_is_read_as_a_text_of_its_own(family: str, name: str) -> None:
    """With left padding, and with text read behind it one token and several at a time."""
    reducer, model = REDUCERS[name], build(family, dtype=torch.float64)
    rows = rows_of()
    ids, mask, position = pad(rows, "left")
    extra = tokens(3, 5, 9)
    grown, after = torch.cat([mask, torch.ones_like(extra)], 1), position[:, -1:] + 1 + torch.arange(5)
    with torch.no_grad(), reduce(model, reducer, **ALONE) as run:
        out = model(ids, attention_mask=mask, position_ids=position)
        cache, steps = held(out), []
        for part in (slice(0, 1), slice(1, 2), slice(2, 5)):
            seen = grown[:, : ids.shape[1] + part.stop]
            steps.append(model(extra[:, part], **past(cache), attention_mask=seen, position_ids=after[:, part]).logits)
        plan = run.plan
    behind = torch.cat(steps, 1)
    assert plan.slots == round(0.4 * 37)
    for i, row in enumerate(rows):
        kept = plan.position[i][plan.valid[i]] - (ids.shape[1] - len(row))
        want = shorter(model, reducer, row, kept, extra[i])
        close(out.logits[i][plan.valid[i]], want[: len(kept)])
        close(behind[i], want[len(kept) :])


@named
def test_what_is_chosen_is_what_the_plain_model_s_attention_says(name: str) -> None:
    """Queries and keys from the model's own projections, a block at a time."""
    reducer, model = REDUCERS[name], build("llama", dtype=torch.float64)
    ids = tokens(1, 40)
    traces = []
    hidden = model.model.embed_tokens(ids)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(40)[None])

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        last = reducer.scout(DEPTH)
        for layer in range(last + 1 - reducer.needs.layers, last + 1):
            block = model.model.layers[layer]
            x, own = block.input_layernorm(states[layer]), block.self_attn
            query, key, value = (
                part(x).unflatten(-1, (-1, own.head_dim)).transpose(1, 2)
                for part in (own.q_proj, own.k_proj, own.v_proj)
            )
            traces.append(AttentionTrace(turned(query), turned(key), value, own.head_dim**-0.5))
        with reduce(model, reducer, **ALONE) as run:
            model(ids)
    protected = torch.zeros(1, 40, dtype=torch.bool)
    protected[:, [0, 38, 39]] = True
    view = TokenView(states[0], protected=protected, evidence=Evidence(attention=traces))
    assert run.plan.position.tolist() == reducer.plan(view).position.tolist()


@named
def test_the_scout_ends_where_it_has_seen_enough(name: str) -> None:
    reducer, model = REDUCERS[name], build("llama")
    widths: dict[int, list[int]] = {i: [] for i in range(DEPTH)}
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda _, args, i=i: widths[i].append(args[0].shape[1]))
    with torch.no_grad(), reduce(model, reducer, **ALONE) as run:
        model(tokens(1, 40))
    last = reducer.scout(DEPTH)
    assert widths == {i: [40, 16] if i < last else [16] for i in range(DEPTH)}
    stats = run.summary()
    assert stats.tokens_in == 40 and stats.tokens_per_layer == [16] * DEPTH and stats.tokens_kept == 16
    assert 0 < stats.reducer_seconds < stats.prefill_seconds
    assert stats.cache_bytes / stats.cache_bytes_full == 16 / 40


def test_flops_count_the_scout() -> None:
    model, reducer = build("llama"), qm.GemFilter(keep=0.4, block=2)
    shape = model_shape(model)
    with torch.no_grad(), reduce(model, reducer, **ALONE) as run:
        model(tokens(1, 40))
    stats = run.summary()
    ratio = shape.flops_ratio(reducer, stats.tokens_per_layer, stats.tokens_in)
    whole, short = shape.prefill_flops([40] * 4), shape.prefill_flops([16] * 4)
    projections = 2 * 40 * (model.config.hidden_size * 8 * (4 + 2 * 2))
    votes = 2 * 40 * 4 * 8
    assert ratio == pytest.approx((whole / 2 + short + projections + votes) / whole)
    assert shape.flops_ratio(qm.GemFilter(keep=1.0), [40] * 4, 40) == 1


# The laws of a run -----------------------------------------------------------------------------------------------


@named
@pytest.mark.parametrize("keep", [1.0, Count(500)])
def test_keeping_everything_is_the_model_bit_for_bit(name: str, keep: Any, untouched: Any) -> None:
    model = untouched(build("llama"))
    ids, mask, _ = pad(rows_of(), "left")
    plain = generate(model, ids, attention_mask=mask)
    with reduce(model, replace(REDUCERS[name], keep=keep)):
        kept = generate(model, ids, attention_mask=mask)
    assert torch.equal(kept.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(kept.logits, plain.logits, strict=True))
    after = generate(model, ids, attention_mask=mask)
    assert torch.equal(after.logits[0], plain.logits[0])


@named
def test_a_batch_is_read_as_its_rows_are(name: str) -> None:
    model = build("llama", dtype=torch.float64)
    rows = rows_of()
    ids, mask, _ = pad(rows, "left")
    with reduce(model, REDUCERS[name], **ALONE):
        batch = generate(model, ids, 6, attention_mask=mask)
        for i, row in enumerate(rows):
            one = generate(model, row[None], 6)
            assert one.sequences[0, -6:].tolist() == batch.sequences[i, -6:].tolist()
            close(torch.stack(batch.logits)[:, i], torch.stack(one.logits)[:, 0])


@named
def test_short_rows_are_read_in_full_beside_others(name: str) -> None:
    model = build("llama", dtype=torch.float64)
    rows = rows_of((37, 20))
    ids, mask, _ = pad(rows, "left")
    with qm.reduce(model, REDUCERS[name], min_tokens=30, **ALONE) as run:
        batch = generate(model, ids, attention_mask=mask)
    assert run.summary().rows_short == 1
    close(torch.stack(batch.logits)[:, 1], torch.stack(generate(model, rows[1][None]).logits)[:, 0])


@named
def test_beams_follow_one_another(name: str) -> None:
    """Two beams of rows of a batch are those of each row alone."""
    model = build("llama", dtype=torch.float64)
    rows = rows_of((33, 28))
    ids, mask, _ = pad(rows, "left")
    with reduce(model, REDUCERS[name], **ALONE):
        batch = generate(model, ids, 6, attention_mask=mask, num_beams=3)
        for i, row in enumerate(rows):
            alone = generate(model, row[None], 6, num_beams=3)
            assert alone.sequences[0, -6:].tolist() == batch.sequences[i, -6:].tolist()


@named
def test_a_further_turn_goes_on_behind_the_prompt(name: str) -> None:
    """By generate with all ids and the cache; in another run of such a method too, and from a copy of the cache."""
    reducer, model = REDUCERS[name], build("llama", dtype=torch.float64)
    ids, new = tokens(1, 40), tokens(1, 3, 7)
    with torch.no_grad(), reduce(model, reducer, **ALONE) as run:
        cache = held(model(ids))
        kept = run.plan.position[0]
    assert cache.get_seq_length() == 40
    whole = torch.cat([ids, new], 1)
    with reduce(model, REDUCERS["gemfilter"], **ALONE):
        first, again = (generate(model, whole, 4, **past(deepcopy(cache))) for _ in range(2))
        found = generate(model, whole, 4, **past(cache))
    assert first.sequences.tolist() == again.sequences.tolist() == found.sequences.tolist()
    want = shorter(model, reducer, ids[0], kept, found.sequences[0, 40:])[len(kept) + 2 : -1]
    torch.testing.assert_close(torch.stack(found.logits)[:, 0], want.float(), rtol=0, atol=1e-5)


@named
def test_what_was_read_behind_a_prompt_can_be_taken_back(name: str) -> None:
    model = build("llama", dtype=torch.float64)
    ids, new = tokens(1, 40), tokens(1, 4, 7)
    with torch.no_grad(), reduce(model, REDUCERS[name], **ALONE):
        cache = held(model(ids))
        first = model(new, **past(cache)).logits
        cache.crop(-4)
        close(model(new, **past(cache)).logits, first)
        with pytest.raises(qm.QuickmergeError, match="crop can take back 4 tokens here"):
            cache.crop(-5)


@named
def test_drafted_tokens_write_what_the_run_writes(name: str) -> None:
    model = build("llama", dtype=torch.float64)
    ids = tokens(1, 12).repeat(1, 4)
    with reduce(model, REDUCERS[name], **ALONE):
        want = generate(model, ids, 12).sequences
    recipe = qm.Recipe(
        merge=qm.Merge(REDUCERS[name], mode=qm.Prefix(min_tokens=0, **ALONE)),
        decoding=qm.Speculation(qm.PromptLookup(ngram=2), tree=6),
    )
    with qm.apply(model, recipe):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12,
                               do_sample=False)  # fmt: skip
    assert found.tolist() == want.tolist()


@named
def test_clusters_of_what_was_kept_are_read(name: str) -> None:
    """With a budget of everything, multipole attention beside it changes nothing."""
    model = build("llama", dtype=torch.float64)
    ids = tokens(1, 48)
    with reduce(model, REDUCERS[name], **ALONE):
        want = generate(model, ids, 6)
    merge = qm.Merge(REDUCERS[name], mode=qm.Prefix(min_tokens=0, **ALONE))
    with qm.apply(model, qm.Recipe(merge=merge, attention=qm.Multipole(budget=512, block=16))) as run:
        found = generate(model, ids, 6)
    assert found.sequences.tolist() == want.sequences.tolist()
    assert run.summary()["merge"].tokens_kept == round(0.4 * 48)


@named
def test_embeddings_are_read_as_ids_are(name: str) -> None:
    model = build("llama", dtype=torch.float64)
    ids = tokens(1, 40)
    with torch.no_grad(), reduce(model, REDUCERS[name], **ALONE):
        close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)


EVICTORS = [SnapKV, StreamingLLM, ObservedAttention, AttentionNorm, KeyDiff, partial(LagKV, lag=6)]


@pytest.mark.parametrize("kind", EVICTORS, ids=lambda kind: getattr(kind, "name", "lagkv"))
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_entries_leave_the_cache_as_they_would_leave_that_of_the_shorter_text(family: str, kind: Any) -> None:
    """A share of the cache of the prompt, which is a larger one of the cache of what was read; windows are of that."""
    model, ids = build(family, dtype=torch.float64), tokens(1, 80)
    full = {
        n: sum(n if (window := window_of(model.config, i)) is None else min(n, window - 1) for i in range(DEPTH))
        for n in (40, 80)
    }
    method = kind(keep=0.25, sinks=2, min_tokens=0)
    with reduce(model, qm.GemFilter(keep=0.5, block=1), cache=method, **ALONE) as run:
        found = generate(model, ids, 6)
    stats = run.summary()
    assert run.plan.slots == 40 and stats.prompt_cache_bytes < 0.7 * stats.prompt_cache_bytes_full
    with qm.reduce(model, None, cache=replace(method, keep=0.25 * full[80] / full[40]), recent=2):
        want = generate(model, ids[:, run.plan.position[0]], 6)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(want.logits), rtol=0, atol=1e-6)


def test_protected_tokens_are_read() -> None:
    model, ids = build("llama"), tokens(1, 40)
    shut = torch.zeros(1, 40, dtype=torch.bool)
    shut[:, 10:13] = True
    with torch.no_grad(), reduce(model, REDUCERS["gemfilter"], protect=lambda _: shut, **ALONE) as run:
        model(ids)
    assert {10, 11, 12, 0, 38, 39} <= set(run.plan.position[0].tolist())


# Refusals ---------------------------------------------------------------------------------------------------------


def test_what_a_method_that_reads_twice_can_t_do_is_told() -> None:
    model, gem = build("llama"), REDUCERS["gemfilter"]
    for call, message in (
        (lambda: qm.reduce(model, gem, 2), r"layer must be left out for gemfilter, .* GemFilter\(block=\.\.\.\)"),
        (lambda: qm.reduce(model, gem, mode="block_causal"), "gemfilter reads a prompt twice, which block_causal mode"),
        (lambda: qm.reduce(model, qm.GemFilter(block=4)), r"block must be in 0\.\.3 for gemfilter in .*, got 4"),
        (lambda: qm.reduce(model, gem, cache=KVzip()), "cache must be another method than kvzip beside gemfilter"),
        (
            lambda: qm.reduce(model, gem, cache=ExpectedAttention()),
            "cache must be another method than .* beside",
        ),
        (lambda: qm.reduce(model, qm.SpecPrefill(block=6)), "block must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    ids = tokens(1, 40)
    with reduce(model, gem):
        with pytest.raises(
            qm.QuickmergeError, match="logits_to_keep must be 0 or 1 while a prompt is read twice, got 3"
        ):
            model(ids, logits_to_keep=3)
        with pytest.raises(qm.QuickmergeError, match="prompt_lookup_num_tokens must be left out"):
            generate(model, ids, prompt_lookup_num_tokens=2)
        with pytest.raises(qm.QuickmergeError, match="labels must be left out"):
            model(ids, labels=ids)


def test_a_cache_goes_on_in_a_run_that_can_read_it() -> None:
    model, ids = build("llama", dtype=torch.float64), tokens(1, 40)
    merging = qm.QuickMerge(keep=0.5, window=16, pool=3)
    with torch.no_grad():
        with reduce(model, REDUCERS["gemfilter"], **ALONE):
            short = held(model(ids))
        with reduce(model, merging, 2):
            merged = held(model(ids))
            copied = deepcopy(merged)
            want = model(ids[:, :3], **past(merged)).logits
            with pytest.raises(qm.QuickmergeError, match="became shorter in front of the first block"):
                model(ids[:, :3], **past(short))
        with reduce(model, REDUCERS["gemfilter"], **ALONE):
            close(model(ids[:, :3], **past(copied)).logits, want)


def test_the_model_is_as_it_was_after_a_failure(untouched: Any) -> None:
    model = untouched(build("llama"))
    with pytest.raises(qm.QuickmergeError, match="attention_mask must pad"), reduce(model, REDUCERS["gemfilter"]):
        model(tokens(1, 10), attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1, 1]]))
