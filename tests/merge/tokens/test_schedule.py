from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import prop

from quickmerge.merge.tokens import Count, Entropy, Mass, Ratio, Remaining, Schedule, Stage
from quickmerge.merge.tokens.budget import FIRST_DEPTH, LAST_DECAY, LAST_DEPTH

layer_sets = st.sets(st.integers(1, 39), min_size=1, max_size=6).map(lambda s: tuple(sorted(s)))
keeps = st.floats(0.01, 1.0) | st.just(1.0)
decays = st.floats(0.05, 1.0) | st.just(1.0)


@prop(100)
@given(layer_sets, decays, keeps, st.integers(2, 41))
def test_the_blocks_after_the_first_merge_read_keep_on_average(
    layers: tuple[int, ...], decay: float, keep: float, depth: int
) -> None:
    assume(layers[-1] < depth)
    stages = Schedule(layers, decay).stages(keep, depth)
    assert tuple(s.layer for s in stages) == layers
    read = []
    for block in range(layers[0], depth):
        read.append(next(float(s.keep) for s in reversed(stages) if s.layer <= block))
    assert math.fsum(read) / len(read) == pytest.approx(keep, rel=1e-12)


@prop(100)
@given(layer_sets, decays, keeps, st.integers(2, 41))
def test_shares_fall_by_decay_and_lie_in_range(layers: tuple[int, ...], decay: float, keep: float, depth: int) -> None:
    assume(layers[-1] < depth)
    shares = [float(s.keep) for s in Schedule(layers, decay).stages(keep, depth)]
    assert all(0 < k <= 1 for k in shares)
    for before, then in pairwise(shares):
        assert then <= before
        # a share that was cut to 1 hands what it lost to the later ones, which then fall less than by decay
        if before < 1:
            assert then == pytest.approx(decay * before, rel=1e-12)
        else:
            assert then >= decay * before - 1e-12


@pytest.mark.parametrize(
    ("layers", "decay", "keep", "depth", "shares"),
    [
        ((8,), 0.7, 0.4, 30, [0.4]),
        ((2, 4), 0.5, 0.6, 6, [0.8, 0.4]),
        ((2, 4), 1.0, 0.6, 6, [0.6, 0.6]),
        ((2, 4), 0.5, 0.9, 6, [1.0, 0.8]),
        ((1, 2, 3), 0.5, 0.75, 4, [1.0, 5 / 6, 5 / 12]),
        ((1, 2, 3), 0.1, 0.9, 4, [1.0, 1.0, 0.7]),
        ((3, 9), 0.7, 1.0, 12, [1.0, 1.0]),
    ],
)
def test_known_schedules(layers: tuple[int, ...], decay: float, keep: float, depth: int, shares: list[float]) -> None:
    stages = Schedule(layers, decay).stages(keep, depth)
    assert [s.layer for s in stages] == list(layers)
    assert [s.keep for s in stages] == pytest.approx(shares, rel=1e-12)


@pytest.mark.parametrize("keep", [0.4, 1, Ratio(0.3), Count(7), Entropy(), Mass(0.8)])
def test_a_single_merge_hands_keep_on_as_it_is(keep: Any) -> None:
    assert Schedule((5,)).stages(keep, 12) == [Stage(5, keep)]


@pytest.mark.parametrize("keep", [Count(7), Entropy(), Mass(0.8), Ratio(0.4)])
def test_a_budget_rules_the_first_of_several_merges(keep: Any) -> None:
    stages = Schedule((2, 5, 7), 0.3).stages(keep, 12)
    assert stages == [Stage(2, keep), Stage(5, Remaining(0.3)), Stage(7, Remaining(0.3))]


@pytest.mark.parametrize("keep", [0, 1.5, -1, math.nan, None, True])
@pytest.mark.parametrize("layers", [(2,), (2, 5)])
def test_a_bad_keep_is_refused(keep: Any, layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"keep must be a number in \(0, 1\]"):
        Schedule(layers).stages(keep, 12)


@pytest.mark.parametrize("layers", [(), (0,), (-1,), (3, 3), (5, 2), (2.0,), (True,), ("2",)])
def test_layers_that_do_not_rise_from_1_are_refused(layers: Any) -> None:
    with pytest.raises(ValueError) as error:
        Schedule(layers)
    assert str(error.value) == f"layer must be rising whole numbers of at least 1, got {list(layers)}"


@pytest.mark.parametrize("decay", [0, -0.5, 1.1, math.nan, "0.5", None])
def test_a_decay_out_of_range_is_refused(decay: Any) -> None:
    with pytest.raises(ValueError) as error:
        Schedule((1,), decay)
    assert str(error.value) == f"decay must be a number in (0, 1], got {decay!r}"


@pytest.mark.parametrize("layers", [(12,), (3, 30)])
def test_a_block_past_the_last_is_refused(layers: tuple[int, ...]) -> None:
    schedule = Schedule(layers)
    message = rf"layer must lie in 1\.\.11 for a model of 12 blocks, got {layers[-1]}"
    with pytest.raises(ValueError, match=message):
        schedule.check(12)
    with pytest.raises(ValueError, match=message):
        schedule.stages(0.5, 12)
    with pytest.raises(ValueError, match=message):
        Schedule.of(layers, 12)


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(2, (1,)), (3, (1,)), (4, (1, 3)), (6, (2, 5)), (12, (3, 10)), (24, (6, 20)), (26, (7, 22)), (30, (8, 25)),
     (32, (9, 27)), (80, (21, 67))],
)  # fmt: skip
def test_the_default_merges_early_and_near_the_top(depth: int, layers: tuple[int, ...]) -> None:
    assert Schedule.of(None, depth).layers == layers
    assert abs(layers[0] - FIRST_DEPTH * depth) <= max(0.5, 1 - FIRST_DEPTH * depth)
    assert len(layers) == 1 or abs(layers[1] - LAST_DEPTH * depth) <= 0.5


@prop(50)
@given(st.integers(2, 200), keeps)
def test_the_default_is_always_allowed(depth: int, keep: float) -> None:
    schedule = Schedule.of(None, depth)
    schedule.check(depth)
    assert len(schedule.layers) == 1 or schedule.decay == LAST_DECAY
    assert all(0 < float(stage.keep) <= 1 for stage in schedule.stages(keep, depth))


def test_of_takes_one_block_or_several() -> None:
    assert Schedule.of(4, 12).layers == (4,)
    assert Schedule.of([2, 5], 12).layers == (2, 5)
    assert Schedule.of((2, 5), 12) == Schedule((2, 5))
