"""Object recognition as next-token prediction (arXiv 2312.02142), with one-shot sampling."""

from quickmerge.recognition.config import RecognizerConfig
from quickmerge.recognition.decode import beam, best_first, choose, closed_set, greedy, one_shot
from quickmerge.recognition.guess import Guess
from quickmerge.recognition.labels import LabelCodec, Packed
from quickmerge.recognition.model import Prefix, Recognizer
from quickmerge.recognition.objective import LabelLoss

__all__ = [
    "Guess",
    "LabelCodec",
    "LabelLoss",
    "Packed",
    "Prefix",
    "Recognizer",
    "RecognizerConfig",
    "beam",
    "best_first",
    "choose",
    "closed_set",
    "greedy",
    "one_shot",
]
