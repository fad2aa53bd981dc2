from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds, views

from quickmerge.merge.reducers import Random
from quickmerge.merge.tokens import Count, TokenView


def kept(view: TokenView, keep: Count, seed: int, row: int = 0) -> list[int]:
    plan = Random(keep=keep, seed=seed).plan(view)
    return plan.position[row][plan.valid[row]].tolist()


@prop(40)
@given(seeds, st.integers(1, 40), st.integers(1, 40))
def test_depends_on_the_seed_and_on_positions_alone(seed: int, n: int, tokens: int) -> None:
    """The draw of a token is the same whatever it holds and however long the row is."""
    rng = torch.Generator().manual_seed(seed)
    one, two = (TokenView(torch.randn(2, n, d, generator=rng)) for d in (1, 5))
    assert kept(one, Count(tokens), seed) == kept(two, Count(tokens), seed, row=1)
    long = TokenView(torch.zeros(1, n + 30, 1))
    assert torch.equal(Random(seed=seed).score(long)[:, :n], Random(seed=seed).score(one)[:1])


@prop(30)
@given(views(), seeds)
def test_scores_are_shares_of_one(view: TokenView, seed: int) -> None:
    score = Random(seed=seed).score(view)
    assert ((score >= 0) & (score < 1)).all()


def test_other_seeds_keep_other_tokens_and_all_about_equally_often() -> None:
    n, draws = 20, 400
    view = TokenView(torch.zeros(1, n, 1))
    times = torch.zeros(n)
    for seed in range(draws):
        times[kept(view, Count(5), seed)] += 1
    # each is kept with probability 1/4: mean 100, deviation below 9
    assert times.sum() == 5 * draws
    assert times.min() > 60 and times.max() < 140
