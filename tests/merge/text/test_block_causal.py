from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from caches import held, past
from hosts_zoo import WINDOW, ZOO, build, generate, pad, rotary, stored, tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.text.block_causal import ChunkedLayer
from quickmerge.merge.tokens import AttentionTrace, Count, Evidence, TokenView

EXACT = 1e-10
REDUCERS = {
    "quickmerge": qm.QuickMerge(keep=0.5, window=4, pool=3),
    "tome": qm.ToMe(keep=0.5),
    "random": qm.Random(keep=0.5),
    "uniform": qm.Uniform(keep=0.5),
    "topnorm": qm.TopNorm(keep=0.5),
    "attention": qm.Attention(keep=0.5),
    "entropy": qm.QuickMerge(keep=qm.Entropy(scale=0.7), window=8, pool=1),
}
SHAPES = [(7, 3), (5, 11), pytest.param(8, 5, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)]
SIZES = [name for name in ZOO if name != "mistral"]  # Mistral slides in every block


def attach(model: Any, reducer: Any, **more: Any) -> Any:
    return qm.reduce(model, reducer, **{"mode": "block_causal", "chunk": 7, "window": 3, "sinks": 2, **more})


def close(a: Tensor, b: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def absorbed(length: int, chunk: int, window: int) -> int:
    """Tokens of the chunks that are closed once ``length`` tokens were read."""
    return max(0, (length - window) // chunk) * chunk


# (a) Nothing after t is visible at t -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize(("chunk", "window"), SHAPES)
def test_later_tokens_change_nothing_before_them(name: str, chunk: int, window: int) -> None:
    model = build("llama", dtype=torch.float64)
    ids = tokens(2, 40)
    with torch.no_grad(), attach(model, REDUCERS[name], chunk=chunk, window=window):
        logits = model(ids).logits
        for t in (0, 1, chunk - 1, chunk, chunk + window - 1, chunk + window, 17, 20, 27, 33, 38):
            changed = torch.cat([ids[:, : t + 1], tokens(2, 39 - t, t + 1)], 1)
            other = model(changed).logits
            assert torch.equal(other[:, : t + 1], logits[:, : t + 1]), t
            assert not torch.equal(other[:, t + 1 :], logits[:, t + 1 :])


@pytest.mark.parametrize("name", ["quickmerge", "tome"])
def test_no_gradient_comes_back_from_the_future(name: str) -> None:
    model = build("llama", dtype=torch.float64)
    embeds = model.get_input_embeddings()(tokens(1, 40)).detach().requires_grad_()
    with attach(model, REDUCERS[name]):
        logits = model(inputs_embeds=embeds, use_cache=False).logits
        (grad,) = torch.autograd.grad(logits[0, 25].logsumexp(-1), embeds)
    assert bool((grad[0, 26:] == 0).all()) and bool((grad[0, 25] != 0).any())
    if name == "tome":  # merges and never drops: everything behind still counts
        assert bool((grad[0, :26] != 0).any(-1).all())


# (b) Whole, in pieces, token by token ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize(("chunk", "window"), SHAPES)
def test_however_the_text_is_fed(name: str, chunk: int, window: int) -> None:
    model = build("llama", dtype=torch.float64)
    ids = tokens(2, 41)
    with torch.no_grad(), attach(model, REDUCERS[name], chunk=chunk, window=window):
        whole = model(ids).logits
        close(model(ids, use_cache=False).logits, whole)
        for cuts in ([1] * 41, [41 - 1, 1], [3, 17, 1, 1, 19], [chunk + window] * (41 // (chunk + window))):
            cache, parts, at = DynamicCache(config=model.config), [], 0
            for size in cuts:
                out = model(ids[:, at : at + size], **past(cache))
                at += size
                parts.append(out.logits)
                assert cache.get_seq_length() == at
            close(torch.cat(parts, 1), whole[:, :at])
        for n in (1, chunk, chunk + window, 30):
            close(model(ids[:, :n]).logits, whole[:, :n])


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_every_family_reads_in_pieces(family: str, attn: str) -> None:
    model = build(family, attn, torch.float64)
    ids = tokens(2, 41)
    with torch.no_grad(), attach(model, REDUCERS["quickmerge"]):
        whole = model(ids).logits
        cache, parts = DynamicCache(config=model.config), []
        for part in ids.split([20, 1, 1, 19], dim=1):
            parts.append(model(part, **past(cache)).logits)
        # eager takes its softmax in float32
        close(torch.cat(parts, 1), whole, EXACT if attn == "sdpa" else 1e-5)
    with torch.no_grad():
        assert (whole - model(ids).logits).abs().max() > 1e-3


# (c) Against attention written out query by query ------------------------------------------------------------------


def slow_logits(model: Any, ids: Tensor, reducer: Any, chunk: int, window: int, sinks: int) -> Tensor:
    """A one-layer Llama of which every query gathers what it may see and attends to it, one head at a time."""
    base, block = model.model, model.model.layers[0]
    attention = block.self_attn
    h = base.embed_tokens(ids)
    x = block.input_layernorm(h)
    rows, n = ids.shape
    cos, sin = (t[:, None] for t in rotary(base, h, torch.arange(n)[None], 0))

    def heads(projection: Any) -> Tensor:
        return projection(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def turn(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin

    q, k, v = turn(heads(attention.q_proj)), turn(heads(attention.k_proj)), heads(attention.v_proj)
    group = q.shape[1] // k.shape[1]
    plans = []
    for start in range(0, n - chunk - window + 1, chunk):
        # The window after the chunk votes, is protected, and is there besides what the budget says of the chunk.
        part, place = slice(start, start + chunk + window), torch.arange(start, start + chunk + window)[None]
        guard = (place < sinks) | (place >= start + chunk)
        plans.append([])
        for row in range(rows):
            trace = AttentionTrace(*(t[row : row + 1, :, part] for t in (q, k, v)), attention.scaling)
            features = v[row : row + 1, :, part].transpose(1, 2).flatten(2)
            view = TokenView(
                features,
                position=place,
                protected=guard,
                latest=False,
                evidence=Evidence(attention=(trace,) if reducer.needs.layers else ()),
            )
            saliency = reducer.saliency(view)[:, :chunk] if hasattr(reducer, "saliency") else None
            alone = TokenView(features[:, :chunk], position=place[:, :chunk], protected=guard[:, :chunk])
            kept = int(reducer.budget.count(alone, saliency))
            plan = replace(reducer, keep=Count(kept + window)).plan(view)
            plan.check(view)
            plans[-1].append(plan)
    out = torch.zeros(rows, n, q.shape[1], attention.head_dim, dtype=h.dtype)
    for b in range(rows):
        for t in range(n):
            entries: list[tuple[Tensor, Tensor, float]] = []  # keys and values of all heads, and a bias
            single = 0
            for c, chunk_plans in enumerate(plans):
                plan = chunk_plans[b]
                if t < (c + 1) * chunk + window:
                    break
                single = (c + 1) * chunk
                for s in range(plan.slots - window):
                    members = [j for j in range(chunk) if int(plan.slot[0, j]) == s]
                    value = sum(plan.weight[0, j].item() * v[b, :, c * chunk + j] for j in members)
                    bias = math.log(int(plan.size[0, s])) if reducer.proportional else 0.0
                    entries.append((k[b, :, int(plan.position[0, s])], value, bias))
            entries += [(k[b, :, j], v[b, :, j], 0.0) for j in range(single, t + 1)]
            for head in range(q.shape[1]):
                g = head // group
                scores = torch.stack([(q[b, head, t] @ key[g]) * attention.scaling + bias for key, _, bias in entries])
                p = scores.softmax(0)
                out[b, t, head] = sum(p[i] * entries[i][1][g] for i in range(len(entries)))
    h = h + attention.o_proj(out.flatten(2))
    h = h + block.mlp(block.post_attention_layernorm(h))
    return model.lm_head(base.norm(h))


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize(("chunk", "window"), [(7, 3), (6, 8)])
def test_a_layer_equals_attention_written_out(name: str, chunk: int, window: int) -> None:
    model = build("llama", dtype=torch.float64, num_hidden_layers=1)
    ids = tokens(2, 33)
    with torch.no_grad():
        with attach(model, REDUCERS[name], chunk=chunk, window=window):
            logits = model(ids).logits
        close(logits, slow_logits(model, ids, REDUCERS[name], chunk, window, 2))
        assert (logits - model(ids).logits).abs().max() > 1e-3


# (d) What is stored, generation, and what is refused ---------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 12])
def test_nothing_in_a_chunk_is_kept_for_being_recent(window: int) -> None:
    """The window behind it is newer and no business of the budget, so the share for recent tokens changes nothing."""
    model, ids = build("llama"), tokens(1, 40)
    logits = []
    for recency in (0.0, 0.5, 1.0):
        reducer = qm.QuickMerge(keep=0.5, window=4, pool=1, recency=recency)
        with torch.no_grad(), attach(model, reducer, chunk=8, window=window):
            logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize(("chunk", "window", "sinks"), [(7, 3, 2), (8, 5, 0), (16, 1, 4), (4, 9, 6)])
def test_the_cache_stays_bounded(name: str, chunk: int, window: int, sinks: int) -> None:
    model = build("llama")
    n = 90
    with torch.no_grad(), attach(model, REDUCERS[name], chunk=chunk, window=window, sinks=sinks) as run:
        cache = held(model(tokens(2, 50)))
        for step in tokens(2, n - 50, 1).split(1, dim=1):
            model(step, **past(cache))
            rounding = cache.get_seq_length() // chunk
            for layer in cache.layers:
                entries = layer.keys.shape[2]
                assert entries == layer.values.shape[2] and isinstance(layer, ChunkedLayer)
                if name != "entropy":
                    assert entries <= sinks + 0.5 * cache.get_seq_length() + chunk + window + rounding
                assert layer.query.shape[2] < chunk + window
        assert stored(cache) == [n] * 4
        assert cache.layers[0].absorbed == absorbed(n, chunk, window) > 0
        assert run.summary().cache_bytes < run.summary().cache_bytes_full


@pytest.mark.parametrize("name", ["quickmerge", "entropy", "uniform"])
def test_generation_equals_reading_what_was_generated(name: str) -> None:
    model = build("llama", dtype=torch.float64)
    ids = tokens(2, 30)
    with torch.no_grad(), attach(model, REDUCERS[name]):
        out = generate(model, ids, 12)
        logits = model(out.sequences[:, :-1]).logits[:, 29:]
    # `generate` hands its logits out in float32.
    close(torch.stack(out.logits, 1).double(), logits, 2e-6)


@pytest.mark.parametrize("name", ["quickmerge", "tome", "entropy"])
def test_beams_of_a_batch_equal_beams_of_its_rows(name: str) -> None:
    model = build("llama", dtype=torch.float64)
    ids = tokens(3, 30)
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    with torch.no_grad(), attach(model, REDUCERS[name]):
        batch = generate(model, ids, 12, **beams)
        for i in range(3):
            alone = generate(model, ids[i : i + 1], 12, **beams)
            pair = slice(2 * i, 2 * i + 2)
            assert torch.equal(batch.sequences[pair], alone.sequences)
            close(batch.sequences_scores[pair], alone.sequences_scores, 1e-6)
        # A beam's score is the log-likelihood of its tokens, read from scratch.
        best = batch.sequences[::2]
        wanted = model(best[:, :-1]).logits[:, 29:].log_softmax(-1).gather(-1, best[:, 30:, None]).sum((1, 2)) / 12
    # min_new_tokens takes one token out of the race without renormalising, so this is exact.
    close(batch.sequences_scores[::2].double(), wanted, 1e-5)


def test_sampling_several_sequences() -> None:
    model = build("llama")
    with torch.no_grad(), attach(model, REDUCERS["entropy"]):
        torch.manual_seed(0)
        out = generate(model, tokens(2, 30), 8, do_sample=True, num_return_sequences=3)
    assert out.sequences.shape == (6, 38) and len(set(map(tuple, out.sequences[:, 30:].tolist()))) > 3


@pytest.mark.parametrize(
    "change",
    [
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_rows_of_a_cache_may_be_moved(change: tuple[Callable[[Any], None], list[int]]) -> None:
    move, order = change
    model = build("llama", dtype=torch.float64)
    ids, more = tokens(3, 33), tokens(1, 9, 4)
    with torch.no_grad(), attach(model, REDUCERS["entropy"]):
        cache = held(model(ids))
        assert cache.layers[0].valid is not None, "all rows keep the same count: the test has no bite"
        move(cache)
        moved = model(more.expand(len(order), -1), **past(cache)).logits
        fresh = model(torch.cat([ids[order], more.expand(len(order), -1)], 1)).logits[:, 33:]
    close(moved, fresh)


@pytest.mark.parametrize("name", REDUCERS)
def test_a_batch_equals_its_rows(name: str) -> None:
    model = build("llama", dtype=torch.float64)
    ids = tokens(3, 41)
    ids[1, 5:30] = 11  # a dull row, for budgets that look
    with torch.no_grad(), attach(model, REDUCERS[name]) as run:
        out = model(ids)
        ragged = any(layer.valid is not None and not bool(layer.valid.all()) for layer in held(out).layers)
        assert ragged == (name == "entropy")
        counts = run.summary().tokens_per_layer
        alone = []
        for i in range(3):
            close(model(ids[i : i + 1]).logits[0], out.logits[i])
            alone.append(run.summary().tokens_per_layer)
    assert counts == pytest.approx([sum(row[i] for row in alone) / 3 for i in range(4)])


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("reducer", [qm.QuickMerge(keep=1.0), qm.ToMe(keep=1.0)], ids=["quickmerge", "tome"])
def test_keep_one_is_the_model(family: str, reducer: Any) -> None:
    model = build(family, dtype=torch.float64)
    ids = tokens(2, 41)
    with torch.no_grad():
        plain, written = model(ids).logits, generate(model, ids, 12)
        with attach(model, reducer):
            close(model(ids).logits, plain)
            again = generate(model, ids, 12)
    assert torch.equal(again.sequences, written.sequences)


def test_the_first_merge_is_seen_by_the_first_token_after_the_window() -> None:
    model = build("llama")
    ids = tokens(2, 11)
    with torch.no_grad():
        plain = model(ids).logits
        with attach(model, REDUCERS["quickmerge"], chunk=7, window=3) as run:
            merged = model(ids).logits
            counts = []
            for n in (9, 10, 11):
                model(ids[:, :n])
                counts.append(run.summary().tokens_per_layer)
    close(merged[:, :10], plain[:, :10], 1e-5)
    assert bool(((merged[:, 10] - plain[:, 10]).abs().amax(-1) > 1e-3).all())
    # The chunk of 7 becomes 4 slots right behind the tenth token.
    assert counts == [[9.0] * 4, [7.0] * 4, [8.0] * 4]


@pytest.mark.parametrize("first", [0, 1, 3])
def test_counts_per_layer(first: int) -> None:
    model = build("llama")
    with torch.no_grad(), attach(model, qm.Uniform(keep=0.5), layer=first, chunk=8, window=5) as run:
        out = model(tokens(2, 50))
    # 5 chunks of 8 have closed at 45 tokens: 5 * 4 slots and the last 10 tokens.
    assert run.summary().tokens_per_layer == [50.0] * first + [30.0] * (4 - first)
    assert [layer.keys.shape[2] for layer in held(out).layers] == [50] * first + [30] * (4 - first)
    assert run.summary().tokens_in == 50 and run.summary().tokens_kept == 30 and run.summary().rows == 2
    assert run.summary().reducer_seconds > 0


def test_layers_below_the_first_are_left_alone() -> None:
    model = build("llama", dtype=torch.float64)
    ids = tokens(1, 41)
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True).hidden_states
        with attach(model, REDUCERS["quickmerge"], layer=2):
            merged = model(ids, output_hidden_states=True).hidden_states
    for i in range(3):
        assert torch.equal(plain[i], merged[i])
    assert not torch.equal(plain[3], merged[3])


def test_sliding_blocks_are_left_alone() -> None:
    model = build("gemma3_text", dtype=torch.float64)
    ids = tokens(2, 50)
    with torch.no_grad(), attach(model, qm.Uniform(keep=0.5), chunk=8, window=5) as run:
        cache = held(model(ids))
        assert [isinstance(layer, ChunkedLayer) for layer in cache.layers] == [False, True] * 2
        assert [layer.keys.shape[2] for layer in cache.layers] == [WINDOW - 1, 30] * 2
        assert run.summary().tokens_per_layer == [50, 30, 50, 30]
        assert stored(cache) == [50] * 4
        out = generate(model, ids, 6)
        logits = model(out.sequences[:, :-1]).logits[:, 49:]
    close(torch.stack(out.logits, 1).double(), logits, 2e-6)


def test_a_model_of_sliding_blocks_only_is_refused() -> None:
    with pytest.raises(QuickmergeError, match=r"Mistral\w+, whose block 0 \(sliding_attention\) has"):
        attach(build("mistral"), qm.Uniform(keep=0.5))
    with pytest.raises(QuickmergeError, match="layer 3 and above hold sliding-window attention only"):
        types = ["full_attention", "full_attention", "full_attention", "sliding_attention"]
        attach(build("gemma3_text", layer_types=types), qm.Uniform(keep=0.5), layer=3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_refused(side: str, untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    ids, mask, _ = pad([tokens(1, 40)[0], tokens(1, 30)[0]], side)
    with attach(model, qm.Uniform(keep=0.5)):
        with pytest.raises(QuickmergeError, match="attention_mask must be all ones in block_causal mode"):
            model(ids, attention_mask=mask)
        with pytest.raises(QuickmergeError, match="attention_mask must be all ones in block_causal mode"):
            model(ids, attention_mask=torch.ones(2, 1, 40, 40))
        model(ids, attention_mask=torch.ones_like(ids))


def test_cropping_is_refused() -> None:
    model = build("llama")
    ids = tokens(1, 6).repeat(1, 7)
    with torch.no_grad(), attach(model, qm.Uniform(keep=0.5)):
        cache = held(model(ids))
        with pytest.raises(QuickmergeError, match="block_causal mode can't be cropped"):
            cache.crop(-2)
        with pytest.raises(QuickmergeError, match="prompt_lookup_num_tokens must be left out in block_causal mode"):
            generate(model, ids, 8, prompt_lookup_num_tokens=3)


def test_caches_from_elsewhere_are_refused() -> None:
    model = build("llama")
    outside = held(model(tokens(1, 20)))
    with attach(model, qm.Uniform(keep=0.5)):
        with pytest.raises(QuickmergeError, match="was filled outside of block_causal mode"):
            model(tokens(1, 1), **past(outside))
        with pytest.raises(QuickmergeError, match="must be a DynamicCache that stays on its device, got StaticCache"):
            model(tokens(1, 20), **past(StaticCache(config=model.config, max_cache_len=64)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 4}, r"layer must be one block in 0\.\.3 in block_causal mode, got 4"),
        ({"layer": -1}, "layer must be one block"),
        ({"layer": [1, 2]}, r"layer must be one block .*got \[1, 2\]"),
        ({"layer": True}, "layer must be one block"),
        ({"chunk": 1}, "chunk must be a whole number of at least 2, got 1"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"sinks": -1}, "sinks must be a whole number of at least 0, got -1"),
        ({"protect": lambda ids: ids == 1}, "protect must be 'literals' or None in block_causal mode"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(build("llama"), qm.Uniform(keep=0.5), **settings)


def gradients(model: Any, ids: Tensor, checkpointing: bool) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if checkpointing:
        getattr(model, f"{switch}_checkpointing_enable")()
    try:
        with attach(model, REDUCERS["quickmerge"]):
            logits = model(ids, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    finally:
        if checkpointing:
            getattr(model, f"{switch}_checkpointing_disable")()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_training_sees_every_weight() -> None:
    found = gradients(build("llama", dtype=torch.float64), tokens(2, 40), False)
    assert all(bool(g.isfinite().all()) and bool((g != 0).any()) for g in found.values())


def test_gradient_checkpointing_changes_no_gradient_or_is_refused() -> None:
    model = build("llama", dtype=torch.float64)
    ids = tokens(2, 40)
    plain = gradients(model, ids, False)
    try:
        saved = gradients(model, ids, True)
    except QuickmergeError:
        return
    for key, value in plain.items():
        close(saved[key], value, 1e-9)


def test_bfloat16_runs() -> None:
    model = build("llama", dtype=torch.bfloat16)
    ids = tokens(2, 40)
    with torch.no_grad(), attach(model, REDUCERS["quickmerge"]):
        out = generate(model, ids, 4)
        assert held(out).layers[0].keys.dtype == torch.bfloat16
        near = model(ids).logits
    with torch.no_grad(), attach(model.double(), REDUCERS["quickmerge"]):
        wanted = model(ids).logits
    # Some anchors differ by rounding, so this is a check for sense.
    assert (near.double() - wanted).abs().mean() < 0.25 * wanted.abs().mean()
