"""Best-first search against every label there is."""

from __future__ import annotations

import math
import warnings
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recognition_samples import alone, build, prefixes
from strategies import prop, seeds

from quickmerge.recognition import Prefix, Recognizer, best_first, one_shot
from quickmerge.recognition.branches import branches
from quickmerge.recognition.search import best_sequences


@pytest.fixture(scope="module")
def llama() -> Recognizer:
    return build(language={"tie_word_embeddings": False, "initializer_range": 0.5})


def every_label(recognizer: Recognizer, prefix: Prefix, row: int, limit: int) -> dict[tuple[int, ...], float]:
    """The log-probability of every label of at most ``limit`` tokens, walked depth first."""
    barred = {recognizer.labels.sep, *recognizer.labels.special.tolist()}
    out: dict[tuple[int, ...], float] = {}

    def walk(ids: tuple[int, ...], so_far: float) -> None:
        step = alone(recognizer, prefix, row, list(ids))[-1].log_softmax(-1).tolist()
        if ids:
            out[ids] = so_far + step[recognizer.labels.sep]
        if len(ids) == limit:
            return
        for token, log_p in enumerate(step):
            if token not in barred and (ids or bool(recognizer.starts[token])):
                walk((*ids, token), so_far + log_p)

    with torch.no_grad():
        walk((), 0.0)
    return out


@given(k=st.integers(1, 30), width=st.integers(1, 9), seed=seeds)
@prop(4)
def test_the_best_labels_are_those_of_all_labels(llama: Recognizer, k: int, width: int, seed: int) -> None:
    prefix = prefixes(llama, 2, 3, seed)
    found = best_sequences(llama, prefix, k, width=width, max_tokens=2)
    for row in range(2):
        every = every_label(llama, prefix, row, 2)
        assert sum(math.exp(p) for p in every.values()) <= 1
        wanted = sorted(every.items(), key=lambda item: -item[1])[:k]
        assert [ids for _, ids in found[row]] == [ids for ids, _ in wanted]
        assert [p for p, _ in found[row]] == pytest.approx([p for _, p in wanted], abs=1e-9)


@given(rows=st.integers(1, 3), k=st.integers(1, 8), limit=st.integers(1, 4), seed=seeds)
@prop(12)
def test_no_label_of_one_shot_sampling_is_better_placed(
    llama: Recognizer, rows: int, k: int, limit: int, seed: int
) -> None:
    prefix = prefixes(llama, rows, 4, seed)
    one = branches(llama, prefix, k, max_tokens=limit)
    for row, best in enumerate(best_sequences(llama, prefix, k, max_tokens=limit, most=10**6)):
        scores = sorted(one.log_p[row][one.finished[row]].tolist(), reverse=True)
        assert len(best) >= len(scores)
        assert all(p >= other - 1e-9 for (p, _), other in zip(best, scores, strict=False))


def test_labels_that_begin_alike_do_not_compete(llama: Recognizer) -> None:
    prefix = prefixes(llama, 6, 4)
    best = best_sequences(llama, prefix, 10, max_tokens=3)
    firsts = [[ids[0] for _, ids in row] for row in best]
    assert any(len(set(row)) < len(row) for row in firsts)
    for row, found in zip(best, one_shot(llama, prefix, 10, max_tokens=3), strict=True):
        assert all(math.exp(row[0][0]) >= guess.score - 1e-9 for guess in found)


def test_guesses_are_sequences_as_text(llama: Recognizer) -> None:
    prefix = prefixes(llama, 2, 4)
    for row, guesses in zip(best_sequences(llama, prefix, 5), best_first(llama, prefix, 5), strict=True):
        assert [guess.label for guess in guesses] == [llama.labels.text(ids) for _, ids in row]
        assert [guess.score for guess in guesses] == pytest.approx([math.exp(p) for p, _ in row])


def test_a_minimum_ends_the_search_and_takes_nothing_away(llama: Recognizer) -> None:
    prefix = prefixes(llama, 3, 4)
    for all_of_them, some in zip(
        best_first(llama, prefix, 20, max_tokens=3),
        best_first(llama, prefix, 20, max_tokens=3, minimum=0.02),
        strict=True,
    ):
        assert some == [guess for guess in all_of_them if guess.score >= 0.02]


def test_giving_up_is_told_and_what_was_found_is_right(llama: Recognizer) -> None:
    prefix = prefixes(llama, 1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (every,) = best_sequences(llama, prefix, 30, max_tokens=3, most=10**6)
    with pytest.warns(UserWarning, match="best_first gave up after 60 nodes.*raise minimum or most"):
        (few,) = best_sequences(llama, prefix, 30, width=1, max_tokens=3, most=60)
    assert 0 < len(few) < len(every) == 30
    for log_p, ids in few:
        with torch.no_grad():
            steps = alone(llama, prefix, 0, list(ids)).log_softmax(-1)
        wanted = sum(float(steps[t, token]) for t, token in enumerate((*ids, llama.labels.sep)))
        assert log_p == pytest.approx(wanted, abs=1e-9)


def test_settings_out_of_range_are_told(llama: Recognizer) -> None:
    for name, value in product(("k", "width", "max_tokens", "most"), (0, 1.5, True)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value}"):
            best_first(llama, prefixes(llama, 1), **{"k": 2, name: value})
