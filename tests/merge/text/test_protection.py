"""Which tokens of a prompt stay alone, which of these budgets pay for, and that the others lose nothing by it."""

from __future__ import annotations

import pytest
import torch
from hosts_zoo import BOS, EOS, build, pad, reduce, tokens
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds, valid_masks

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.reducers import make_reducer
from quickmerge.merge.text.rows import MARKS, protection, special_tokens
from quickmerge.merge.tokens import Schedule

SPECIAL = [1, 2]


@prop(80)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 60)).flatmap(lambda x: valid_masks(*x)),
    st.integers(0, 6), st.integers(1, 20), st.booleans(), seeds,
)  # fmt: skip
def test_the_rule(valid: torch.Tensor, sinks: int, recent: int, asks: bool, seed: int) -> None:
    rng = generator(seed)
    ids = torch.randint(0, 6, valid.shape, generator=rng)
    asked = torch.rand(valid.shape, generator=rng) < 0.3
    got = protection(valid, ids, SPECIAL, sinks=sinks, recent=recent, protect=(lambda _: asked) if asks else None)
    for row in range(len(valid)):
        there = valid[row].nonzero().flatten().tolist()
        marks = [j for j in there if int(ids[row, j]) in SPECIAL]
        structural = {*there[:sinks], *there[len(there) - min(recent, len(there)) :], *marks[-MARKS:]}
        wanted = {j for j in there if asks and bool(asked[row, j])}
        assert set(got.protected[row].nonzero().flatten().tolist()) == structural | wanted
        assert set(got.exempt[row].nonzero().flatten().tolist()) == wanted - structural
        assert len(structural) <= sinks + recent + MARKS


def test_marks_of_earlier_turns_compete_and_those_of_the_last_turn_stay() -> None:
    """A chat of 30 turns, each opened and closed by a mark: at the default budget the newest tokens are all kept."""
    model = build("llama")
    turn = [BOS, *range(10, 40), EOS]
    ids = torch.tensor([turn * 30 + [BOS, 11, 12]])
    with torch.no_grad(), reduce(model, qm.QuickMerge(keep=0.42), Schedule((1, 2), 0.15)) as run:
        model(ids)
    protected = run.protected[0].nonzero().flatten().tolist()
    n = ids.shape[1]
    assert protected == [0, 1, 2, 3, n - 36, n - 35, *range(n - 16, n)]
    last = run.plans[-1]
    kept = set(run.composed[-1].position[0].tolist())
    assert last.slots == len(kept) < 160
    # As many of the newest tokens as the share for recent ones, which the marks no longer eat.
    assert kept >= set(range(n - int(0.7 * last.slots), n))


@pytest.mark.parametrize("name", ["quickmerge", "truncate", "uniform", "tome"])
def test_a_protected_system_prompt_takes_nothing_from_the_rest_at_any_merge(name: str) -> None:
    """Rows with 0, 20 and 45 protected tokens and padding, two merges: each keeps its own, and the rest its share."""
    model = build("llama")
    rows = [tokens(1, length, seed=length)[0] for length in (90, 110, 135)]
    ids, mask, position = pad(rows, "left")
    asked = torch.zeros_like(ids, dtype=torch.bool)
    extra = [0, 20, 45]
    for i, row in enumerate(rows):
        first = ids.shape[1] - len(row) + 4
        asked[i, first : first + extra[i]] = True
    schedule = Schedule((1, 2), 0.5)
    reducer = make_reducer(name, keep=0.5)
    with torch.no_grad(), reduce(model, reducer, schedule, protect=lambda _: asked) as run:
        model(ids, attention_mask=mask, position_ids=position)
    for stage, composed in zip(schedule.stages(0.5, len(run.decoder)), run.composed, strict=True):
        for i, row in enumerate(rows):
            free = len(row) - extra[i]
            wanted = int(free * stage.keep + 0.5 + 1e-9)
            assert int(composed.valid[i].sum()) == extra[i] + wanted, (name, stage, i)
        assert bool(composed.carry(asked).sum() == sum(extra))


def test_protecting_what_is_kept_anyway_changes_nothing() -> None:
    model, ids = build("llama"), tokens(1, 80)
    plans = []
    for protect in (None, lambda given: torch.arange(given.shape[1]).expand_as(given) < 4):
        with torch.no_grad(), reduce(model, qm.QuickMerge(keep=0.5), 2, protect=protect) as run:
            model(ids)
        plans.append(run.plan)
    assert torch.equal(plans[0].slot, plans[1].slot)


@pytest.mark.parametrize(
    "answer",
    [None, torch.ones(1, 5), torch.ones(1, 4, dtype=torch.bool), [True] * 5],
    ids=["none", "float", "short", "list"],
)
def test_anything_but_a_mask_is_refused(answer: object) -> None:
    valid, ids = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(QuickmergeError, match=r"protect must return a bool mask of shape \(1, 5\)"):
        protection(valid, ids, [], sinks=0, recent=1, protect=lambda _: answer)  # type: ignore[arg-type, return-value]


def test_special_tokens_of_a_config() -> None:
    class Config:
        bos_token_id, eos_token_id = None, [3, 4]

    assert special_tokens(Config()) == [3, 4] and special_tokens(object()) == []
