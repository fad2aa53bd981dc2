"""One of each kind of what goes to the hub, small and untrained, and what tells two of them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from calm_samples import small_calm, words_tokenizer
from recipe_samples import drafts, predictors, prior
from recognition_samples import build

import quickmerge as qm
from quickmerge.calm import CalmAutoencoder


def everything() -> qm.Recipe:
    """A recipe with three trained parts, each in a folder of its own, and settings beside."""
    return qm.Recipe(merge=prior().merge, tower=predictors().tower, decoding=drafts().decoding, visual=qm.SCOPE(0.5))


MAKE: dict[str, Callable[[], Any]] = {
    "recipe": everything,
    "prior": lambda: prior().merge.reducer.prior,  # type: ignore[union-attr]
    "gumiho": lambda: drafts().decoding.drafter,  # type: ignore[union-attr]
    "dynamicvit": lambda: predictors().tower.reducer,  # type: ignore[union-attr]
    "recognizer": lambda: build(),
    "calm": lambda: small_calm(),
    "calm_autoencoder": lambda: small_calm().autoencoder,
}
OPEN: dict[str, Callable[..., Any]] = {
    "recipe": qm.Recipe.from_pretrained,
    "prior": qm.Prior.from_pretrained,
    "gumiho": qm.Gumiho.from_pretrained,
    "dynamicvit": qm.DynamicViT.from_pretrained,
    "recognizer": qm.Recognizer.from_pretrained,
    "calm": qm.CalmForCausalLM.from_pretrained,
    "calm_autoencoder": CalmAutoencoder.from_pretrained,
}


def push(kind: str, thing: Any, name: str, **options: Any) -> str:
    if kind == "calm":
        options["tokenizer"] = words_tokenizer()
    address: str = thing.push_to_hub(name, **options)
    return address


def state(thing: Any) -> dict[str, torch.Tensor]:
    network = thing.predictors if isinstance(thing, qm.DynamicViT) else getattr(thing, "network", thing)
    found: dict[str, torch.Tensor] = network.state_dict()
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two are equal: recipes by all that they hold, others bit for bit by their weights."""
    if isinstance(one, qm.Recipe):
        return one == other
    left, right = state(one), state(other)
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )
