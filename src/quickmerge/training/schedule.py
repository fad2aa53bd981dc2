"""The learning rate of a step."""

from __future__ import annotations

import math

from quickmerge.training.config import TrainingConfig

__all__ = ["learning_rate"]


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of one step, a pure function, so that no scheduler has a state to save.

    The rate rises evenly over the warm-up steps and has its full height in the last of them. From there ``linear``
    and ``cosine`` go down to ``final`` times the height, which the last step has.

    Args:
        step: counted from 0.
        config: the settings; `steps` does not matter when the schedule is constant.
    """
    if step < config.warmup:
        return config.learning_rate * ((step + 1) / config.warmup)
    if config.schedule == "constant":
        return config.learning_rate
    first = max(config.warmup - 1, 0)
    way = min((step - first) / max(config.steps - 1 - first, 1), 1.0)
    height = 1 - way if config.schedule == "linear" else (1 + math.cos(math.pi * way)) / 2
    return config.learning_rate * (config.final + (1 - config.final) * height)
