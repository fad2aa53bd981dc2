from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop

from quickmerge.training import TrainingConfig
from quickmerge.training.step import learning_rate


@st.composite
def configs(draw: st.DrawFn) -> TrainingConfig:
    steps = draw(st.integers(1, 60))
    return TrainingConfig(
        steps=steps,
        warmup=draw(st.integers(0, steps)),
        schedule=draw(st.sampled_from(["constant", "linear", "cosine"])),
        final=draw(st.floats(0, 1)),
        learning_rate=draw(st.floats(1e-6, 1)),
    )


@given(configs())
@prop(150)
def test_up_in_the_warm_up_then_down_to_the_final_share(config: TrainingConfig) -> None:
    rates = [learning_rate(step, config) for step in range(config.steps)]
    top = max(config.warmup - 1, 0)
    assert rates[top] == pytest.approx(config.learning_rate)
    assert all(0 <= rate <= config.learning_rate * (1 + 1e-9) for rate in rates)
    assert rates[:top] == sorted(rates[:top]) and rates[0] > 0
    after = rates[top:]
    assert all(late <= early * (1 + 1e-9) for early, late in pairwise(after))
    if config.schedule == "constant":
        assert set(after) == {config.learning_rate}
    elif len(after) > 1:
        assert rates[-1] == pytest.approx(config.learning_rate * config.final, abs=1e-12)


def test_the_middle_of_each_curve() -> None:
    rates = [
        learning_rate(25, TrainingConfig(steps=101, schedule=schedule, final=0.2, learning_rate=1.0))
        for schedule in ("constant", "linear", "cosine")
    ]
    assert rates == pytest.approx([1.0, 0.2 + 0.8 * 0.75, 0.2 + 0.8 * (2 + 2**0.5) / 4])


def test_a_constant_rate_does_not_depend_on_steps() -> None:
    short, long = (TrainingConfig(steps=steps, warmup=4, schedule="constant") for steps in (10, 1000))
    assert [learning_rate(step, short) for step in range(10)] == [learning_rate(step, long) for step in range(10)]
