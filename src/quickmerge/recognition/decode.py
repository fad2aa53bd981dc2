"""The ways to get labels out of a recognizer.

| way | what it gives |
| --- | --- |
| `one_shot` | the k most probable first tokens, each completed greedily; the paper's way |
| `best_first` | the k most probable labels, exactly |
| `closed_set`, `choose` | the exact probability of each label of a list |
| `greedy`, `beam` | a sequence of labels, one after the other, as a caption would be decoded; baselines |
"""

from quickmerge.recognition.branches import LAYOUTS, Branches, branches, choose, closed_set, one_shot
from quickmerge.recognition.guess import Guess, check_share
from quickmerge.recognition.search import best_first
from quickmerge.recognition.sequence import beam, greedy

__all__ = [
    "LAYOUTS",
    "Branches",
    "Guess",
    "beam",
    "best_first",
    "branches",
    "check_share",
    "choose",
    "closed_set",
    "greedy",
    "one_shot",
]
