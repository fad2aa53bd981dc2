"""What a floor may be put under: scores of documents, each a share of what the plain model has."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quickmerge.bench.literals import known_beside, probes, repeats, survives
from quickmerge.bench.quality import continuation_nll, document_nll
from quickmerge.datasets.task_prompts import lay_out
from quickmerge.datasets.tasks import TaskMaker
from quickmerge.datasets.text import split_document
from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.cost import Shape
from quickmerge.merge.place import Merge
from quickmerge.merge.run import observe
from quickmerge.recipe.recipe import Recipe, apply
from quickmerge.recipe.run import RecipeRun
from quickmerge.recipe.tasks import Asking

__all__ = ["Item", "Score", "literals_score", "recovery_score", "tasks_score"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """A document, or a question about one: its name, what it holds, and what tells it from others."""

    name: str
    holds: Any
    key: str


class Score(ABC):
    """A score: ``sum(top) / sum(bottom)`` over items, where the plain model says what each is worth.

    ``nothing`` says why all of them are worth nothing, where they are.
    """

    nothing = ""

    @abstractmethod
    def plain(self, item: Item) -> Row:
        """What the plain model makes of an item, of JSON's own types; ``bottom`` is what the item is worth."""

    @abstractmethod
    def reduced(self, item: Item, plain: Mapping[str, Any], recipe: Recipe, shape: Shape | None) -> Row:
        """The same by a recipe, beside what the plain one said: ``top``, ``flops_ratio`` and ``cache_ratio``."""


def costs(recipe: Recipe, run: RecipeRun, shape: Shape | None) -> Row:
    """``flops_ratio`` and ``cache_ratio`` of what a run has just read; FLOPs None where they can't be counted."""
    told = [stats for name, stats in run.summary().of.items() if {"merge", "cache"} & set(name.split("+"))]
    if not told:
        return {"flops_ratio": 1.0, "cache_ratio": 1.0}
    (stats,) = told
    reducer = recipe.merge.reducer if isinstance(recipe.merge, Merge) else None
    flops = None
    if shape is not None:
        flops = float(shape.flops_ratio(reducer, stats.tokens_per_layer, stats.tokens_in, recipe.evictor))
    return {"flops_ratio": flops, "cache_ratio": stats.prompt_cache_bytes / stats.prompt_cache_bytes_full}


def _items(
    tokenizer: Any, texts: Sequence[str], tokens: int, target: int
) -> list[Item]:  # fmt: skip
    found = []
    for number, text in enumerate(texts, 1):
        document = split_document(tokenizer, text, f"text {number}", context=tokens, target=target)
        found.append(Item(document.name, document, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()))
    return found


# Recovery ------------------------------------------------------------------------------------------------------------


class _Recovery(Score):
    """What is left of the improvement that reading a document brings to the prediction of what follows it."""

    nothing = "reading them does not help it to predict what follows"

    def __init__(self, model: Any) -> None:
        self.model = model

    def plain(self, item: Item) -> Row:
        document, model = item.holds, self.model
        full = float(document_nll(model, document, observe(model)).mean())
        none = float(continuation_nll(model, document.nothing, document.target, observe(model)).mean())
        return {"full": full, "none": none, "bottom": none - full}

    def reduced(self, item: Item, plain: Mapping[str, Any], recipe: Recipe, shape: Shape | None) -> Row:
        run = apply(self.model, recipe)
        nll = float(document_nll(self.model, item.holds, run).mean())
        return {"nll": nll, "top": plain["none"] - nll, **costs(recipe, run, shape)}


def recovery_score(
    model: Any, tokenizer: Any, texts: Sequence[str], tokens: int, target: int
) -> tuple[list[Item], Score]:
    """Documents, and the score of `quickmerge.bench.quality.recovery`: that of a set is a ratio of sums."""
    return _items(tokenizer, texts, tokens, target), _Recovery(model)


# Literals ------------------------------------------------------------------------------------------------------------


class _Literals(Score):
    """Literals that are still repeated, of those that the plain model repeats."""

    nothing = "it can repeat none of their literals"

    def __init__(self, model: Any, tokenizer: Any, most: int, seed: int) -> None:
        self.model, self.tokenizer, self.most, self.seed = model, tokenizer, most, seed

    def plain(self, item: Item) -> Row:
        asked = probes(self.tokenizer, item.holds.context, most=self.most, seed=self.seed)
        known = repeats(self.model, item.holds.context, asked, observe(self.model))
        return {"asked": len(asked), "known": known, "bottom": sum(known)}

    def reduced(self, item: Item, plain: Mapping[str, Any], recipe: Recipe, shape: Shape | None) -> Row:
        asked = probes(self.tokenizer, item.holds.context, most=self.most, seed=self.seed)
        run = apply(self.model, recipe)
        _, still = survives(self.model, item.holds, known_beside(asked, plain["known"]), run)
        return {"top": sum(still), **costs(recipe, run, shape)}


def literals_score(
    model: Any, tokenizer: Any, texts: Sequence[str], tokens: int, target: int, most: int, seed: int
) -> tuple[list[Item], Score]:
    """Documents, and the share of `quickmerge.bench.literals`, of at most ``most`` literals of each."""
    return _items(tokenizer, texts, tokens, target), _Literals(model, tokenizer, most, seed)


# Tasks ---------------------------------------------------------------------------------------------------------------


class _Tasks(Score):
    """Questions that are still answered exactly, of those that the plain model answers so."""

    nothing = "it answers none of the questions about them"

    def __init__(self, model: Any) -> None:
        self.asking = Asking(model, "last")

    def plain(self, item: Item) -> Row:
        (scored,) = self.asking.ask([item.holds], None)
        return {"bottom": int(scored.exact), "cache_bytes": scored.cache_bytes}

    def reduced(self, item: Item, plain: Mapping[str, Any], recipe: Recipe, shape: Shape | None) -> Row:
        (scored,) = self.asking.ask([item.holds], recipe)
        return {
            # What the plain model can't answer may be answered by luck, and is of no account.
            "top": int(scored.exact and plain["bottom"]), "flops_ratio": scored.flops_ratio,
            "cache_ratio": scored.cache_bytes / plain["cache_bytes"],
        }  # fmt: skip


def tasks_score(
    model: Any, tokenizer: Any, texts: Sequence[str], tokens: int, tasks: Sequence[str], samples: int
) -> tuple[list[Item], Score]:
    """Questions of some tasks, ``samples`` of each, asked in the midst of the documents; see `bench_tasks`."""
    maker = TaskMaker(tokenizer, tokens, texts, queries=1)
    found = []
    for seed in range(samples):
        for task in tasks:
            sample = maker.make(task, seed)
            prompt = lay_out(tokenizer, sample, sample.queries[0], "cue", "last")
            found.append(Item(f"{task} {seed}", prompt, f"{maker.fingerprint} {task} {seed}"))
    if not found:
        raise QuickmergeError(f"samples must be at least 1, got {samples}")
    return found, _Tasks(model)
