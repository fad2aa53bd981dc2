from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from caches import held, past
from hosts_zoo import BOS, DEPTH, EOS, WINDOW, ZOO, build, by_hand, generate, pad, reduce, rotary, stored, tokens
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, StaticCache

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.tokens import AttentionTrace, Evidence, Schedule, TokenView

EXACT = 1e-10
REDUCERS = {
    "quickmerge": qm.QuickMerge(keep=0.5, layers=2, window=16, pool=3),
    "tome": qm.ToMe(keep=0.4),
    "attention": qm.Attention(keep=0.5, layers=1),
    "topnorm": qm.TopNorm(keep=0.5),
    "uniform": qm.Uniform(keep=0.5),
    "truncate": qm.Truncate(keep=0.5),
    "random": qm.Random(keep=0.5),
}
LENGTHS = (37, 26, 31)


def close(a: Tensor, b: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def rows_of(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [tokens(1, n, seed)[0] for seed, n in enumerate(lengths)]


def merges_of(run: Any) -> dict[int, Any]:
    return dict(zip(sorted(run.stages), run.plans, strict=True))


# The reduced forward against the same computation written out -----------------------------------------------------


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("name", REDUCERS)
def test_a_merged_forward_equals_the_layers_called_by_hand(family: str, name: str) -> None:
    """Left padding, sliding windows in original positions, and decoding after the prompt, all at once."""
    reducer = REDUCERS[name]
    model = build(family, dtype=torch.float64)
    ids, mask, position = pad(rows_of(), "left")
    extra = tokens(3, 5, 9)
    grown = torch.cat([mask, torch.ones_like(extra)], 1)
    after = position[:, -1:] + 1 + torch.arange(5)
    with torch.no_grad(), reduce(model, reducer, layer=2, sinks=2, recent=5) as run:
        out = model(ids, attention_mask=mask, position_ids=position)
        cache = held(out)
        steps = []
        for part in (slice(0, 1), slice(1, 2), slice(2, 5)):  # one by one, then three at once
            seen = grown[:, : ids.shape[1] + part.stop]
            steps.append(model(extra[:, part], **past(cache), attention_mask=seen, position_ids=after[:, part]).logits)
        merges = merges_of(run)
        plan = run.plan
    assert plan.slots < ids.shape[1]
    with torch.no_grad():
        wanted = by_hand(model, ids, merges, valid=mask, extra=extra, proportional=reducer.proportional)
    k = plan.slots
    close(out.logits[plan.valid], wanted[:, :k][plan.valid])
    close(torch.cat(steps, 1), wanted[:, k:])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("name", ["quickmerge", "tome"])
def test_several_merges_equal_the_layers_called_by_hand(family: str, name: str) -> None:
    model = build(family, dtype=torch.float64)
    ids, mask, position = pad(rows_of((45, 38)), "left")
    extra = tokens(2, 3, 9)
    with torch.no_grad(), reduce(model, REDUCERS[name], layer=[1, 3], sinks=2, recent=5) as run:
        out = model(ids, attention_mask=mask, position_ids=position)
        more = model(
            extra,
            **past(held(out)),
            attention_mask=torch.cat([mask, torch.ones_like(extra)], 1),
            position_ids=position[:, -1:] + 1 + torch.arange(3),
        )
        merges = merges_of(run)
        wanted_counts = [plan.slots for plan in run.plans]
    assert list(merges) == [1, 3] and 45 > wanted_counts[0] > wanted_counts[1]
    with torch.no_grad():
        wanted = by_hand(model, ids, merges, valid=mask, extra=extra, proportional=REDUCERS[name].proportional)
    close(out.logits[run.plan.valid], wanted[:, : run.plan.slots][run.plan.valid])
    close(more.logits, wanted[:, run.plan.slots :])
    # The composed plan says where each original token went.
    first, second = run.plans
    for row in range(2):
        for j in range(45):
            via = int(first.slot[row, j])
            assert int(run.plan.slot[row, j]) == (int(second.slot[row, via]) if via >= 0 else -1)


def test_a_six_layer_model_merges_where_it_is_told() -> None:
    model = build("llama", dtype=torch.float64, num_hidden_layers=6)
    ids = tokens(1, 60)
    with torch.no_grad():
        with reduce(model, REDUCERS["quickmerge"], layer=[2, 4], sinks=2, recent=5) as run:
            logits = model(ids).logits
        close(logits, by_hand(model, ids, merges_of(run)))
    kept = run.summary().tokens_per_layer
    assert kept[:2] == [60, 60] and kept[2] == kept[3] > kept[4] == kept[5]
    assert sum(kept[2:]) / 4 == pytest.approx(30, abs=1)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_proportional_attention_is_an_additive_log_size(attn: str) -> None:
    """The extra channel against a bias that is added to the scores, for both implementations."""
    model = build("llama", attn, torch.float64)
    ids = tokens(2, 40)
    with torch.no_grad():
        with reduce(model, qm.ToMe(keep=0.3), layer=2, recent=5) as run:
            logits = model(ids).logits
            merges = merges_of(run)
        assert int(run.plan.size.max()) > 2
        tolerance = EXACT if attn == "sdpa" else 1e-6  # eager takes its softmax in float32
        close(logits, by_hand(model, ids, merges, proportional=True), tolerance)
        assert (logits - by_hand(model, ids, merges, proportional=False)).abs().max() > 1e-3


def test_exact_duplicates_merged_with_log_size_change_nothing() -> None:
    """Without positions a run of one token holds exact duplicates; ToMe may merge them at no cost at all."""
    model = build("smollm3", dtype=torch.float64, no_rope_layers=[0] * DEPTH)
    ids = torch.cat([torch.full((1, 24), 7), tokens(1, 8)], 1)
    with torch.no_grad():
        plain = model(ids).logits[:, -8:]
        with reduce(model, qm.ToMe(keep=0.5), layer=2, sinks=0, recent=8) as run:
            merged = model(ids).logits[:, -8:]
        assert run.plan.slots == 16 and int(run.plan.size.max()) > 1
        # Shares are held in float32, hence not closer than this.
        close(merged, plain, 1e-5)
        with reduce(model, qm.Uniform(keep=0.5), layer=2, sinks=0, recent=8):
            assert (model(ids).logits[:, -8:] - plain).abs().max() > 1e-2


def hand_trace(model: Any, layer: int, hidden: Tensor, position: Tensor) -> AttentionTrace:
    """Rotated queries, keys and values of one Llama layer, from its own projections."""
    attention, norm = model.model.layers[layer].self_attn, model.model.layers[layer].input_layernorm
    x = norm(hidden)
    cos, sin = (t[:, None] for t in rotary(model.model, hidden, position, layer))

    def heads(projection: Any) -> Tensor:
        return projection(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def turn(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin

    return AttentionTrace(
        turn(heads(attention.q_proj)), turn(heads(attention.k_proj)), heads(attention.v_proj), attention.scaling
    )


@pytest.mark.parametrize("name", REDUCERS)
def test_the_host_shows_the_reducer_what_the_layers_below_computed(name: str) -> None:
    reducer = REDUCERS[name]
    model = build("llama", dtype=torch.float64)
    ids, mask, position = pad(rows_of(), "left")
    with torch.no_grad():
        with reduce(model, reducer, layer=2, sinks=3, recent=5) as run:
            model(ids, attention_mask=mask, position_ids=position)
        hidden = model(ids, attention_mask=mask, position_ids=position, output_hidden_states=True).hidden_states
        valid = mask.bool()
        rank = valid.long().cumsum(-1)
        protected = valid & ((rank <= 3) | (rank > rank[:, -1:] - 5))
        traces = [hand_trace(model, i, hidden[i], position) for i in range(2 - reducer.needs.layers, 2)]
        view = TokenView(
            hidden=hidden[2],
            valid=valid,
            protected=protected,
            position=position,
            length=valid.sum(-1),
            evidence=Evidence(attention=traces),
        )
        plan = reducer.plan(view)
    assert torch.equal(run.protected, protected)
    run.plans[0].check(view)
    assert len(run.plans) == 1
    for field in ("slot", "position", "size", "valid"):
        assert torch.equal(getattr(run.plans[0], field), getattr(plan, field)), field
    close(run.plans[0].weight, plan.weight)


@pytest.mark.parametrize("wide", [False, True])
def test_windows_count_original_positions(wide: bool) -> None:
    """A slot further back than the window is out of sight, however few slots lie between."""
    model = build("mistral", dtype=torch.float64, sliding_window=500 if wide else WINDOW)
    ids = tokens(1, 40)
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 90 + 3
    reducer = qm.Uniform(keep=0.3)
    with torch.no_grad(), reduce(model, reducer, layer=3, sinks=4, recent=2):
        # Three layers of window 9 and one more above the merge reach back 4 * 8 = 32 positions from the last token.
        a, b = model(ids).logits, model(changed).logits
    assert a.shape[1] == 12
    assert bool((a[:, -1] != b[:, -1]).any()) == wide


def test_schedules_are_taken_as_they_are() -> None:
    model = build("llama")
    ids = tokens(1, 60)
    schedule = Schedule((1, 3), decay=0.5)
    with torch.no_grad(), reduce(model, qm.Uniform(keep=0.5), layer=schedule, recent=5) as run:
        model(ids)
    # 2 blocks at k and 1 at k / 2 are 3 blocks at 0.5 when k = 0.6.
    assert run.stages == pytest.approx({1: 0.6, 3: 0.3})
    assert run.summary().tokens_per_layer == [60, 36, 36, 18]


# keep = 1 and padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reducer", [qm.QuickMerge(keep=1.0), qm.ToMe(keep=1.0)], ids=["quickmerge", "tome"])
def test_keep_one_is_the_model_even_where_every_row_is_padded(side: str, reducer: Any) -> None:
    """Padding to a multiple leaves columns that no row uses; they are not tokens to drop."""
    model = build("llama")
    ids, mask, position = pad(rows_of(), side)
    gap = torch.zeros(3, 3, dtype=torch.long)
    order = (lambda t: [gap, t]) if side == "left" else (lambda t: [t, gap])
    ids, mask, position = (torch.cat(order(t), 1) for t in (ids, mask, position))
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, position_ids=position).logits
        with reduce(model, reducer, layer=2):
            kept = model(ids, attention_mask=mask, position_ids=position).logits
    assert kept.shape == plain.shape
    assert torch.equal(kept[mask.bool()], plain[mask.bool()])


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("name", ["quickmerge", "tome", "random"])
def test_padding_changes_nothing(name: str, extra: int) -> None:
    model = build("llama", dtype=torch.float64)
    row = tokens(1, 33)[0]
    ids = torch.cat([torch.zeros(extra, dtype=torch.long), row])[None]
    mask = (torch.arange(33 + extra) >= extra).long()[None]
    with torch.no_grad(), reduce(model, REDUCERS[name], layer=2, recent=5):
        alone = generate(model, row[None], 6)
        padded = generate(model, ids, 6, attention_mask=mask)
    assert torch.equal(alone.sequences[0, 33:], padded.sequences[0, 33 + extra :])
    for a, b in zip(alone.logits, padded.logits, strict=True):
        close(a, b)


def test_ragged_budgets_in_a_batch_equal_single_rows() -> None:
    model = build("llama", dtype=torch.float64)
    reducer = qm.QuickMerge(keep=qm.Entropy(scale=0.7), pool=1)
    rows = rows_of((40, 40, 40))
    rows[1] = torch.cat([rows[1][:5], torch.full((30,), 11), rows[1][5:10]])
    with torch.no_grad(), reduce(model, reducer, layer=2, recent=5) as run:
        batch = generate(model, torch.stack(rows), 5)
        assert not bool(run.plan.valid.all()), "the budget gave every row the same count: the test has no bite"
        for i, row in enumerate(rows):
            alone = generate(model, row[None], 5)
            assert torch.equal(alone.sequences[0], batch.sequences[i])
            for a, b in zip(alone.logits, batch.logits, strict=True):
                close(a[0], b[i])


# Generation --------------------------------------------------------------------------------------------------------


def test_cached_generation_equals_reading_on_by_hand() -> None:
    """Greedy tokens one by one against argmax over the written-out computation; positions go on at N."""
    model = build("llama", dtype=torch.float64)
    ids = tokens(1, 40)
    with torch.no_grad():
        with reduce(model, REDUCERS["quickmerge"], layer=2, recent=5) as run:
            out = generate(model, ids, 6)
            merges = merges_of(run)
        written = out.sequences[:, 40:]
        wanted = by_hand(model, ids, merges, extra=written[:, :-1])[:, run.plan.slots - 1 :]
        assert stored(held(out)) == [45, 45, 25, 25]
        # `generate` hands its logits out in float32.
        close(torch.stack(out.logits, 1).double(), wanted, 2e-6)
        scores = wanted.clone()
        scores[..., EOS] = -torch.inf  # min_new_tokens forbids it
        assert torch.equal(scores.argmax(-1), written)


def test_a_second_turn_reads_on_after_the_first() -> None:
    model = build("llama", dtype=torch.float64)
    ids, turn = tokens(1, 40), tokens(1, 7, 4)
    with torch.no_grad():
        with reduce(model, REDUCERS["quickmerge"], layer=2, recent=5) as run:
            first = generate(model, ids, 4)
            talk = torch.cat([first.sequences, turn], 1)
            second = generate(model, talk, 3, **past(held(first)))
            merges = merges_of(run)
        assert len(merges) == 1 and merges[2].slot.shape[1] == 40, "only the first prompt is merged"
        extra = second.sequences[:, 40:-1]
        wanted = by_hand(model, ids, merges, extra=extra)[:, -3:]
    close(torch.stack(second.logits, 1).double(), wanted, 2e-6)


def test_sampling_with_a_seed_repeats_itself() -> None:
    model = build("llama")
    ids = tokens(2, 40)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad(), reduce(model, REDUCERS["quickmerge"], layer=2):
            return generate(model, ids, 8, do_sample=True, num_return_sequences=2).sequences

    one, two, other = draw(1), draw(1), draw(2)
    assert one.shape == (4, 48) and torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("name", ["quickmerge", "tome"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_beams_of_a_batch_equal_beams_of_its_rows(family: str, name: str) -> None:
    model = build(family, dtype=torch.float64)
    rows = rows_of()
    ids, mask, _ = pad(rows, "left")
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    with torch.no_grad(), reduce(model, REDUCERS[name], layer=2, recent=5):
        batch = generate(model, ids, 6, attention_mask=mask, **beams)
        greedy = generate(model, ids, 6, attention_mask=mask)
        for i, row in enumerate(rows):
            alone = generate(model, row[None], 6, **beams)
            pair = slice(2 * i, 2 * i + 2)
            assert torch.equal(batch.sequences[pair, ids.shape[1] :], alone.sequences[:, len(row) :])
            close(batch.sequences_scores[pair], alone.sequences_scores, 1e-6)
    assert not torch.equal(batch.sequences[::2], greedy.sequences), "beams never left the greedy path"


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompt_lookup_writes_what_greedy_writes_or_is_refused(family: str) -> None:
    """Drafts are read together with the prompt and rejected ones are cropped; neither may show in the output."""
    model = build(family, dtype=torch.float64)
    phrase = tokens(1, 6, 3)
    ids = torch.cat([phrase, tokens(1, 20, 4), phrase, tokens(1, 9, 5), phrase[:, :3]], 1)
    with torch.no_grad(), reduce(model, REDUCERS["quickmerge"], layer=2, recent=8):
        greedy = generate(model, ids, 16).sequences
        try:
            drafted = generate(model, ids, 16, prompt_lookup_num_tokens=3).sequences
        except QuickmergeError:
            return
    assert torch.equal(drafted, greedy)


def test_cropping_a_merged_cache_takes_back_the_last_tokens() -> None:
    model = build("llama", dtype=torch.float64)
    ids, wrong, right = tokens(1, 40), tokens(1, 4, 5), tokens(1, 3, 6)
    with torch.no_grad(), reduce(model, REDUCERS["tome"], layer=2):
        cache = held(model(ids))
        model(wrong, **past(cache))
        cache.crop(-4)
        after = model(right, **past(cache)).logits
        clean = held(model(ids))
        close(after, model(right, **past(clean)).logits)


def test_generation_without_a_cache_merges_the_whole_text_each_step() -> None:
    model = build("llama")
    ids = tokens(1, 40)
    with torch.no_grad(), reduce(model, REDUCERS["quickmerge"], layer=2) as run:
        out = generate(model, ids, 3, use_cache=False)
    assert out.sequences.shape == (1, 43)
    assert run.summary().tokens_in == 42 and run.summary().tokens_per_layer[-1] == 21


# What stays alone --------------------------------------------------------------------------------------------------


def alone(run: Any) -> Tensor:
    """``(B, N)``: tokens whose slot has one member."""
    slot = run.plan.slot
    crowd = torch.zeros(len(slot), run.plan.slots).scatter_add(1, slot.clamp_min(0), (slot >= 0).float())
    return (slot >= 0) & (crowd.gather(1, slot.clamp_min(0)) == 1)


@pytest.mark.parametrize("name", REDUCERS)
def test_protected_tokens_stay_alone(name: str) -> None:
    model = build("llama")
    rows = rows_of()
    ids, mask, position = pad(rows, "left")
    ids[0, 15], ids[0, 20], ids[2, 18] = BOS, EOS, EOS
    marked = torch.zeros_like(ids, dtype=torch.bool)
    marked[:, [14, 22, 23]] = True
    asked: list[Tensor] = []

    def protect(given: Tensor) -> Tensor:
        asked.append(given)
        return marked

    with torch.no_grad(), reduce(model, REDUCERS[name], layer=2, sinks=3, recent=4, protect=protect) as run:
        model(ids, attention_mask=mask, position_ids=position)
    assert len(asked) == 1 and torch.equal(asked[0], ids)
    wanted = marked | (ids == BOS) | (ids == EOS)
    for i, row in enumerate(rows):
        first = ids.shape[1] - len(row)
        wanted[i, first : first + 3] = True
        wanted[i, -4:] = True
    wanted &= mask.bool()
    assert torch.equal(run.protected, wanted)
    assert bool(alone(run)[wanted].all())
    assert run.plan.slots < ids.shape[1]
    # The last column of the output belongs to the last prompt token.
    assert bool((run.plan.slot[:, -1] == run.plan.slots - 1).all())
    assert torch.equal(run.plan.position[:, -1], position[:, -1])


def test_several_eos_ids_are_all_protected() -> None:
    model = build("llama", eos_token_id=[EOS, 50])
    ids = tokens(1, 40)
    ids[ids == 50] = 51
    ids[0, 12], ids[0, 17] = 50, EOS
    with torch.no_grad(), reduce(model, qm.Uniform(keep=0.2), layer=2, sinks=0, recent=1) as run:
        model(ids)
    assert run.protected[0].nonzero().flatten().tolist() == [12, 17, 39]


def test_no_special_ids_protect_nothing() -> None:
    model = build("qwen3", bos_token_id=None, eos_token_id=None)
    with torch.no_grad(), reduce(model, qm.Uniform(keep=0.2), layer=2, sinks=0, recent=1) as run:
        model(tokens(1, 40))
    assert run.protected[0].nonzero().flatten().tolist() == [39]


# What is refused ---------------------------------------------------------------------------------------------------


def test_prompts_of_protected_tokens_alone_are_read_in_full(untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    with torch.no_grad():
        plain = model(tokens(1, 20)).logits
        with reduce(model, qm.Uniform(keep=0.5), layer=2) as run:
            assert torch.equal(model(tokens(1, 20)).logits, plain)
            assert "not reduced: 1 of 1 rows of protected tokens alone" in str(run.summary())
            assert model(tokens(1, 21)).logits.shape[1] == 20
            assert "not reduced" not in str(run.summary())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1] * 10 + [0] + [1] * 29, "holes"),
        ([0] * 5 + [1] * 30 + [0] * 5, "holes"),
        ([1] * 5 + [0] * 30 + [1] * 5, "holes"),
        ([0] * 40, "leave tokens in every row"),
        ([1] * 39, r"must be \(1, 40\), got \(1, 39\)"),
    ],
)
def test_masks_that_make_no_sense_are_named(mask: list[int], message: str, untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    with (
        reduce(model, qm.Uniform(keep=0.5), layer=2),
        pytest.raises(QuickmergeError, match=f"attention_mask .*{message}"),
    ):
        model(tokens(1, 40), attention_mask=torch.tensor([mask]))


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 40, 40), {"full_attention": None}], ids=["4-D", "dict"])
def test_other_kinds_of_masks_are_refused(mask: Any, untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    with reduce(model, qm.Uniform(keep=0.5), layer=2), pytest.raises(QuickmergeError, match="2-D padding mask"):
        model(tokens(1, 40), attention_mask=mask)


def test_boolean_masks_serve_like_integer_ones() -> None:
    model = build("llama")
    ids, mask, position = pad(rows_of(), "left")
    with torch.no_grad(), reduce(model, REDUCERS["quickmerge"], layer=2):
        a = model(ids, attention_mask=mask, position_ids=position).logits
        b = model(ids, attention_mask=mask.bool(), position_ids=position).logits
    assert torch.equal(a, b)


def test_caches_from_elsewhere_are_refused(untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    ids = tokens(1, 40)
    outside = held(model(ids))
    first = reduce(model, qm.Uniform(keep=0.5), layer=2)
    with first:
        with pytest.raises(QuickmergeError, match="was filled outside this run"):
            model(tokens(1, 1), **past(outside))
        merged = held(model(ids))
        with pytest.raises(QuickmergeError, match="holds 1 rows that were merged here, got 2 rows"):
            model(tokens(2, 1), **past(merged))
        with pytest.raises(QuickmergeError, match="must be a DynamicCache"):
            model(ids, **past(StaticCache(config=model.config, max_cache_len=64)))
        with pytest.raises(QuickmergeError, match="must be a DynamicCache"):
            generate(model, ids, 2, cache_implementation="static")


def test_an_empty_cache_serves() -> None:
    model = build("llama")
    with torch.no_grad(), reduce(model, qm.Uniform(keep=0.5), layer=2):
        out = model(tokens(1, 40), **past(DynamicCache(config=model.config)))
    assert stored(held(out)) == [40, 40, 20, 20]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 0}, r"layer must be rising whole numbers of at least 1, got \[0\]"),
        ({"layer": 4}, r"layer must lie in 1\.\.3 for a model of 4 blocks, got 4"),
        ({"layer": [3, 2]}, "layer must be rising"),
        ({"layer": []}, "layer must be rising"),
        ({"layer": 1.5}, "layer must be rising whole numbers"),
        ({"layer": Schedule((2, 9))}, r"layer must lie in 1\.\.3"),
        ({"mode": "online"}, "mode must be one of prefix, block_causal, or Prefix"),
        ({"sinks": -1}, "sinks must be a whole number of at least 0, got -1"),
        ({"sinks": True}, "sinks must be a whole number"),
        ({"recent": 0}, "recent must be a whole number of at least 1, got 0"),
        ({"recent": 2.0}, "recent must be a whole number"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str, untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    with pytest.raises(ValueError, match=message):
        reduce(model, qm.Uniform(keep=0.5), **settings)


@pytest.mark.parametrize("reducer", ["quickmerge", qm.QuickMerge, 0.5, None])
def test_what_is_no_reducer_is_named(reducer: Any) -> None:
    with pytest.raises(ValueError, match="reducer must be a quickmerge reducer such as"):
        reduce(build("llama"), reducer)


def test_a_count_rules_the_first_of_several_merges() -> None:
    model = build("llama")
    schedule = Schedule((1, 3), 0.5)
    with torch.no_grad(), reduce(model, qm.Uniform(keep=qm.Count(30)), layer=schedule, recent=5) as run:
        model(tokens(1, 60))
    assert run.summary().tokens_per_layer == [60, 30, 30, 15]


@pytest.mark.parametrize(("layers", "slots"), [((1, 2), 18), ((1, 3), 40), ((2, 3), 40)])
def test_the_main_plan_is_of_the_longest_stretch_of_blocks(layers: tuple[int, int], slots: int) -> None:
    """The first of several that are equally long."""
    model = build("llama")
    reducer = qm.Uniform(keep=qm.Count(40))
    with torch.no_grad(), reduce(model, reducer, layer=Schedule(layers, 0.45), recent=5) as run:
        assert run.main_plan is None and run.plan is None
        model(tokens(1, 60))
        assert run.main_plan.slots == slots and run.plan.slots == 18
        assert int(run.main_plan.slot.max()) < slots and run.main_plan.slot.shape == (1, 60)


@pytest.mark.parametrize(
    "answer", [torch.ones(1, 39, dtype=torch.bool), torch.ones(1, 40, dtype=torch.long)], ids=["shape", "type"]
)
def test_protect_must_answer_with_a_mask(answer: Tensor) -> None:
    model = build("llama")
    with (
        reduce(model, qm.Uniform(keep=0.5), layer=2, protect=lambda ids: answer),
        pytest.raises(QuickmergeError, match=r"protect must return a bool mask of shape \(1, 40\)"),
    ):
        model(tokens(1, 40))


# Embeddings, gradients, half precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ZOO)
def test_embeddings_for_ids(family: str) -> None:
    model = build(family)
    ids = tokens(2, 40)
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad(), reduce(model, REDUCERS["quickmerge"], layer=2, recent=5):
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
        by_ids = generate(model, ids, 4).sequences[:, 40:]
        by_embeds = model.generate(inputs_embeds=embeds, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(by_embeds, by_ids)


def test_embeddings_cannot_be_protected_by_id() -> None:
    model = build("llama")
    embeds = model.get_input_embeddings()(tokens(1, 40)).detach()
    with (
        reduce(model, qm.Uniform(keep=0.5), layer=2, protect=lambda ids: ids == 5),
        pytest.raises(QuickmergeError, match="protect needs input_ids"),
    ):
        model(inputs_embeds=embeds)


def gradients(model: Any, ids: Tensor, reducer: Any, checkpointing: bool, **settings: Any) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if checkpointing:
        getattr(model, f"{switch}_checkpointing_enable")()
    try:
        with reduce(model, reducer, **settings):
            logits = model(ids, use_cache=False).logits
            logits[:, -5:].logsumexp(-1).mean().backward()
    finally:
        if checkpointing:
            getattr(model, f"{switch}_checkpointing_disable")()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("name", ["quickmerge", "tome"])
def test_gradients_flow_through_a_merge(family: str, name: str) -> None:
    model = build(family, dtype=torch.float64)
    ids = tokens(2, 40)
    found = gradients(model, ids, REDUCERS[name], False, layer=2, recent=5)
    assert set(found) == {n for n, _ in model.named_parameters()}
    assert all(bool(g.isfinite().all()) for g in found.values())
    below = [n for n in found if ".layers.0." in n and n.endswith("weight")]
    assert below and all(bool((found[n] != 0).any()) for n in below)
    embedding = next(g for n, g in found.items() if "embed" in n)
    assert bool((embedding[ids[0, 10:30]] != 0).any(-1).all()), "merged tokens got no gradient"


def test_the_gradient_is_the_slope() -> None:
    """Against a finite difference along a random direction of one weight matrix below the merge."""
    model = build("llama", dtype=torch.float64)
    ids = tokens(1, 40)
    reducer = qm.ToMe(keep=0.5)
    settings: dict[str, Any] = {"layer": 2, "recent": 5}
    # mlp of block 1: the keys that ToMe compares come before it, so the plan stays the same.
    weight = model.model.layers[1].mlp.down_proj.weight
    found = gradients(model, ids, reducer, False, **settings)["model.layers.1.mlp.down_proj.weight"]
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    with torch.no_grad():
        for step in (1e-3, -1e-3):
            weight += step * direction
            with reduce(model, reducer, **settings):
                values.append(model(ids, use_cache=False).logits[:, -5:].logsumexp(-1).mean().item())
            weight -= step * direction
    slope = (values[0] - values[1]) / 2e-3
    assert (found * direction).sum().item() == pytest.approx(slope, rel=1e-2) and abs(slope) > 1e-3


@pytest.mark.parametrize("name", ["quickmerge", "tome"])
def test_gradient_checkpointing_changes_no_gradient_or_is_refused(name: str) -> None:
    model = build("llama", dtype=torch.float64)
    ids = tokens(2, 40)
    plain = gradients(model, ids, REDUCERS[name], False, layer=2, recent=5)
    try:
        saved = gradients(model, ids, REDUCERS[name], True, layer=2, recent=5)
    except QuickmergeError:
        return
    assert set(saved) == set(plain)
    for key, value in plain.items():
        close(saved[key], value, 1e-9)


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_stays_near(family: str, dtype: torch.dtype) -> None:
    ids, mask, _ = pad(rows_of(), "left")
    model = build(family, dtype=dtype)
    with torch.no_grad():
        plain = generate(model, ids, 2, attention_mask=mask)
        for reducer in (qm.QuickMerge(keep=1.0), qm.ToMe(keep=1.0)):
            with reduce(model, reducer, layer=2):
                same = generate(model, ids, 2, attention_mask=mask)
            assert all(torch.equal(a, b) for a, b in zip(plain.logits, same.logits, strict=True))
        for reducer in (REDUCERS["quickmerge"], REDUCERS["tome"]):
            with reduce(model, reducer, layer=2, recent=5) as run:
                position = (mask.cumsum(-1) - 1).clamp_min(0)
                out = model(ids, attention_mask=mask, position_ids=position)
                merges = merges_of(run)
                generate(model, ids, 2, attention_mask=mask)
            assert out.logits.dtype == dtype and held(out).layers[-1].keys.dtype == dtype
            wide = model.double()
            wanted = by_hand(wide, ids, merges, valid=mask, proportional=reducer.proportional)
            model = build(family, dtype=dtype)
            ok = merges[2].valid
            error = (out.logits.double() - wanted)[ok].abs().mean() / wanted[ok].abs().mean()
            assert error < (0.1 if dtype == torch.bfloat16 else 0.02), error


def test_the_reducer_given_is_not_changed() -> None:
    reducer = qm.QuickMerge(keep=0.5)
    model = build("llama")
    with torch.no_grad(), reduce(model, reducer, layer=[1, 3]) as run:
        model(tokens(1, 40))
    assert reducer == qm.QuickMerge(keep=0.5) and run.reducer is reducer


@pytest.mark.parametrize("way", ["argument", "config", "model"])
def test_a_prompt_in_prefill_chunks_is_refused_by_the_name_of_the_argument(way: str) -> None:
    """The first chunk alone would be merged, and nothing in a forward says that more of the prompt will come."""
    model = build("llama")
    told: dict[str, Any] = {"prefill_chunk_size": 40} if way == "argument" else {}
    if way == "config":
        told["generation_config"] = GenerationConfig(max_new_tokens=2, prefill_chunk_size=40)
    if way == "model":
        model.generation_config.prefill_chunk_size = 40
    with (
        reduce(model, REDUCERS["quickmerge"], layer=2),
        pytest.raises(QuickmergeError, match=r"prefill_chunk_size must be left out inside a quickmerge run.* got 40"),
    ):
        model.generate(tokens(1, 64), **told)


def test_caches_are_told_apart() -> None:
    """Two prompts read before either is continued."""
    model = build("llama", dtype=torch.float64)
    a, b, more = tokens(1, 40, 1), tokens(1, 50, 2), tokens(1, 2, 3)
    with torch.no_grad(), reduce(model, REDUCERS["tome"], layer=2):
        caches: list[Cache] = [held(model(ids)) for ids in (a, b)]
        mixed = [model(more, **past(cache)).logits for cache in caches]
        for ids, logits in zip((a, b), mixed, strict=True):
            cache = held(model(ids))
            assert torch.equal(model(more, **past(cache)).logits, logits)


def test_under_autocast_the_reducer_computes_as_ever(untouched: Any) -> None:
    """Blocks compute in bfloat16, and the attention statistics of the merge still in float32."""
    model = untouched(build("llama"))
    ids = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    dtypes = []

    class Looks(qm.QuickMerge):
        def saliency(self, view: Any) -> Tensor:
            found = super().saliency(view)
            dtypes.append(found.dtype)
            return found

    run = reduce(model, Looks(keep=0.5), 2)
    with torch.no_grad(), run, torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids, logits_to_keep=1)
    assert dtypes == [torch.float32]
    run = reduce(model, qm.QuickMerge(keep=0.5), 1, mode="block_causal", chunk=8, window=4)
    with torch.no_grad(), run, torch.autocast("cpu", dtype=torch.bfloat16):
        assert bool(model(ids).logits.isfinite().all())
