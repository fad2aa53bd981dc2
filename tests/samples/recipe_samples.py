"""Recipes of every kind, made anew each time."""

from __future__ import annotations

from collections.abc import Callable

import quickmerge as qm

RECIPES: dict[str, Callable[[], qm.Recipe]] = {
    "nothing": qm.Recipe,
    "merge": lambda: qm.Recipe(merge=qm.QuickMerge(keep=0.4)),
    "block_causal": lambda: qm.Recipe(merge=qm.Merge(qm.QuickMerge(0.5, pool=1), 1, qm.BlockCausal(chunk=16))),
    "visual": lambda: qm.Recipe(visual=qm.Merge(qm.SCOPE(keep=qm.Count(16)), positions="consecutive")),
    "tower": lambda: qm.Recipe(tower=qm.Merge(qm.ToMe(keep=0.5), qm.Removal(4), unmerge=True)),
    "all": lambda: qm.Recipe(qm.QuickMerge(), qm.SCOPE(), qm.ToMe(), qm.Multipole(budget=64), qm.PromptLookup()),
    "speculation": lambda: qm.Recipe(decoding=qm.Speculation(qm.PromptLookup(ngram=2), nodes=8, tree=4)),
}
