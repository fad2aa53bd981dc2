"""Scores of given labels against one separate forward for each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recognition_samples import NAMES, build, label_log_p, prefixes
from strategies import prop, seeds

from quickmerge.errors import QuickmergeError
from quickmerge.recognition import Recognizer, choose, closed_set

LABEL = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(" ".join)


@pytest.fixture(scope="module")
def llama() -> Recognizer:
    return build()


@given(labels=st.lists(LABEL, min_size=1, max_size=8), chunk=st.integers(1, 20), rows=st.integers(1, 3), seed=seeds)
@prop(12)
def test_each_label_has_the_probability_of_a_forward_of_its_own(
    llama: Recognizer, labels: list[str], chunk: int, rows: int, seed: int
) -> None:
    prefix = prefixes(llama, rows, 4, seed)
    found = closed_set(llama, prefix, labels, chunk=chunk)
    assert found.shape == (rows, len(labels))
    with torch.no_grad():
        for row in range(rows):
            wanted = [label_log_p(llama, prefix, row, label) for label in labels]
            assert found[row].tolist() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "gpt_neox", "mistral"])
def test_in_every_family_in_single_precision(family: str) -> None:
    recognizer = build(family, dtype=torch.float32)
    prefix, labels = prefixes(recognizer, 2), ["red car", "cat", "traffic lights dog sky"]
    found = closed_set(recognizer, prefix, labels, chunk=4)
    with torch.no_grad():
        wanted = [[label_log_p(recognizer, prefix, row, label) for label in labels] for row in range(2)]
    assert float((found - torch.tensor(wanted)).abs().max()) < 1e-4


@given(seed=seeds)
@prop(5)
def test_probabilities_of_different_labels_sum_to_at_most_one(llama: Recognizer, seed: int) -> None:
    labels = [*NAMES, *(f"{a} {b}" for a in NAMES for b in NAMES)]
    total = closed_set(llama, prefixes(llama, 2, 4, seed), labels).exp().sum(-1)
    assert bool((total <= 1).all()) and bool((total > 0).all())


def test_the_best_are_chosen_and_one_written_twice_counts_once(llama: Recognizer) -> None:
    prefix = prefixes(llama, 2)
    scores = closed_set(llama, prefix, ["cat", "red car", "dog"]).exp().tolist()
    rows = choose(llama, prefix, ["cat", " red  car", "dog", "cat"], top=2)
    for row, guesses in zip(scores, rows, strict=True):
        wanted = sorted(zip(row, ["cat", "red car", "dog"], strict=True), reverse=True)[:2]
        assert [(guess.score, guess.label) for guess in guesses] == [(pytest.approx(p), name) for p, name in wanted]
    assert choose(llama, prefix, ["cat"], minimum=0.99) == [[], []]


def test_labels_that_cannot_be_scored_are_told(llama: Recognizer) -> None:
    prefix = prefixes(llama, 1)
    for labels, message in (
        ([], "labels must hold at least one label"),
        ("cat", "labels must hold at least one label, got 'cat'"),
        (["cat", " "], "labels must not be empty, got ' '"),
        (["cat, dog"], "a label must not hold the separator ',', which closes labels, got 'cat, dog'"),
    ):
        with pytest.raises(QuickmergeError, match=message):
            closed_set(llama, prefix, labels)
    with pytest.raises(ValueError, match="chunk must be a whole number of at least 1, got 0"):
        closed_set(llama, prefix, ["cat"], chunk=0)
