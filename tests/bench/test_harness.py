"""Arms take turns, one clock times them, and a result says where it was measured."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quickmerge.bench import harness
from quickmerge.bench.harness import Arm, Result, interleave, now, seconds_of


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 7))
def test_every_arm_meets_every_item_and_none_always_comes_first(arms: int, items: int, rounds: int, first: int) -> None:
    order: list[tuple[int, str, int]] = []

    def measure(arm: int, item: str, number: int) -> tuple[int, str, int]:
        order.append((arm, item, number))
        return order[-1]

    names = [f"item {i}" for i in range(items)]
    found = interleave(list(range(arms)), names, measure, rounds=rounds, first=first)
    total = items * rounds
    assert found == [[(arm, names[i % items], first + i) for i in range(total)] for arm in range(arms)]
    turns = [order[i * arms : (i + 1) * arms] for i in range(total)]
    assert all({arm for arm, _, _ in turn} == set(range(arms)) for turn in turns)
    assert [turn[0][0] for turn in turns] == [(first + i) % arms for i in range(total)]


def test_warming_up_comes_before_all_else_and_is_thrown_away() -> None:
    done: list[str] = []
    found = interleave(
        ["a", "b"], [1, 2], lambda arm, item, number: done.append(f"{arm}{item}") or len(done),
        warm_up=lambda arm, item, number: done.append(f"warm {arm}{item}"),
    )  # fmt: skip
    assert done == ["warm a1", "warm b1", "a1", "b1", "b2", "a2"] and found == [[3, 6], [4, 5]]
    assert interleave([], [1], lambda *_: 1, warm_up=lambda *_: 1) == []


def test_an_arm_is_called_by_its_share_and_entered_by_what_attaches_it() -> None:
    assert [Arm("x", settings=s).label for s in ({}, {"keep": 1.0}, {"keep": 0.25})] == ["x", "x", "x 0.25"]
    with Arm("x").context() as run:
        assert run is None
    with Arm("x", lambda: nullcontext(3)).context() as run:
        assert run == 3
    with Arm("x", lambda model: nullcontext(model)).context("m") as run:
        assert run == "m"


@pytest.mark.parametrize("device", [None, "cpu", "cuda:0", torch.device("cuda")])
def test_the_clock_waits_for_the_device_before_and_after(device: object, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda where: done.append(str(where)))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(len(done)))
    waits = [str(device)] if str(device).startswith("cuda") else []
    seconds = seconds_of(lambda: done.append("call"), device)  # type: ignore[arg-type]
    assert done == [*waits, "call", *waits] and seconds == len(done) - len(waits)
    assert now() == len(done)


def test_a_result_says_where_it_was_measured() -> None:
    result = Result([{"a": 1}], [{"b": 2}]).about(model="m", images=3)
    assert result.meta["environment"]["torch"] == torch.__version__
    assert list(result.meta) == ["model", "images", "environment"]
    assert result.as_dict("images", speeds=[]) == {
        "rows": [{"a": 1}], "images": [{"b": 2}], "speeds": [], "meta": result.meta,
    }  # fmt: skip
    assert Result([], [], {"environment": {"torch": "1"}}).meta == {"environment": {"torch": "1"}}
