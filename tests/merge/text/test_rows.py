"""A batch equals its rows, short ones included; and what a row must not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import held, past
from hosts_zoo import BOS, build, generate, pad, reduce, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.text.rows import check_one_text, plan_rows
from quickmerge.merge.tokens import Evidence, MergePlan, TokenView

REDUCERS: dict[str, Any] = {
    "quickmerge": qm.QuickMerge(keep=0.5, layers=2, window=16, pool=3),
    "tome": qm.ToMe(keep=0.4),
    "entropy": qm.QuickMerge(keep=qm.Entropy(scale=0.5), pool=1),
}
MODELS: dict[str, Any] = {}


def model_of(family: str) -> Any:
    return MODELS.setdefault(family, build(family, dtype=torch.float64))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# Short rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "quickmerge"), ("llama", "tome"), ("gemma3_text", "entropy"), ("mistral", "tome")],
)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    least=st.sampled_from([0, 10, 40]),
    side=st.sampled_from(["left", "right"]),
)
@settings(max_examples=6, deadline=None)
def test_a_batch_equals_its_rows(family: str, name: str, lengths: list[int], least: int, side: str) -> None:
    """Whatever their lengths: some are reduced, some below min_tokens, some of protected tokens alone."""
    model = model_of(family)
    texts = [tokens(1, n, i)[0] for i, n in enumerate(lengths)]
    ids, mask, position = pad(texts, side)
    more = tokens(len(texts), 2, 9)
    with torch.no_grad(), reduce(model, REDUCERS[name], [1, 3], sinks=2, recent=5, min_tokens=least) as run:
        out = model(ids, attention_mask=mask, position_ids=position)
        last = out.logits[:, -1] if run.plan.slots != ids.shape[1] or side == "left" else None
        counts = run.plan.valid.sum(-1)
        told = run.summary()
        behind = {
            "attention_mask": torch.cat([mask, torch.ones_like(more)], 1),
            "position_ids": mask.sum(-1, keepdim=True) + torch.arange(2),
            **past(held(out)),
        }
        if family != "llama" and not bool(mask[:, -1].all()):
            with pytest.raises(QuickmergeError, match="attention_mask must pad on the left where a model with sliding"):
                model(more, **behind)
            return
        read = model(more, **behind).logits
        short = shut = 0
        for i, text in enumerate(texts):
            single = model(text[None])
            if run.plan.valid.shape[1] == run.plan.slots and side == "left":
                close(last[i], single.logits[0, -1])
            assert int(counts[i]) == run.plan.slots
            close(read[i], model(more[i : i + 1], **past(held(single))).logits[0])
            short, shut = short + run.summary().rows_short, shut + run.summary().rows_protected
    assert (told.rows_short, told.rows_protected) == (short, shut)


@pytest.mark.parametrize("name", REDUCERS)
def test_rows_that_are_not_reduced_are_the_model_bit_for_bit(name: str) -> None:
    model = build("llama")
    ids, mask, position = pad([tokens(1, n, n)[0] for n in (30, 12, 7)], "left")
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, position_ids=position).logits
        with reduce(model, REDUCERS[name], [1, 3], sinks=2, recent=5, min_tokens=31) as run:
            found = model(ids, attention_mask=mask, position_ids=position).logits
    assert torch.equal(found, plain)
    assert "not reduced: 3 of 3 rows below min_tokens=31" in str(run.summary())
    assert run.summary().as_dict()["rows_short"] == 3


def test_a_prompt_below_256_tokens_is_read_in_full_unless_told_otherwise() -> None:
    model = build("llama")
    ids = tokens(1, 256)
    with torch.no_grad(), qm.reduce(model, qm.Uniform(keep=0.5), 2) as run:
        assert model(ids[:, :255]).logits.shape[1] == 255
        assert "not reduced: 1 of 1 rows below min_tokens=256" in str(run.summary())
        assert model(ids).logits.shape[1] == 128
        assert "not reduced" not in str(run.summary())


@pytest.mark.parametrize("length", [1, 2, 20])
def test_to_keep_all_never_raises(length: int) -> None:
    model = build("llama")
    ids = tokens(1, length)
    ids[0, 0] = BOS
    with torch.no_grad():
        plain = generate(model, ids, 3)
        with reduce(model, qm.QuickMerge(keep=1.0), 2):
            kept = generate(model, ids, 3)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))


@pytest.mark.parametrize("value", [-1, 2.0, True, None])
def test_min_tokens_is_a_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match="min_tokens must be a whole number of at least 0"):
        qm.reduce(build("llama"), qm.Uniform(keep=0.5), min_tokens=value)


def test_min_tokens_is_for_prefix_mode() -> None:
    with pytest.raises(ValueError, match="min_tokens is no setting of block_causal mode"):
        qm.reduce(build("llama"), qm.Uniform(keep=0.5), mode="block_causal", min_tokens=0)


@given(
    counts=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    chosen=st.lists(st.booleans(), min_size=4, max_size=4),
    left=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_plan_for_some_rows_is_lawful_and_leaves_the_others(
    counts: list[int], chosen: list[bool], left: bool, seed: int
) -> None:
    width = max(counts)
    index = torch.arange(width)
    valid = torch.stack([index >= width - n if left else index < n for n in counts])
    hidden = torch.randn(len(counts), width, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    view = TokenView(hidden, valid=valid, evidence=Evidence(key=hidden))
    rows = torch.tensor([i for i in range(len(counts)) if chosen[i]] or [0])
    reducer = qm.ToMe(keep=0.5)

    def added(part: TokenView, plan: MergePlan) -> dict[int, Tensor]:
        return {3: plan.merge(part.hidden) + 1}

    planned = plan_rows(view, rows, reducer.plan, added)
    plan = planned.plan
    plan.check(view)
    slots = plan.merge(hidden)
    for i, n in enumerate(counts):
        own = valid[i]
        there = plan.valid[i]
        if i in rows.tolist():
            alone = TokenView(hidden[i : i + 1, own], evidence=Evidence(key=hidden[i : i + 1, own]))
            single = reducer.plan(alone)
            close(slots[i][there], single.merge(alone.hidden)[0])
            close(planned.added[3][i][there], single.merge(alone.hidden)[0] + 1)
        else:
            assert int(there.sum()) == n
            assert torch.equal(slots[i][there], hidden[i][own])
            assert not bool(planned.added[3][i].any())


# Tokens behind a prompt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "gpt_neox"])
@pytest.mark.parametrize("name", REDUCERS)
def test_the_last_tokens_whose_logits_are_wanted_are_read_behind_the_prompt(family: str, name: str) -> None:
    """As if they had been given in a second call: assisted decoding reads its first drafts that way."""
    model = model_of(family)
    ids = tokens(2, 50)
    with torch.no_grad(), reduce(model, REDUCERS[name], [1, 3], sinks=2, recent=5) as run:
        out = model(ids, logits_to_keep=4)
        assert run.summary().tokens_in == 47 and run.plan.slot.shape[1] == 47
        first = model(ids[:, :47], logits_to_keep=1)
        second = model(ids[:, 47:], **past(held(first)))
        close(out.logits, torch.cat([first.logits, second.logits], 1))
        more = tokens(2, 3, 5)
        wanted = model(more, **past(held(second))).logits
        if family == "llama":
            model(more.flip(-1), **past(held(out)))
            held(out).crop(-3)
        close(model(more, **past(held(out))).logits, wanted)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("drafter", ["prompt lookup", "assistant", "itself", "its lower blocks"])
def test_assisted_decoding_writes_what_greedy_decoding_writes(family: str, drafter: str) -> None:
    model = model_of(family)
    phrase = tokens(1, 6, 3)
    ids = torch.cat([phrase, tokens(1, 20, 4), phrase, tokens(1, 9, 5), phrase[:, :3]], 1)
    told: dict[str, Any] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": build(family, seed=7, dtype=torch.float64)},
        "itself": {"assistant_model": model},
        "its lower blocks": {"assistant_early_exit": 2},
    }[drafter]
    with torch.no_grad(), reduce(model, REDUCERS["tome"], [1, 3], sinks=2, recent=8):
        greedy = generate(model, ids, 16).sequences
        assert torch.equal(generate(model, ids, 16, **told).sequences, greedy)


def test_a_tensor_of_wanted_logits_is_refused() -> None:
    with (
        reduce(build("llama"), qm.Uniform(keep=0.5)) as run,
        pytest.raises(QuickmergeError, match="logits_to_keep must be a number while a prompt is merged, got a tensor"),
    ):
        run.decoder.model(tokens(1, 40), logits_to_keep=torch.tensor([3]))


@pytest.mark.parametrize("length", [40, 4])
def test_labels_are_refused_whatever_the_prompt(length: int) -> None:
    model, ids = build("llama"), tokens(1, length)
    with reduce(model, qm.Uniform(keep=0.5)), pytest.raises(QuickmergeError, match="labels must be left out inside"):
        model(ids, labels=ids)


# Packed rows, padding, positions ------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "prefix": {"layer": 2}, "block_causal": {"mode": "block_causal", "chunk": 8, "window": 4}
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_several_texts_are_refused(mode: str, use_cache: bool) -> None:
    model = build("llama")
    packed = torch.cat([torch.arange(20), torch.arange(30)])[None]
    with (
        torch.no_grad(),
        reduce(model, qm.Uniform(keep=0.5), **MODES[mode]),
    ):
        with pytest.raises(QuickmergeError, match=r"position_ids must rise .*rows of several texts"):
            model(tokens(1, 50), position_ids=packed, use_cache=use_cache)
        with pytest.raises(QuickmergeError, match="cu_seq_lens_q must be left out"):
            model(tokens(1, 50), cu_seq_lens_q=torch.tensor([0, 20, 50]), use_cache=use_cache)
        model(tokens(1, 50), position_ids=torch.arange(50)[None] + 7, use_cache=use_cache)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    before=st.integers(0, 3),
    start=st.integers(0, 5),
    cached=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_one_text_passes_and_several_do_not(lengths: list[int], before: int, start: int, cached: bool) -> None:
    texts = [torch.arange(n) + start for n in lengths]
    places = torch.cat([torch.ones(before, dtype=torch.long), *texts])[None]
    valid = torch.arange(places.shape[1])[None] >= before
    inputs = {"position_ids": places, "attention_mask": valid if before else None}
    try:
        check_one_text(inputs, valid, cached)
        one = True
    except QuickmergeError:
        one = False
    assert one == (len(lengths) == 1)


def test_right_padding_is_for_scoring_and_not_for_generate() -> None:
    model = build("llama")
    ids, mask, _ = pad([tokens(1, 60)[0], tokens(1, 45)[0]], "right")
    with torch.no_grad(), reduce(model, qm.QuickMerge(keep=0.4), 2):
        with pytest.raises(QuickmergeError, match="attention_mask must pad on the left for generate"):
            generate(model, ids, 3, attention_mask=mask)
        assert model(ids, attention_mask=mask).logits.shape[1] < 60
        assert generate(model, ids, 3).sequences.shape == (2, 63)


def test_far_positions_cost_no_memory() -> None:
    """No tensor is as long as the largest position."""
    model = build("smollm3", dtype=torch.float64, no_rope_layers=[0] * 4)
    far = 2**40
    with torch.no_grad(), reduce(model, REDUCERS["tome"], 2):
        near = model(tokens(1, 40)).logits
        close(model(tokens(1, 40), position_ids=torch.arange(40)[None] + far).logits, near, 1e-9)


# Standing in front of generate --------------------------------------------------------------------------------------


def test_generate_is_the_models_own_again(untouched: Any) -> None:
    model = untouched(build("llama"))
    with reduce(model, qm.Uniform(keep=0.5)):
        assert "generate" in vars(model)
    assert "generate" not in vars(model)
    own = nn.Identity()
    model.__dict__["generate"] = own.forward
    with reduce(model, qm.Uniform(keep=0.5)):
        assert model.generate(3) == 3
    assert model.generate == own.forward
