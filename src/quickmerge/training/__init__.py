"""Training: one loop for everything that learns, whose runs can be killed at any moment and resumed exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge._lazy import lazy

if TYPE_CHECKING:
    from quickmerge.training.config import TrainingConfig as TrainingConfig
    from quickmerge.training.loop import TrainingResult as TrainingResult
    from quickmerge.training.loop import train as train
    from quickmerge.training.objective import Dataset as Dataset
    from quickmerge.training.objective import Objective as Objective

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "config": ("TrainingConfig",),
        "loop": ("TrainingResult", "train"),
        "objective": ("Dataset", "Objective"),
    },
)
