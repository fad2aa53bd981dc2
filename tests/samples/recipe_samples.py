"""Recipes of every kind, made anew each time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from decoding_samples import tiny
from gumiho_samples import heads
from torch import nn

import quickmerge as qm
from quickmerge.merge.prior.config import PriorConfig
from quickmerge.merge.reducers.dynamicvit import Predictor

RECIPES: dict[str, Callable[[], qm.Recipe]] = {
    "nothing": qm.Recipe,
    "merge": lambda: qm.Recipe(merge=qm.QuickMerge(keep=0.4)),
    "block_causal": lambda: qm.Recipe(merge=qm.Merge(qm.QuickMerge(0.5, pool=1), 1, qm.BlockCausal(chunk=16))),
    "visual": lambda: qm.Recipe(visual=qm.Merge(qm.SCOPE(keep=qm.Count(16)), positions="consecutive")),
    "tower": lambda: qm.Recipe(tower=qm.Merge(qm.ToMe(keep=0.5), qm.Removal(4), unmerge=True)),
    "all": lambda: qm.Recipe(qm.QuickMerge(), qm.SCOPE(), qm.ToMe(), qm.Multipole(budget=64), qm.PromptLookup()),
    "cache": lambda: qm.Recipe(qm.QuickMerge(keep=0.4), cache=qm.SnapKV(keep=0.3, heads="adaptive")),
    "speculation": lambda: qm.Recipe(decoding=qm.Speculation(qm.PromptLookup(ngram=2), nodes=8, tree=4)),
}


# With trained parts, none of which was ever trained.


def prior() -> qm.Recipe:
    torch.manual_seed(0)
    known = {"layers": [1], "reducer": {"pool": 3}}
    made = qm.Prior(PriorConfig(features=32, width=16, heads=2, depths=(1, 2), trained_for=known)).eval()
    return qm.Recipe(merge=qm.QuickMergePrior.from_prior(made, keep=qm.Count(9)))


def predictors() -> qm.Recipe:
    torch.manual_seed(0)
    networks = nn.ModuleList([Predictor(8), Predictor(8)])
    return qm.Recipe(tower=qm.DynamicViT(0.6, networks, (1, 3), {"model": "mine"}))


def drafts() -> qm.Recipe:
    made = heads(tiny())
    made.network.float()
    return qm.Recipe(
        decoding=qm.Speculation(qm.Gumiho(made.network, dtype="bfloat16", beam=3, fta="duplicate"), tree=7)
    )


PARTS: dict[str, tuple[Callable[[], qm.Recipe], str]] = {
    "prior": (prior, "merge-prior"),
    "predictors": (predictors, "tower-predictors"),
    "heads": (drafts, "decoding-network"),
}
