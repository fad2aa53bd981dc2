"""Object recognition as next-token prediction (arXiv 2312.02142), with one-shot sampling.

It stands on `quickmerge.merge.reducers` and `quickmerge.merge.vision`, by which its images are read with fewer tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge._lazy import lazy

if TYPE_CHECKING:
    from quickmerge.recognition.config import RecognizerConfig as RecognizerConfig
    from quickmerge.recognition.decode import beam as beam
    from quickmerge.recognition.decode import best_first as best_first
    from quickmerge.recognition.decode import choose as choose
    from quickmerge.recognition.decode import closed_set as closed_set
    from quickmerge.recognition.decode import greedy as greedy
    from quickmerge.recognition.decode import one_shot as one_shot
    from quickmerge.recognition.guess import Guess as Guess
    from quickmerge.recognition.labels import LabelCodec as LabelCodec
    from quickmerge.recognition.labels import Packed as Packed
    from quickmerge.recognition.model import Recognizer as Recognizer
    from quickmerge.recognition.network import Prefix as Prefix
    from quickmerge.recognition.train import LabelLoss as LabelLoss

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "config": ("RecognizerConfig",),
        "decode": (
            "beam",
            "best_first",
            "choose",
            "closed_set",
            "greedy",
            "one_shot",
        ),
        "guess": ("Guess",),
        "labels": (
            "LabelCodec",
            "Packed",
        ),
        "model": ("Recognizer",),
        "network": ("Prefix",),
        "train": ("LabelLoss",),
    },
)
