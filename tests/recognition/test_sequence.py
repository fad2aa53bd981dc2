"""Greedy and beam search over sequences of labels, against transformers' own generation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from recognition_samples import alone, build, prefixes

from quickmerge.recognition import Guess, Recognizer, beam, greedy
from quickmerge.recognition import sequence as module
from quickmerge.recognition.sequence import beam_ids, greedy_ids

FAMILIES = ("llama", "qwen2", "gpt_neox")


@pytest.fixture(autouse=True)
def in_circles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models say one thing over and over; most tests look at what is said and not at when it is enough."""
    monkeypatch.setattr(module, "TIMES", 10**6)


def causal(family: str = "llama", seed: int = 0) -> Recognizer:
    """A recognizer whose image tokens are causal, so that transformers can generate from its prefix."""
    more = {"tie_word_embeddings": False, "initializer_range": 0.5}
    return build(family, mask="causal", seed=seed, language=more)


def generated(recognizer: Recognizer, embeds: torch.Tensor, new: int, **more: Any) -> list[list[int]]:
    out = recognizer.language.generate(
        inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=new, do_sample=False, pad_token_id=0, **more,
    ).tolist()  # fmt: skip
    ends = recognizer.labels.tokenizer.eos_token_id
    return [row[: row.index(ends) + 1] if ends in row else row for row in out]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_what_transformers_generates(family: str, seed: int) -> None:
    recognizer = causal(family, seed)
    prefix = prefixes(recognizer, 4, whole=True, seed=seed)
    found = greedy_ids(recognizer, prefix, None, 12)
    assert [[token for token, _ in row] for row in found] == generated(recognizer, prefix.embeds, 12)


@pytest.mark.parametrize("seed", range(3))
def test_beam_search_is_that_of_transformers(seed: int) -> None:
    recognizer = causal(seed=seed)
    prefix = prefixes(recognizer, 3, whole=True, seed=seed)
    found = beam_ids(recognizer, prefix, None, 3, 8)
    wanted = generated(recognizer, prefix.embeds, 8, num_beams=3)
    assert [[token for token, _ in row] for row in found] == wanted


@pytest.mark.parametrize("mask", ["independent", "causal"])
def test_tokens_have_the_probabilities_of_one_plain_sequence(mask: str) -> None:
    recognizer = build(mask=mask)
    prefix = prefixes(recognizer, 3, 5)
    for decode in (lambda: greedy_ids(recognizer, prefix, None, 7), lambda: beam_ids(recognizer, prefix, None, 2, 7)):
        for row, written in enumerate(decode()):
            ids = [token for token, _ in written]
            with torch.no_grad():
                log_p = alone(recognizer, prefix, row, ids, both_ways=mask != "causal").log_softmax(-1)
            wanted = [float(log_p[t, token]) for t, token in enumerate(ids)]
            assert [p for _, p in written] == pytest.approx(wanted, abs=1e-9)


def test_a_beam_of_one_is_greedy() -> None:
    recognizer = build(language={"tie_word_embeddings": False})
    prefix = prefixes(recognizer, 3)
    assert [[t for t, _ in row] for row in beam_ids(recognizer, prefix, None, 1, 9)] == [
        [t for t, _ in row] for row in greedy_ids(recognizer, prefix, None, 9)
    ]


def test_a_wide_beam_finds_the_most_probable_sequence() -> None:
    recognizer = build(language={"tie_word_embeddings": False})
    prefix = prefixes(recognizer, 1)
    end = recognizer.labels.tokenizer.eos_token_id
    (found,) = beam_ids(recognizer, prefix, None, 10**4, 2)
    with torch.no_grad():
        start = alone(recognizer, prefix, 0, [])[-1].log_softmax(-1).tolist()
        every = {(end,): start[end]}
        for first in range(len(start)):
            step = alone(recognizer, prefix, 0, [first])[-1].log_softmax(-1).tolist()
            if first != end:
                every |= {(first, token): (start[first] + p) / 2 for token, p in enumerate(step)}
    assert tuple(token for token, _ in found) == max(every, key=lambda ids: every[ids])


def scripted(monkeypatch: pytest.MonkeyPatch, recognizer: Recognizer, text: str) -> None:
    """Make the head say a text token by token, each with probability 0.9."""
    ids = iter(recognizer.labels.tokenizer(text, add_special_tokens=False)["input_ids"])

    def said(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        p = torch.full_like(out, 0.1 / (out.shape[-1] - 1))
        p[..., next(ids)] = 0.9
        return p.log()

    recognizer.language.get_output_embeddings().register_forward_hook(said)


@pytest.mark.parametrize(
    ("text", "labels", "wanted"),
    [
        ("cat , red car , dog , sky", 2, [("cat", 2), ("red car", 3)]),  # enough
        ("cat , red car , dog </s> sky", None, [("cat", 2), ("red car", 3), ("dog", 2)]),  # the end closes a label too
        ("cat , cat , dog , </s>", None, [("cat", 2), ("dog", 2)]),  # each once
        ("cat , , dog , red </s>", None, [("cat", 2), ("dog", 2), ("red", 2)]),  # nothing is no label
        ("cat , dog , cat , cat , sky , red , car", None, [("cat", 2), ("dog", 2)]),  # round in circles
    ],
)
def test_a_sequence_is_read_as_labels(
    monkeypatch: pytest.MonkeyPatch, text: str, labels: int | None, wanted: list[tuple[str, int]]
) -> None:
    monkeypatch.setattr(module, "TIMES", 3)
    recognizer = build()
    prefix = prefixes(recognizer, 1)
    scripted(monkeypatch, recognizer, text + " sky" * 30)
    (found,) = greedy(recognizer, prefix, labels, max_tokens=16)
    assert found == [Guess(label, pytest.approx(0.9**n)) for label, n in wanted]


def test_a_label_that_is_cut_off_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    recognizer = build()
    scripted(monkeypatch, recognizer, "cat , red car , dog")
    (found,) = greedy(recognizer, prefixes(recognizer, 1), max_tokens=4)
    assert [guess.label for guess in found] == ["cat"]


def test_beams_are_read_as_labels_too() -> None:
    recognizer = build(language={"tie_word_embeddings": False, "initializer_range": 0.5})
    for row in beam(recognizer, prefixes(recognizer, 3), 2, max_tokens=10):
        assert len(row) <= 2 and all(guess.label and 0 < guess.score <= 1 for guess in row)
        assert len({guess.label for guess in row}) == len(row) and not any(math.isnan(guess.score) for guess in row)


def test_settings_out_of_range_are_told() -> None:
    recognizer = build()
    prefix = prefixes(recognizer, 1)
    with pytest.raises(ValueError, match="labels must be a whole number of at least 1, got 0"):
        greedy(recognizer, prefix, 0)
    with pytest.raises(ValueError, match="max_tokens must be a whole number of at least 1, got 0"):
        greedy(recognizer, prefix, max_tokens=0)
    with pytest.raises(ValueError, match="width must be a whole number of at least 1, got 0"):
        beam(recognizer, prefix, width=0)
