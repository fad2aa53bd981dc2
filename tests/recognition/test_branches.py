"""One-shot sampling: three ways of reading that have to agree, and what is made of the branches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recognition_samples import alone, build, prefixes
from strategies import prop, seeds

from quickmerge.recognition import Recognizer, one_shot
from quickmerge.recognition.branches import LAYOUTS, branches

FAMILIES = ("llama", "qwen2", "gemma3_text", "gpt_neox", "mistral")


def leaning(recognizer: Recognizer, by: float) -> Recognizer:
    """Make the separator more probable everywhere, so that labels end."""
    head = recognizer.language.get_output_embeddings()
    head.register_forward_hook(
        lambda module, args, out: out + by * (torch.arange(out.shape[-1]) == recognizer.labels.sep)
    )
    return recognizer


@pytest.fixture(scope="module")
def llama() -> Recognizer:
    return leaning(build(language={"tie_word_embeddings": False}), 1.5)


def slowly(recognizer: Recognizer, prefix: object, row: int, k: int, limit: int) -> list[tuple[list[int], float, bool]]:
    """Every branch of one image by separate forwards of growing sequences."""
    special = recognizer.labels.special.tolist()
    start = alone(recognizer, prefix, row, [])[-1].log_softmax(-1)
    firsts = sorted((i for i in range(len(start)) if recognizer.starts[i]), key=lambda i: -float(start[i]))[:k]
    out = []
    for first in firsts:
        ids, log_p = [first], float(start[first])
        while ids[-1] != recognizer.labels.sep and len(ids) <= limit:
            step = alone(recognizer, prefix, row, ids)[-1].log_softmax(-1)
            allowed = [i for i in range(len(step)) if i not in special]
            ids.append(max(allowed, key=lambda i: float(step[i])))
            log_p += float(step[ids[-1]])
        out.append((ids, log_p, ids[-1] == recognizer.labels.sep))
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@given(rows=st.integers(1, 3), k=st.integers(1, 9), limit=st.integers(1, 4), seed=seeds)
@prop(6)
def test_branches_are_those_of_separate_forwards(
    llama: Recognizer, layout: str, rows: int, k: int, limit: int, seed: int
) -> None:
    prefix = prefixes(llama, rows, 4, seed)
    found = branches(llama, prefix, k, layout=layout, max_tokens=limit)
    with torch.no_grad():
        for row in range(rows):
            wanted = slowly(llama, prefix, row, k, limit)
            for at, (ids, log_p, finished) in enumerate(wanted):
                got = found.ids[row, at].tolist()
                assert got[: len(ids)] == ids and set(got[len(ids) :]) <= {llama.labels.sep}
                assert float(found.log_p[row, at]) == pytest.approx(log_p, abs=1e-9)
                assert bool(found.finished[row, at]) == finished


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", ["independent", "causal"])
def test_the_layouts_agree_in_every_family(family: str, mask: str) -> None:
    recognizer = leaning(build(family, dtype=torch.float32, mask=mask, language={"tie_word_embeddings": False}), 1.5)
    prefix = prefixes(recognizer, 3, 6)
    tree, rows, anew = (branches(recognizer, prefix, 6, layout=layout, max_tokens=5) for layout in LAYOUTS)
    for other in (rows, anew):
        assert torch.equal(tree.ids, other.ids) and torch.equal(tree.finished, other.finished)
        assert float((tree.log_p - other.log_p).abs().max()) < 1e-5
    # branches end at different times
    assert (
        bool(tree.finished.any())
        and len({row.count(recognizer.labels.sep) for row in tree.ids.flatten(0, 1).tolist()}) > 1
    )


def test_half_precision_gives_probabilities() -> None:
    recognizer = leaning(build(dtype=torch.bfloat16), 3.0)
    for row in one_shot(recognizer, prefixes(recognizer, 2), 6):
        assert row and all(0 <= guess.score <= 1 for guess in row) and sum(guess.score for guess in row) <= 1 + 1e-5


def test_labels_are_sorted_and_their_probabilities_sum_to_at_most_one(llama: Recognizer) -> None:
    for row in one_shot(llama, prefixes(llama, 4), 12, max_tokens=6):
        scores = [guess.score for guess in row]
        assert scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 1
        assert all(guess.label and "," not in guess.label for guess in row)


def test_an_unfinished_branch_is_left_out_and_the_others_keep_their_scores(llama: Recognizer) -> None:
    prefix = prefixes(llama, 4)
    short = branches(llama, prefix, 8, max_tokens=1)
    long = branches(llama, prefix, 8, max_tokens=9)
    assert bool((long.finished & ~short.finished).any()), "the limit has to matter in this test"
    kept = short.finished
    assert torch.equal(short.log_p[kept], long.log_p[kept])
    for row, guesses in enumerate(one_shot(llama, prefix, 8, max_tokens=1)):
        assert len(guesses) == int(kept[row].sum())


def test_a_minimum_leaves_out_what_is_below_it_and_nothing_else(llama: Recognizer) -> None:
    prefix = prefixes(llama, 3)
    for all_of_them, some in zip(one_shot(llama, prefix, 10), one_shot(llama, prefix, 10, minimum=0.01), strict=True):
        assert some == [guess for guess in all_of_them if guess.score >= 0.01] and len(some) < len(all_of_them)
    assert one_shot(llama, prefix, 10, minimum=1.0) == [[], [], []]


def test_the_same_text_from_different_tokens_is_summed(llama: Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = prefixes(llama, 2)
    found = branches(llama, prefix, 6)
    monkeypatch.setattr(llama.labels, "text", lambda ids: "same")
    for row, guesses in enumerate(one_shot(llama, prefix, 6)):
        wanted = found.log_p[row][found.finished[row]].exp().sum()
        assert [(guess.label, guess.score) for guess in guesses] == [("same", pytest.approx(float(wanted)))]


def test_specials_the_separator_and_non_words_begin_no_label(llama: Recognizer) -> None:
    found = branches(llama, prefixes(llama, 2), 1000)
    for row in range(2):
        begun = found.ids[row, :, 0][found.log_p[row].isfinite()].tolist()
        assert sorted(begun) == llama.starts.nonzero()[:, 0].tolist()
    assert not bool(llama.starts[[llama.labels.sep, *llama.labels.special.tolist()]].any())
    assert not bool(found.finished[~found.log_p.isfinite()].any())


def test_settings_out_of_range_are_told(llama: Recognizer) -> None:
    prefix = prefixes(llama, 1)
    for settings, message in (
        ({"k": 0}, "k must be a whole number of at least 1, got 0"),
        (
            {"k": 2, "layout": "trees"},
            r"layout must be one of tree, batch, uncached, got 'trees' \(did you mean 'tree'",
        ),
        ({"k": 2, "max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({"k": 2, "minimum": 1.5}, r"minimum must be a number in \[0, 1\], got 1.5"),
        ({"k": 2, "minimum": math.nan}, r"minimum must be a number in \[0, 1\], got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            one_shot(llama, prefix, **settings)
