"""The words of the library: what a reducer may look at, what it decides, and the maths in between.

Pure tensors: nothing in here knows a model.
"""

from quickmerge.merge.tokens.budget import Budget, Count, Entropy, Mass, Ratio, Remaining, Schedule, Stage, as_budget
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.removal import Removal, removal_for
from quickmerge.merge.tokens.saliency import AttentionTrace, attention_norm, bidirectional_attention, received_attention
from quickmerge.merge.tokens.view import Evidence, TokenView

__all__ = [
    "AttentionTrace",
    "Budget",
    "Count",
    "Entropy",
    "Evidence",
    "Mass",
    "MergePlan",
    "Ratio",
    "Remaining",
    "Removal",
    "Schedule",
    "Stage",
    "TokenView",
    "as_budget",
    "attention_norm",
    "bidirectional_attention",
    "received_attention",
    "removal_for",
]
