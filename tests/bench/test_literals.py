"""Literals kept: what is asked, and that an answer counts if greedy decoding would write it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts_zoo import build, tokens
from tokenizer_samples import byte_level, sentencepiece_bpe

import quickmerge as qm
from quickmerge.bench.literals import LEAD, LONGEST, MARGIN, Probe, kept, literal_share, probes, repeats, survives
from quickmerge.bench.quality import document_nll
from quickmerge.datasets.text import Document
from quickmerge.models.compat import cache_name, returned_cache
from quickmerge.models.literals import literal_tokens
from quickmerge.models.spans import pieces_of

TEXT = (
    "The cat 12,345 sat on /etc/passwd and the dog mailed a.b@c.org in 2024. Then 777 cats read max_size tokens. " * 3
)


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe])
def test_a_probe_begins_the_text_of_a_literal_again(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer(TEXT + "the end " * 20, add_special_tokens=False)["input_ids"]
    context = torch.tensor([ids])
    found = probes(tokenizer, context, most=4, seed=1)
    assert 0 < len(found) <= 4 and found == probes(tokenizer, context, most=4, seed=1)
    assert any(probes(tokenizer, context, most=2, seed=s) != probes(tokenizer, context, most=2) for s in range(1, 9))
    owners = literal_tokens(pieces_of(ids, tokenizer))
    assert literal_share(tokenizer, context) == sum(o >= 0 for o in owners) / len(ids)
    cue = tokenizer("\n…", add_special_tokens=False)["input_ids"]
    for probe in found:
        lead = list(probe.lead[len(cue) :])
        both = lead + list(probe.answer)
        assert list(probe.lead[: len(cue)]) == cue and len(both) == LEAD + LONGEST
        at = next(i for i in range(len(ids)) if ids[i : i + len(both)] == both)
        whole = range(at + len(lead), at + len(both))
        assert len({owners[i] for i in whole}) == 1 and owners[whole[0]] >= 0, "not one literal, whole"
        assert owners[whole[0] - 1] != owners[whole[0]] != owners[whole[-1] + 1]
        assert whole[-1] < len(ids) - MARGIN
    assert len({probe.answer for probe in found}) == len(found)
    assert probes(tokenizer, torch.tensor([tokenizer("the cat sat")["input_ids"]])) == []


@pytest.mark.parametrize("way", [None, "prefix", "block_causal", "cache"])
def test_what_counts_is_what_greedy_decoding_writes(way: str | None) -> None:
    """Of probes whose answers are what ``generate`` writes, and the same with one token changed."""
    model, context = build("llama", dtype=torch.float64), tokens(1, 60)

    def run() -> Any:
        if way is None:
            return torch.no_grad()
        if way == "cache":
            return qm.reduce(model, qm.SnapKV(keep=0.4, min_tokens=0, window=8))
        short: dict[str, Any] = {"min_tokens": 0} if way == "prefix" else {"mode": way, "chunk": 16, "window": 8}
        return qm.reduce(model, qm.QuickMerge(keep=0.4), **short)

    asked, wanted = [], []
    for seed in range(3):
        lead = tokens(1, 5, seed=seed + 7)
        with torch.no_grad(), run():
            out = model(context, use_cache=True)
            ids, cache, answer = lead, returned_cache(out), []
            for _ in range(4):
                logits = model(ids, use_cache=True, **_past(cache)).logits
                ids = logits[:, -1:].argmax(-1)
                answer.append(int(ids))
        asked += [
            Probe(tuple(lead[0].tolist()), tuple(answer)),
            Probe(tuple(lead[0].tolist()), (*answer[:-1], (answer[-1] + 1) % 90 + 3)),
        ]
        wanted += [True, asked[-1].answer[-1] == answer[-1]]
    assert repeats(model, context, asked, run()) == wanted
    document = Document("d", context, tokens(1, 9, seed=5))
    nll, still = survives(model, document, asked, run())
    assert still == wanted and torch.allclose(nll, document_nll(model, document, run()))


def _past(cache: Any) -> dict[str, Any]:

    return {cache_name(): cache}


def test_rows_are_shares_of_what_the_plain_model_repeats() -> None:
    records = [
        {"literals_kept": 3, "literals_known": 4, "literals_asked": 8},
        {"literals_kept": 0, "literals_known": 0, "literals_asked": 8},
        {"literals_kept": 1, "literals_known": 4, "literals_asked": 8},
    ]
    row = kept(records)
    assert row["literals_kept"] == 0.5 and (row["literals_known"], row["literals_asked"]) == (8, 24)
    assert row["literals_kept_low"] <= 0.5 <= row["literals_kept_high"]
    assert kept([{"nll": 1.0}]) == {}
    assert kept([records[1]])["literals_kept"] is None
