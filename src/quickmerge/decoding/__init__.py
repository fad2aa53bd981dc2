"""Several tokens a step: a drafter guesses how the text goes on, and the target reads all guesses in one pass."""

from __future__ import annotations

from quickmerge.decoding.drafter import Drafter
from quickmerge.decoding.engine import SpeculativeDecoding
from quickmerge.decoding.prompt_lookup import PromptLookup
from quickmerge.decoding.stats import Stats
from quickmerge.decoding.theory import expected_accepted
from quickmerge.decoding.tree import Tree, best_first

__all__ = ["Drafter", "PromptLookup", "SpeculativeDecoding", "Stats", "Tree", "best_first", "expected_accepted"]
