"""Training: one loop for everything that learns, whose runs can be killed at any moment and resumed exactly."""

from quickmerge.training.config import TrainingConfig
from quickmerge.training.loop import TrainingResult, train
from quickmerge.training.objective import Dataset, Objective

__all__ = ["Dataset", "Objective", "TrainingConfig", "TrainingResult", "train"]
