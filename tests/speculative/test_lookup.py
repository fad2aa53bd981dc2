"""Looking up how the text went on, against a search of the whole text."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from decoding_samples import greedy, prompts, tiny
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds

import quickmerge as qm
from quickmerge.speculative import PromptLookup, SpeculativeDecoding, Tree
from quickmerge.speculative.lookup import TextIndex


def begin(rows: list[list[int]], **settings: Any) -> PromptLookup:
    """A drafter that has read prompts, padded on the left with a token that is in them."""
    wide = max(len(row) for row in rows)
    ids = torch.tensor([[1] * (wide - len(row)) + row for row in rows])
    valid = torch.tensor([[j >= wide - len(row) for j in range(wide)] for row in rows])
    drafter = PromptLookup(**settings)
    drafter.begin(tiny(), ids, valid, None, ids)
    return drafter


def searched(text: list[int], ngram: int) -> dict[int, float]:
    """What followed the longest known run of last tokens, and its share, by looking at every place."""
    for size in range(min(ngram, len(text)), 0, -1):
        places = [i for i in range(size, len(text)) if text[i - size : i] == text[-size:]]
        if places:
            recent = places[-32:]
            return {token: sum(text[i] == token for i in recent) / len(recent) for token in {text[i] for i in recent}}
    return {}


def level(tree: Tree) -> dict[int, float]:
    return {tree.tokens[i]: tree.prob[i] for i in range(1, len(tree)) if tree.parent[i] == 0}


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3), words=st.integers(1, 5), ngram=st.integers(1, 4),
    seed=seeds,
)  # fmt: skip
@prop(60)
def test_the_first_level_is_what_followed_before(lengths: list[int], words: int, ngram: int, seed: int) -> None:
    rng = Random(seed)
    rows = [[rng.randrange(words) for _ in range(n)] for n in lengths]
    drafter = begin(rows, ngram=ngram)
    for _ in range(3):
        last = [rng.randrange(words) for _ in rows]
        trees = drafter.draft(torch.tensor(last), 100)
        for row, token, tree in zip(rows, last, trees, strict=True):
            wanted, found = searched([*row, token], ngram), level(tree)
            assert tree.tokens[0] == token
            assert set(found) == set(wanted)
            trust = sum(found.values())
            assert not found or 0 < trust < 1
            for child, share in wanted.items():
                assert found[child] == pytest.approx(trust * share)
        taken = [[token, *(rng.randrange(words) for _ in range(rng.randrange(3)))] for token in last]
        drafter.accept([torch.tensor(more) for more in taken], None)
        for row, more in zip(rows, taken, strict=True):
            row.extend(more)
        if len(rows) > 1:
            drafter.rows(torch.arange(1, len(rows)))
            rows = rows[1:]


def test_drafts_branch_where_earlier_places_differ() -> None:
    drafter = begin([[7, 8, 1, 2, 7, 8, 1, 3, 7, 8, 4]], ngram=2, length=2)
    (tree,) = drafter.draft(torch.tensor([7]), 9)
    assert level(tree).keys() == {8}
    drafter = begin([[7, 8, 1, 2, 7, 8, 1, 3, 7, 8, 4, 7]], ngram=2, length=2)
    (tree,) = drafter.draft(torch.tensor([8]), 9)
    paths = {(tree.tokens[tree.parent[i]], tree.tokens[i]) for i in range(1, len(tree)) if tree.depth[i] == 2}
    assert level(tree).keys() == {1, 4}
    assert paths == {(1, 2), (1, 3), (4, 7)}
    assert max(tree.depth) == 2
    assert level(tree)[1] == pytest.approx(2 * level(tree)[4])


def test_a_repeated_token_is_drafted_again_and_what_is_new_is_not_drafted() -> None:
    (tree,) = begin([[5, 6, 6]]).draft(torch.tensor([6]), 9)
    assert tree.tokens[:2] == [6, 6]
    (tree,) = begin([[5, 6, 7]]).draft(torch.tensor([9]), 9)
    assert tree == Tree.chain([9])


def test_it_learns_how_far_to_trust_and_starts_anew() -> None:
    text = [1, 2, 3, 4] * 4
    drafter = begin([text])
    trust = [level(drafter.draft(torch.tensor([1]), 9)[0])[2]]
    for step in range(3):  # always right: 1, 2 is drafted and comes
        drafter.accept([torch.tensor([1, 2, 3, 4])], None)
        trust.append(level(drafter.draft(torch.tensor([1]), 9)[0])[2])
        assert trust[-1] > trust[-2], step
    drafter.accept([torch.tensor([1])], None)
    assert level(drafter.draft(torch.tensor([9]), 9)[0]) == {}
    drafter.accept([torch.tensor([9])], None)
    assert level(drafter.draft(torch.tensor([1]), 9)[0])[2] < trust[-1]
    drafter.begin(tiny(), torch.tensor([text]), torch.ones(1, 16, dtype=torch.bool), None, torch.arange(16)[None])
    assert level(drafter.draft(torch.tensor([1]), 9)[0])[2] == trust[0]


def test_a_step_without_a_draft_teaches_nothing() -> None:
    drafter = begin([[1, 2, 3, 1, 2, 3]])
    drafter.draft(torch.tensor([1]), 9)
    before = list(drafter._tried)
    drafter.accept([torch.tensor([1])], None)
    drafter.accept([torch.tensor([5, 6])], None)
    drafter.draft(torch.tensor([1]), 9)
    assert drafter._tried == before


def test_a_text_that_repeats_itself_takes_fewer_passes() -> None:
    model = tiny("gemma3_text")
    inputs = prompts([6, 11])
    wanted = greedy(model, inputs, 40)
    decoding = qm.SpeculativeDecoding(qm.PromptLookup(), tree=8)
    assert torch.equal(greedy(model, inputs, 40, custom_generate=decoding), wanted)
    assert decoding.stats.tokens_per_pass > 2
    assert isinstance(decoding, SpeculativeDecoding)


def test_settings_out_of_range_are_told() -> None:
    for name in ("ngram", "length"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
            PromptLookup(**{name: 0})


@pytest.mark.parametrize("setting", ["ngram", "length"])
def test_what_grows_with_a_setting_is_bounded(setting: str) -> None:
    PromptLookup(**{setting: 1024})
    with pytest.raises(ValueError, match=f"{setting} must be at most 1024, got 99999999999"):
        PromptLookup(**{setting: 99_999_999_999})


def test_a_chain_follows_what_most_places_go_on_with() -> None:
    index = TextIndex([7, 1, 2, 3, 7, 1, 2, 4, 7, 1, 5, 7], 3)
    # (5, 7, 1) was never there, and (7, 1) was, with 2 behind it twice; of 3 and 4 the latter is more recent
    assert index.chain(1, 4) == [2, 4, 7, 1]
    assert TextIndex([7, 1, 2, 3, 7, 1, 2, 4, 9, 7], 2).chain(1, 3) == [2, 4, 9]
    assert index.chain(99, 4) == [] and index.chain(1, 1) == [2]
    assert TextIndex([4, 4, 4], 3).chain(4, 8) == [4]
