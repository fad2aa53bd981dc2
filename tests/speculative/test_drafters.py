"""Texts written with and without a drafter, and the rows that are made of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from quickmerge.bench.harness import Arm
from quickmerge.datasets.prompts import Prompt
from quickmerge.errors import QuickmergeError
from quickmerge.speculative import PromptLookup
from quickmerge.speculative.bench import (
    PLAIN,
    TRANSFORMERS_LOOKUP,
    bench_drafters,
    draft_arm,
    draft_records,
    draft_rows,
    prepare,
    prompt_ids,
    write,
)
from quickmerge.speculative.gumiho import Gumiho

PROMPTS = [Prompt("the sea the sea the", "a"), Prompt("sea sea the sea", "b"), Prompt("the the the sea", "a")]


@pytest.fixture
def model(tiny_llama) -> Any:
    return tiny_llama.double()


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def arms(model) -> list[Arm]:
    torch.manual_seed(0)
    heads = Gumiho.new(model, serial_layers=1, heads=2, mlp_depth=2)
    return [draft_arm("lookup", PromptLookup()), draft_arm("heads", heads, tree=6), TRANSFORMERS_LOOKUP]


def test_every_way_writes_the_model_s_own_text_and_passes_are_counted_alike(model, tokenizer, arms) -> None:
    for prompt in PROMPTS:
        ids = prompt_ids(model, tokenizer, "", prompt.text, 24)
        plain = write(model, tokenizer, ids, max_new_tokens=24)
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert plain.ids.tolist() == wanted[0, ids.shape[1] :].tolist()
        assert plain.passes == plain.tokens and plain.tokens_per_pass == 1 and plain.drafted is None
        for arm in arms:
            found = write(model, tokenizer, ids, arm, max_new_tokens=24)
            assert found.ids.tolist() == plain.ids.tolist(), arm.name
            assert found.seconds > 0 and found.passes <= plain.passes
            if found.drafted is not None:
                assert found.passes == found.drafted.passes + 1, "the hook counts what the engine counts"
                assert found.tokens_per_pass == pytest.approx(found.drafted.tokens_per_pass)


def test_sampling_is_seeded_and_takes_the_given_temperature(model, tokenizer, arms) -> None:
    ids = prompt_ids(model, tokenizer, "", "the sea", 16)
    for arm in (PLAIN, *arms):
        settings = {"max_new_tokens": 16, "sample": True, "seed": 5}
        once, again = (write(model, tokenizer, ids, arm, temperature=1.0, **settings).ids.tolist() for _ in range(2))
        assert once == again
        cold = write(model, tokenizer, ids, arm, temperature=1e-4, **settings).ids.tolist()
        assert cold == write(model, tokenizer, ids, max_new_tokens=16).ids.tolist() and cold != once


def test_what_is_done_once_is_in_no_count(model, tokenizer) -> None:
    arm = draft_arm("lookup", PromptLookup())
    assert prepare(model, arm) > 0 and prepare(model, PLAIN) == 0
    ids = prompt_ids(model, tokenizer, "", "the sea", 4)
    assert write(model, tokenizer, ids, arm, max_new_tokens=4).passes <= 4
    with pytest.raises(ValueError, match="tree must be a whole number of at least 1, got 0"):
        draft_arm("none", PromptLookup(), tree=0)
    with pytest.raises(QuickmergeError, match="must fit the model's 128 positions, got 2 and 127 tokens"):
        prompt_ids(model, tokenizer, "", "the sea", 127)


def test_methods_take_turns_and_their_order_turns(model, tokenizer, arms) -> None:
    told: list[str] = []
    found = bench_drafters(model, tokenizer, PROMPTS, arms, max_new_tokens=6, advance=told.append)
    rows, records = found.rows, found.records
    names = ["plain", *(arm.name for arm in arms)]
    assert [label.split(": ")[1] for label in told] == [
        names[(turn + number) % 4] for number in range(3) for turn in range(4)
    ]
    assert [r["method"] for r in records] == names * 3 and [r["method"] for r in rows] == names
    assert [row["same"] for row in rows] == [3, 3, 3, 3]
    with pytest.raises(QuickmergeError, match="at least one, got none"):
        bench_drafters(model, tokenizer, [], arms)


def test_other_text_is_counted_as_other(model, tokenizer) -> None:
    """An arm whose settings change the text is found out."""
    odd = Arm("odd", settings={"repetition_penalty": 3.0})
    record = draft_records(model, tokenizer, PROMPTS[0], [odd], 0, max_new_tokens=20)[1]
    assert record["method"] == "odd" and record["same"] is False
    assert draft_rows(draft_records(model, tokenizer, PROMPTS[0], [odd], 0, max_new_tokens=20))[1]["same"] == 0


def record(method: str, prompt: int, tokens: int, passes: int, seconds: float, **more: Any) -> dict[str, Any]:
    usual = {"tree": None, "same": True, "temperature": 0.0, "kind": "ab"[prompt % 2]}
    counts = {"tokens": tokens, "passes": passes, "seconds": seconds}
    return {**usual, "prompt": prompt, "method": method, **counts, **more}


def test_rows_are_these_sums_and_medians() -> None:
    engine = {"draft_seconds": 0.5, "target_seconds": 1.0, "nodes": 12, "lossless": True, "tree": "auto"}
    records = [
        record("plain", 0, 11, 11, 2.0), record("plain", 1, 21, 21, 5.0), record("plain", 2, 5, 5, 1.0),
        record("x", 0, 11, 6, 1.0, accepted=[4, 1], **engine), record("x", 1, 21, 11, 5.0, accepted=[9], **engine),
        record("x", 2, 5, 3, 2.0, accepted=[], same=False, **engine),
    ]  # fmt: skip
    plain, x = draft_rows(records)
    assert (
        plain["tokens_per_pass"] == 1 == plain["speedup"]
        and plain["tokens_per_second"] == 37 / 8
        and "nodes" not in plain
    )
    # (10 + 20 + 4) tokens behind the first over (5 + 10 + 2) passes behind the prompt's
    assert x["tokens_per_pass"] == 34 / 17 and x["tokens_per_pass_low"] <= 2 <= x["tokens_per_pass_high"]
    assert x["speedup"] == 1.0 and x["same"] == 2 and x["prompts"] == 3
    assert x["draft_share"] == 1.5 / 8 and x["nodes"] == 36 / 17 and x["reached"] == [13 / 17, 1 / 17]
    assert x["kinds"]["a"] == {"prompts": 2, "tokens_per_pass": 14 / 7, "speedup": 1.25}
    assert x["kinds"]["b"] == {"prompts": 1, "tokens_per_pass": 2.0, "speedup": 1.0}


def test_a_text_of_one_token_counts_in_neither_sum() -> None:
    one = record("plain", 0, 1, 1, 0.1), record("x", 0, 1, 1, 0.1)
    assert draft_rows(one)[1]["tokens_per_pass"] == 1.0
    more = *one, record("plain", 1, 9, 9, 1.0), record("x", 1, 9, 5, 1.0)
    row = draft_rows(more)[1]
    assert row["tokens_per_pass"] == 2.0 and not math.isnan(row["tokens_per_pass_low"])
