from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, views

from quickmerge.merge.reducers import Attention
from quickmerge.merge.tokens import AttentionTrace, Count, Evidence, TokenView


def slow_score(view: TokenView, row: int, window: int) -> dict[int, float]:
    """Mean over layers, heads and voters of the attention that each token gets."""
    tokens = view.valid[row].nonzero().flatten().tolist()
    voters = tokens[-window:]
    score = dict.fromkeys(tokens, 0.0)
    for trace in view.evidence.attention:
        heads = trace.query.shape[1]
        for head in range(heads):
            group = head // (heads // trace.key.shape[1])
            for i in voters:
                seen = [
                    j
                    for j in tokens
                    if j <= i and (trace.window is None or view.position[row, i] - view.position[row, j] < trace.window)
                ]
                dots = [float(trace.query[row, head, i] @ trace.key[row, group, j]) * trace.scaling for j in seen]
                total = math.fsum(math.exp(d - max(dots)) for d in dots)
                for j, d in zip(seen, dots, strict=True):
                    score[j] += math.exp(d - max(dots)) / total / len(voters) / heads / len(view.evidence.attention)
    return score


@prop(40)
@given(
    views(attention=2, dtypes=(torch.float64,), kinds=("normal",), max_tokens=9, protect=("none", "ends")),
    st.integers(1, 12),
    st.integers(1, 9),
)
def test_keeps_what_the_last_tokens_look_at(view: TokenView, window: int, tokens: int) -> None:
    reducer = Attention(keep=Count(tokens), layers=2, window=window)
    score, plan = reducer.score(view), reducer.plan(view)
    for row in range(len(view.valid)):
        slow = slow_score(view, row, window)
        assert {j: float(score[row, j]) for j in slow} == pytest.approx(slow, rel=0, abs=1e-10)
        kept = set((plan.slot[row] >= 0).nonzero().flatten().tolist())
        guarded = {j for j in slow if view.protected[row, j]}
        assert guarded <= kept
        # nothing that was dropped scores above a free token that was kept
        dropped = [slow[j] for j in slow if j not in kept]
        assert max(dropped, default=0) <= min((slow[j] for j in kept - guarded), default=math.inf) + 1e-12


def test_finds_the_token_that_is_looked_at() -> None:
    n = 8
    query, key = torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n, 2)
    query[..., 0] = 1.0
    key[0, 0, 3, 0] = 20.0
    view = TokenView(torch.zeros(1, n, 1), evidence=Evidence(attention=(AttentionTrace(query, key, key, 1.0),)))
    assert Attention(keep=Count(1), layers=1).plan(view).position.tolist() == [[3]]


def test_probes_as_many_layers_as_it_is_told() -> None:
    assert Attention(layers=3).needs.layers == 3 and Attention.proportional is False
