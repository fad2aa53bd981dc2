from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import byte_level, sentencepiece_bpe
from transplant_samples import same_bits

from quickmerge.errors import QuickmergeError
from quickmerge.transplant.matching import match
from quickmerge.transplant.rows import KINDS, Plan, assemble, make_plan, new_size, return_plan, same_vocabulary
from quickmerge.transplant.tokens import read_vocabulary
from quickmerge.transplant.write import origin_of


def vocabulary(size: int, roles: dict[str, int] | None = None) -> Any:
    tokens = tuple(SimpleNamespace(id=i, text=f"t{i}", data=b"x", special=False) for i in range(size))
    return SimpleNamespace(tokens=tokens, size=size, roles=roles or {})


@st.composite
def matchings(draw: st.DrawFn) -> tuple[Any, int, int]:
    """Any division of the donor's ids, and sizes of both."""
    donor, base = draw(st.integers(2, 30)), draw(st.integers(2, 30))
    kinds = draw(
        st.lists(st.sampled_from(["shared", "special", "new", "none", "gone"]), min_size=donor, max_size=donor)
    )
    kinds[0] = "shared"
    ids = st.integers(0, base - 1)
    shared = [(i, draw(ids)) for i, kind in enumerate(kinds) if kind == "shared"]
    special = {
        i: tuple(draw(st.lists(ids, min_size=1, max_size=3))) for i, kind in enumerate(kinds) if kind == "special"
    }
    seen: set[int] = set()
    aliases = []
    for own, theirs in shared:  # as in a real one: what shares a base row with another is an alias of it
        if theirs in seen:
            aliases.append(own)
        seen.add(theirs)
    matching = SimpleNamespace(
        shared=np.array(shared, np.int64).reshape(-1, 2), special=special,
        unmapped=tuple(i for i, kind in enumerate(kinds) if kind == "none"),
        new=np.array([i for i, kind in enumerate(kinds) if kind == "new"], np.int64), aliases=tuple(aliases), kinds={},
    )  # fmt: skip
    return matching, donor, base


def planned(case: tuple[Any, int, int], padding: int = 0, more: int = 0) -> Plan:
    matching, donor, base = case
    return make_plan(matching, vocabulary(donor), vocabulary(base), size=donor + padding, base_rows=base + more)


@settings(max_examples=40, deadline=None)
@given(matchings(), st.integers(0, 5), st.integers(0, 5))
def test_every_row_has_one_origin_and_every_base_row_one_fate(case: Any, padding: int, more: int) -> None:
    plan = planned(case, padding, more)
    parts = [
        plan.copied[:, 0],
        list(plan.special),
        plan.rebuilt,
        plan.restored,
        plan.aliases,
        plan.unmapped,
        plan.padding,
    ]
    every = np.concatenate([np.asarray(part, np.int64) for part in parts])
    assert sorted(every.tolist()) == list(range(plan.size))
    assert sum(plan.counts().values()) == plan.size == len(plan.kinds()) and list(plan.counts()) == list(KINDS)
    # a base row is either copied somewhere or put aside
    origin = origin_of(plan)
    kept = set(origin[origin >= 0].tolist())
    assert kept | set(plan.dropped.tolist()) == set(range(case[2] + more)) and not kept & set(plan.dropped.tolist())
    # no two copies of one row, or the second would take half of its probability
    assert len(kept) == (origin >= 0).sum() or any(len(ids) == 1 for ids in plan.special.values())


@settings(max_examples=40, deadline=None)
@given(matchings(), st.integers(0, 5), st.integers(0, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_there_and_back_is_every_row_to_the_last_bit(case: Any, padding: int, more: int, dtype: torch.dtype) -> None:
    plan = planned(case, padding, more)
    rows = case[2] + more
    base = torch.randn(rows, 3).to(dtype)
    new = assemble(plan, base, torch.randn(len(plan.rebuilt), 3), "input")
    aside = torch.from_numpy(plan.dropped)
    back = return_plan(origin_of(plan), plan.dropped, size=rows)
    again = assemble(back, new, new[:0], "input", put_aside=base[aside][np.searchsorted(plan.dropped, back.restored)])
    assert same_bits(again, base) and not len(back.rebuilt) and not len(back.padding)


@settings(max_examples=40, deadline=None)
@given(matchings(), st.integers(0, 5), st.sampled_from(["input", "output", "bias"]))
def test_rows_are_what_the_plan_says(case: Any, padding: int, side: Any) -> None:
    plan = planned(case, padding)
    base = torch.randn(case[2]).double() if side == "bias" else torch.randn(case[2], 4).double()
    made = torch.randn(len(plan.rebuilt), *base.shape[1:]).double()
    new = assemble(plan, base, made, side)
    assert new.shape == (plan.size, *base.shape[1:])
    used = []
    for own, theirs in plan.copied.tolist():
        assert torch.equal(new[own], base[theirs])
        used.append(own)
    for own, ids in plan.special.items():
        if side == "input":
            mean, lengths = base[list(ids)].mean(0), base[list(ids)].norm(dim=-1).mean()
            torch.testing.assert_close(new[own], base[ids[0]] if len(ids) == 1 else mean / mean.norm() * lengths)
        elif own not in plan.rivals:
            assert torch.equal(new[own], base[ids[0]])
        if side == "input" or own not in plan.rivals:
            used.append(own)
    for own, row in zip(plan.rebuilt.tolist(), made, strict=True):
        assert torch.equal(new[own], row)
        used.append(own)
    empty = sorted(set(range(plan.size)) - set(used))
    assert set(plan.padding.tolist()) | set(plan.unmapped) | set(plan.aliases.tolist()) <= set(empty)
    mean = new[used].mean(0)
    torch.testing.assert_close(new[empty], mean.expand(len(empty), *mean.shape))
    if side == "output" and empty:  # never the largest logit, at most one in as many of the probability
        hidden = torch.randn(50, 4).double()
        logits = hidden @ new.T
        assert (logits[:, empty].max(-1).values <= logits[:, used].max(-1).values + 1e-9).all()
        probability = logits.softmax(-1)
        assert (probability[:, empty] <= 1 / len(used) + 1e-9).all()


def test_the_end_of_a_text_keeps_its_row_where_others_want_it_too() -> None:
    matching = SimpleNamespace(
        shared=np.array([[0, 0]]),
        special={1: (2,), 2: (2,), 3: (1,)},
        unmapped=(),
        new=np.zeros(0, np.int64),
        aliases=(),
    )
    plan = make_plan(matching, vocabulary(4, {"pad": 1, "eos": 2}), vocabulary(3), size=4, base_rows=3)  # type: ignore[arg-type]
    assert plan.rivals == (1,)
    base = torch.randn(3, 4)
    assert torch.equal(assemble(plan, base, base[:0], "input")[1], base[2])
    torch.testing.assert_close(assemble(plan, base, base[:0], "output")[1], base.mean(0))


def test_the_same_tokenizer_is_the_same_vocabulary() -> None:
    one, other = read_vocabulary(byte_level(420)), read_vocabulary(byte_level(400))
    assert same_vocabulary(one, read_vocabulary(byte_level(420))) and not same_vocabulary(one, other)
    plan = make_plan(match(one, one), one, one, size=450, base_rows=430, identical=True)
    assert plan.counts()["copied"] == 430 and plan.padding.tolist() == list(range(430, 450))


def test_bytes_that_text_stands_for_too_are_no_second_copy() -> None:
    theirs, ours = read_vocabulary(sentencepiece_bpe(520)), read_vocabulary(byte_level(420))
    plan = make_plan(match(theirs, ours), theirs, ours, size=theirs.size, base_rows=ours.size)
    assert len(plan.aliases) > 20
    assert len(np.unique(plan.copied[:, 1])) == len(plan.copied)
    assert {theirs.by_id[int(i)].byte for i in plan.aliases} == {True}


def test_the_number_of_rows() -> None:
    assert new_size(100) == 100 and new_size(100, usual=128) == 128
    assert new_size(100, pad_to_multiple_of=64, usual=999) == 128 and new_size(128, pad_to_multiple_of=64) == 128
    assert new_size(100, vocab_size=100, usual=128) == 100
    with pytest.raises(QuickmergeError, match="vocab_size must be at least 100, the tokenizer's own size, got 99"):
        new_size(100, vocab_size=99)
    with pytest.raises(QuickmergeError, match="give either vocab_size or pad_to_multiple_of, got 128 and 64"):
        new_size(100, vocab_size=128, pad_to_multiple_of=64)
    with pytest.raises(QuickmergeError, match="pad_to_multiple_of must be a whole number of at least 1, got 0"):
        new_size(100, pad_to_multiple_of=0)


def test_nothing_shared_and_too_few_rows_are_told() -> None:
    nothing = SimpleNamespace(shared=np.zeros((0, 2)), special={}, unmapped=(), new=np.arange(3), aliases=())
    with pytest.raises(QuickmergeError, match="got one that shares none"):
        make_plan(nothing, vocabulary(3), vocabulary(3), size=3, base_rows=3)  # type: ignore[arg-type]
    with pytest.raises(QuickmergeError, match=r"a row for each token of its tokenizer \(3\), got 2"):
        make_plan(nothing, vocabulary(3), vocabulary(3), size=3, base_rows=2)  # type: ignore[arg-type]
