"""Suffix decoding, against counting every run at every place."""

from __future__ import annotations

import copy
import threading
from random import Random
from typing import Any

import pytest
import torch
from decoding_samples import greedy, prompts, tiny
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds

import quickmerge as qm
from quickmerge.speculative import SuffixDecoding, Tree, best_first


def begin(drafter: SuffixDecoding, rows: list[list[int]]) -> SuffixDecoding:
    """Let a drafter read prompts, padded on the left with a token that is in them."""
    wide = max(len(row) for row in rows)
    ids = torch.tensor([[1] * (wide - len(row)) + row for row in rows])
    valid = torch.tensor([[j >= wide - len(row) for j in range(wide)] for row in rows])
    drafter.begin(tiny(), ids, valid, None, ids)
    return drafter


def count(texts: list[list[int]], run: list[int]) -> int:
    return sum(text[i : i + len(run)] == run for text in texts for i in range(len(text) - len(run) + 1))


def grown(texts: list[list[int]], run: list[int], nodes: int, reach: int, words: int) -> Tree:
    """The draft behind a run, by counting, with the trust that untried classes of length have."""

    def ranked(path: tuple[int, ...]) -> tuple[list[int], list[float]]:
        here = [*run, *followed[path]]
        if len(path) == reach:
            return [], []
        going = {token: count(texts, [*here, token]) for token in range(words)}
        order = sorted((token for token in going if going[token]), key=lambda token: -going[token])
        for rank, token in enumerate(order):
            followed[(*path, rank)] = [*followed[path], token]
        trust = 1 - 0.5 ** (len(here).bit_length())
        return order, [trust * going[token] / count(texts, here) for token in order]

    followed: dict[tuple[int, ...], list[int]] = {(): []}
    return best_first(run[-1], ranked, nodes)


def expected(
    sources: list[list[list[int]]], text: list[int], nodes: int, depth: int, factor: float, words: int
) -> float:
    """The largest sum of path probabilities, the root's 1 included, of any run that ends the text."""
    best = 1.0
    for texts in sources:
        for size in range(1, min(depth, len(text)) + 1):
            run, reach = text[-size:], min(depth, int(factor * size))
            # of runs at the same places the longest counts
            longer = size < min(depth, len(text)) and count(texts, text[-size - 1 :]) == count(texts, run)
            if count(texts, run) and not longer:
                best = max(best, sum(grown(texts, run, nodes, reach, words).prob))
    return best


@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=2), words=st.integers(1, 4), depth=st.integers(1, 8),
    factor=st.sampled_from([0.5, 1.0, 2.0]), nodes=st.integers(2, 12), seed=seeds,
)  # fmt: skip
@prop(80)
def test_the_draft_is_the_one_that_is_expected_to_give_most(
    lengths: list[int], words: int, depth: int, factor: float, nodes: int, seed: int
) -> None:
    rng = Random(seed)

    def some(most: int) -> list[int]:
        return [rng.randrange(words) for _ in range(rng.randrange(1, most))]

    drafter = SuffixDecoding(depth=depth, factor=factor)
    rows = [[rng.randrange(words) for _ in range(n)] for n in lengths]
    begin(drafter, rows)
    outputs = [some(10) for _ in rows]
    drafter.accept([torch.tensor(row) for row in outputs], None)
    begin(drafter, rows)  # the next generate, which remembers
    last = [rng.randrange(words) for _ in rows]
    trees = drafter.draft(torch.tensor(last), nodes)
    for row, token, tree in zip(rows, last, trees, strict=True):
        assert tree.tokens[0] == token and len(tree) <= nodes
        wanted = expected([[row], outputs], [*row, token], nodes, depth, factor, words)
        assert sum(tree.prob) == pytest.approx(wanted)


def test_a_long_quotation_is_drafted_far_and_a_short_one_is_not() -> None:
    text = list(range(2, 40))
    drafter = begin(SuffixDecoding(), [[*text, 1, *text[:12]]])
    (tree,) = drafter.draft(torch.tensor([text[12]]), 32)
    assert tree.tokens == [text[12], *text[13:26]] and max(tree.depth) == 13
    drafter = begin(SuffixDecoding(), [[*text, 1, text[11]]])
    (tree,) = drafter.draft(torch.tensor([text[12]]), 32)
    assert max(tree.depth) == 2
    drafter = begin(SuffixDecoding(factor=3.0), [[*text, 1, text[11]]])
    (tree,) = drafter.draft(torch.tensor([text[12]]), 32)
    assert max(tree.depth) == 6


def test_what_was_written_before_is_remembered_by_copies_and_not_by_another() -> None:
    drafter = SuffixDecoding()
    begin(drafter, [[1, 2]])
    drafter.accept([torch.tensor([5, 6, 7, 8])], None)
    for one in (copy.copy(drafter), drafter):
        (tree,) = begin(one, [[3, 5]]).draft(torch.tensor([6]), 9)
        assert tree.tokens == [6, 7, 8]
    for other in (SuffixDecoding(), SuffixDecoding(memory=0), copy.deepcopy(drafter)):
        (tree,) = begin(other, [[3, 5]]).draft(torch.tensor([6]), 9)
        assert tree == Tree.chain([6])


def test_memory_is_bounded_and_the_latest_outputs_stay() -> None:
    drafter = SuffixDecoding(memory=64)
    for start in range(100, 300, 20):
        begin(drafter, [[1]])
        drafter.accept([torch.arange(start, start + 20)], None)
        assert len(drafter._past.index) <= 64
    (tree,) = begin(drafter, [[1, 285]]).draft(torch.tensor([286]), 9)
    assert tree.tokens[:3] == [286, 287, 288]
    (tree,) = begin(drafter, [[1, 105]]).draft(torch.tensor([106]), 9)
    assert tree == Tree.chain([106])
    begin(drafter, [[1]])
    drafter.accept([torch.arange(500, 700)], None)  # more at once than is remembered
    assert len(drafter._past.index) <= 64
    drafter.accept([torch.arange(700, 710)], None)
    (tree,) = drafter.draft(torch.tensor([705]), 9)
    assert tree.tokens[:2] == [705, 706]


def test_it_learns_how_far_to_trust_and_starts_anew() -> None:
    text = [1, 2, 3, 4] * 4
    drafter = begin(SuffixDecoding(memory=0), [text])

    def trust() -> float:
        return drafter.draft(torch.tensor([1]), 9)[0].prob[1]

    first = trust()
    drafter.accept([torch.tensor([1, 2, 3, 4])], None)
    more = trust()
    assert more > first
    drafter.accept([torch.tensor([1])], None)
    drafter.draft(torch.tensor([9]), 9)  # what was drafted did not come
    drafter.accept([torch.tensor([9, 2, 3, 4])], None)
    assert drafter.draft(torch.tensor([1]), 9)[0].prob[1] < more
    begin(drafter, [text])
    assert trust() == first


@pytest.mark.parametrize("rows", [[9], [6, 11]])
def test_the_text_is_the_model_s_own_and_takes_fewer_passes(rows: list[int]) -> None:
    model = tiny("gemma3_text")
    inputs = prompts(rows)
    wanted = greedy(model, inputs, 40)
    decoding = qm.SpeculativeDecoding(SuffixDecoding(), tree=8)
    assert torch.equal(greedy(model, inputs, 40, custom_generate=decoding), wanted)
    assert decoding.stats.tokens_per_pass > 2
    # the second time it was written before
    again = decoding.stats.passes
    assert torch.equal(greedy(model, inputs, 40, custom_generate=decoding), wanted)
    assert decoding.stats.passes < again


def test_threads_share_what_is_remembered() -> None:
    drafter, faults = SuffixDecoding(memory=200), []

    def write(seed: int) -> None:
        try:
            rng, mine = Random(seed), copy.copy(drafter)
            for _ in range(20):
                begin(mine, [[rng.randrange(9) for _ in range(5)]])
                for _ in range(5):
                    mine.draft(torch.tensor([rng.randrange(9)]), 8)
                    mine.accept([torch.tensor([rng.randrange(9) for _ in range(4)])], None)
        except Exception as error:  # told below, in the test's own thread
            faults.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults and 0 < len(drafter._past.index) <= 200


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"depth": 0}, "depth must be a whole number of at least 1, got 0"),
        ({"depth": 99999999999}, "depth must be at most 1024, got 99999999999"),
        ({"factor": -1}, "factor must be a number of at least 0, got -1"),
        ({"factor": float("nan")}, "factor must be a number of at least 0, got nan"),
        ({"memory": -1}, "memory must be a whole number of at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SuffixDecoding(**settings)
