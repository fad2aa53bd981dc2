"""Several tokens a step: a drafter guesses how the text goes on, and the target reads all guesses in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge._lazy import lazy

if TYPE_CHECKING:
    from quickmerge.speculative.best_of import BestOf as BestOf
    from quickmerge.speculative.drafter import Drafter as Drafter
    from quickmerge.speculative.drafter import Stats as Stats
    from quickmerge.speculative.engine import SpeculativeDecoding as SpeculativeDecoding
    from quickmerge.speculative.lookup import PromptLookup as PromptLookup
    from quickmerge.speculative.suffix import SuffixDecoding as SuffixDecoding
    from quickmerge.speculative.tree import Tree as Tree
    from quickmerge.speculative.tree import best_first as best_first
    from quickmerge.speculative.tree import expected_accepted as expected_accepted

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "best_of": ("BestOf",),
        "drafter": (
            "Drafter",
            "Stats",
        ),
        "engine": ("SpeculativeDecoding",),
        "lookup": ("PromptLookup",),
        "suffix": ("SuffixDecoding",),
        "tree": (
            "Tree",
            "best_first",
            "expected_accepted",
        ),
    },
)
