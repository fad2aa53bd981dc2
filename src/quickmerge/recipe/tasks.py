"""Tasks asked of recipes and of the plain model: which answers are exact, and what reading the prompts took.

An answer is exact if each of its tokens is the model's first choice where the right ones before it were read; then, and
only then, greedy decoding would write it. So no answer is decoded. Everything that is shared is read once: the plain
model reads a document once for all of its questions, and so does every way where questions come later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from quickmerge.bench.harness import Result, now
from quickmerge.bench.records import Records
from quickmerge.bench.report import Report, Section
from quickmerge.bench.stats import wilson
from quickmerge.bench.table import Column, Table, interval, number, text
from quickmerge.datasets.task_prompts import TaskPrompt, lay_out
from quickmerge.datasets.tasks import Sample, TaskMaker
from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.cost import Shape, model_shape
from quickmerge.merge.place import Merge
from quickmerge.merge.run import ObserveRun, cache_bytes, observe
from quickmerge.models.columns import keeps_columns
from quickmerge.models.compat import cache_argument
from quickmerge.models.precision import dtype_name
from quickmerge.recipe.recipe import Recipe, apply
from quickmerge.recipe.run import RecipeRun

__all__ = ["PLAIN", "Asking", "bench_tasks", "tasks_report"]

Row = dict[str, Any]
PLAIN = "plain"
"""The model alone."""
KEY = ("task", "seed", "question", "way", "recipe_hash")
"""What tells records of the same settings apart."""


@dataclass(frozen=True)
class Scored:
    """An answer: whether it is exact, its mean NLL in nats, and what reading the prompt took."""

    exact: bool
    nll: float
    seconds: float
    cache_bytes: int
    flops_ratio: float


def bench_tasks(
    model: Any,
    tokenizer: Any,
    maker: TaskMaker,
    recipes: Mapping[str, Recipe],
    *,
    tasks: Sequence[str],
    seeds: Sequence[int],
    format: str = "cue",
    mode: str = "last",
    records: Path | None = None,
    about: Mapping[str, Any] | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> Result:
    """Ask the questions of tasks of every recipe and of the plain model, in turns.

    Args:
        model: a causal LM in eval mode, in the precision in which it is to be measured.
        tokenizer: of the model, and of ``maker``.
        maker: makes the samples; all of their questions are asked.
        recipes: by what tables call them; none may be called ``plain``.
        tasks: names of `quickmerge.datasets.tasks.TASKS`.
        seeds: of each task.
        format: one of `quickmerge.datasets.task_prompts.FORMATS`.
        mode: ``last``, the question behind the document, and the prompt is read as a whole; ``first``, in front of it;
            or ``later``, the document is read before anyone asks, and each question behind a copy of that reading.
        records: a file of JSON lines that every measurement is added to; what stands there is not measured again.
        about: what else tells these measurements from others in that file, such as the model's name.
        advance: called with a label before each measurement, for progress: ``len(tasks) * len(seeds)`` times for
            every way.

    Returns:
        Rows over all tasks and for each of them, the plain model first, each with the recipe that makes it again; and a
        record for each way and question.

    Raises:
        QuickmergeError: there is no recipe, task or seed, a recipe does not fit the model, or a prompt is too long.
    """
    for name, given in (("recipes", recipes), ("tasks", tasks), ("seeds", seeds)):
        if not given:
            raise QuickmergeError(f"{name} must be at least one, got none")
    if PLAIN in recipes:
        raise QuickmergeError(f"recipes must have names other than {PLAIN}, got {', '.join(recipes)}")
    ways: dict[str, Recipe | None] = {PLAIN: None, **recipes}
    settings = {
        "tokens": maker.tokens, "filler": maker.fingerprint, "format": format, "mode": mode,
        "dtype": dtype_name(model), **(about or {}),
    }  # fmt: skip
    kept = Records(records, settings, KEY)
    hashes = {name: _hash(recipe) for name, recipe in ways.items()}
    asking = Asking(model, mode)
    found: list[Row] = []
    for turn, (seed, task) in enumerate((seed, task) for seed in seeds for task in tasks):
        sample = maker.make(task, seed)
        prompts = [lay_out(tokenizer, sample, query, format, mode) for query in sample.queries]
        names = list(ways)
        # So that a machine that slows down is no way's own.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            advance(f"{task} {seed}: {name}")
            found += _measured(asking, sample, prompts, name, ways[name], kept, hashes[name])
    found.sort(key=lambda r: (list(tasks).index(r["task"]), r["seed"], r["question"], list(ways).index(r["way"])))
    plain = {_prompt(r): r for r in found if r["way"] == PLAIN}
    for record in found:
        own = plain[_prompt(record)]
        record["solvable"] = own["exact"]
        record["seconds_ratio"] = record["seconds"] / own["seconds"]
        record["cache_ratio"] = record["cache_bytes"] / own["cache_bytes"]
    rows = [_row(found, name, ways[name], None, settings) for name in ways]
    if len(tasks) > 1:
        rows += [_row(found, name, ways[name], task, settings) for task in tasks for name in ways]
    return Result(rows, found, {**settings, "tasks": list(tasks), "seeds": list(seeds)})


def _measured(
    asking: Asking, sample: Sample, prompts: Sequence[TaskPrompt], name: str, recipe: Recipe | None, kept: Records,
    recipe_hash: str,
) -> list[Row]:  # fmt: skip
    """The records of one way for the questions of a sample, of which those that are not there yet are asked."""
    keys = [(sample.task, sample.seed, i, name, recipe_hash) for i in range(len(prompts))]
    todo = [i for i, key in enumerate(keys) if kept.get(*key) is None]
    if todo:
        for i, scored in zip(todo, asking.ask([prompts[i] for i in todo], recipe), strict=True):
            kept.add({**dict(zip(KEY, keys[i], strict=True)), "depth": sample.queries[i].depth,
                      "prompt_tokens": len(prompts[i].prompt), **scored.__dict__})  # fmt: skip
    return [dict(kept.get(*key) or {}) for key in keys]


def _hash(recipe: Recipe | None) -> str:
    """What tells a recipe from another one of the same name; of one that can't be written, its label."""
    if recipe is None:
        return ""
    try:
        told = json.dumps(recipe.as_dict(), sort_keys=True)
    except QuickmergeError:
        told = recipe.label
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _prompt(record: Row) -> tuple[Any, ...]:
    return record["task"], record["seed"], record["question"]


# Reading prompts, and scoring the answers behind them.


class Asking:
    """A model that is asked, in a mode."""

    def __init__(self, model: Any, mode: str) -> None:
        self.model, self.later, self.last = model, mode == "later", mode == "last"
        self.shape: Shape = model_shape(model)
        self.limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def ask(self, prompts: Sequence[TaskPrompt], recipe: Recipe | None) -> list[Scored]:
        """The answers to questions about one document, by a recipe or by the plain model."""
        for prompt in prompts:
            longest = len(prompt.prompt) + len(prompt.lead) + len(prompt.answer)
            if self.limit is not None and longest > self.limit:
                raise QuickmergeError(f"tokens must leave prompt and answer no longer than the model's {self.limit} "
                                      f"positions, got {longest}")  # fmt: skip
        run = observe(self.model) if recipe is None else apply(self.model, recipe)
        with torch.inference_mode():
            if self.later:
                return self._behind_one_reading(prompts, recipe, run)
            if recipe is None and self.last:
                return self._cut_back(prompts, run)
            return [self._whole(prompt, recipe, run) for prompt in prompts]

    def _whole(self, prompt: TaskPrompt, recipe: Recipe | None, run: RecipeRun | ObserveRun) -> Scored:
        """Read a prompt, and the answer behind it."""
        with run:
            cache = DynamicCache(config=self.model.config)
            last, seconds = self._read(prompt.prompt, cache)
            held, flops = cache_bytes(cache), self._flops(recipe, run)
            return Scored(*self._score(prompt, last, cache)[:2], seconds, held, flops)

    def _behind_one_reading(
        self, prompts: Sequence[TaskPrompt], recipe: Recipe | None, run: RecipeRun | ObserveRun
    ) -> list[Scored]:
        """Read the document, and every question behind a copy of its cache."""
        with run:
            cache = DynamicCache(config=self.model.config)
            _, seconds = self._read(prompts[0].shared, cache)
            held, flops = cache_bytes(cache), self._flops(recipe, run)
            found = []
            for prompt in prompts:
                own = deepcopy(cache)
                last, _ = self._read(prompt.behind, own)
                found.append(Scored(*self._score(prompt, last, own)[:2], seconds, held, flops))
            return found

    def _cut_back(self, prompts: Sequence[TaskPrompt], run: RecipeRun | ObserveRun) -> list[Scored]:
        """Read the first prompt, and go back to where its document ended for each of the others, if that can be."""
        found: list[Scored] = []
        with run:
            cache: Cache = DynamicCache(config=self.model.config)
            behind = 0
            for prompt in prompts:
                if found and all(map(keeps_columns, cache.layers)):
                    cache.crop(-behind)
                    last, _ = self._read(prompt.behind, cache)
                    seconds = found[0].seconds
                else:
                    cache = DynamicCache(config=self.model.config)
                    last, seconds = self._read(prompt.prompt, cache)
                held = cache_bytes(cache)
                exact, nll, rest = self._score(prompt, last, cache)
                behind = len(prompt.behind) + rest
                found.append(Scored(exact, nll, seconds, held, 1.0))
        return found

    def _read(self, ids: Sequence[int], cache: Cache) -> tuple[Tensor, float]:
        """Read tokens into a cache: the logits behind the last of them ``(1, 1, V)``, and seconds."""
        model = self.model
        given = torch.tensor([ids], device=model.device)
        began = now(model.device)
        logits: Tensor = model(given, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:], now(model.device) - began

    def _score(self, prompt: TaskPrompt, last: Tensor, cache: Cache) -> tuple[bool, float, int]:
        """Whether the answer is exact, its mean NLL, and how many tokens were read to know."""
        rest, model = prompt.lead + prompt.answer[:-1], self.model
        if rest:
            given = torch.tensor([rest], device=model.device)
            last = torch.cat([last, model(given, **cache_argument(model, cache), use_cache=True).logits], 1)
        answer = torch.tensor(prompt.answer, device=last.device)
        logp = last[0, -len(answer) :].float().log_softmax(-1)
        exact = bool((logp.argmax(-1) == answer).all())
        return exact, -float(logp.gather(-1, answer[:, None]).mean()), len(rest)

    def _flops(self, recipe: Recipe | None, run: Any) -> float:
        """FLOPs of what was just read, over those of the plain model."""
        if recipe is None:
            return 1.0
        told = [stats for name, stats in run.summary().of.items() if {"merge", "cache"} & set(name.split("+"))]
        if not told:
            return 1.0
        (stats,) = told
        reducer = recipe.merge.reducer if isinstance(recipe.merge, Merge) else None
        evictor = recipe.evictor
        if evictor is not None and stats.tokens_in < evictor.min_tokens:
            evictor = None
        return float(self.shape.flops_ratio(reducer, stats.tokens_per_layer, stats.tokens_in, evictor))


# Rows, and what readers see of them.


def _row(
    records: Sequence[Row], name: str, recipe: Recipe | None, task: str | None, settings: Mapping[str, Any]
) -> Row:
    mine = [r for r in records if r["way"] == name and task in (None, r["task"])]
    try:
        written = None if recipe is None else recipe.as_dict()
    except QuickmergeError:  # with a reducer of a user's own
        written = None
    return {
        "name": name, "label": "nothing" if recipe is None else recipe.label, "recipe": written, "task": task,
        "prompts": len(mine), **_share("exact", mine),
        "solvable": sum(r["solvable"] for r in mine), **_share("exact_solvable", [r for r in mine if r["solvable"]]),
        "nll": sum(r["nll"] for r in mine) / len(mine),
        "flops_ratio": sum(r["flops_ratio"] for r in mine) / len(mine),
        "prefill_seconds": median(r["seconds"] for r in mine),
        "prefill_ratio": median(r["seconds_ratio"] for r in mine),
        "cache_ratio": sum(r["cache_ratio"] for r in mine) / len(mine),
        **{key: settings[key] for key in ("format", "mode", "tokens", "dtype")},
    }  # fmt: skip


def _share(name: str, records: Sequence[Row]) -> Row:
    """The share of exact answers and its interval; None where nothing was asked."""
    if not records:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    hits = sum(r["exact"] for r in records)
    low, high = wilson(hits, len(records))
    return {name: hits / len(records), f"{name}_low": low, f"{name}_high": high}


_PERCENT: dict[str, Any] = {"scale": 100, "unit": " %"}
COLUMNS = (
    Column("way", text("name"), "l"),
    Column("exact", interval("exact", ".0f", **_PERCENT), short=number("exact", ".0f", **_PERCENT)),
    Column("of solvable", interval("exact_solvable", ".0f", **_PERCENT),
           short=number("exact_solvable", ".0f", **_PERCENT)),
    Column("NLL", number("nll", ".2f")),
    Column("FLOPs", number("flops_ratio", ".0f", **_PERCENT)),
    Column("prefill", number("prefill_ratio", ".0f", **_PERCENT)),
    Column("cache", number("cache_ratio", ".0f", **_PERCENT)),
    Column("prompts", lambda r: f"{r['prompts']} ({r['solvable']} solvable)", spare=True),
)  # fmt: skip
_METHOD = (
    "An answer is exact if every token of it is the model's first choice behind the right ones before it. Solvable are "
    "the prompts that the plain model answers so. NLL is the mean negative log-likelihood of the answers, in nats per "
    "token. Intervals are Wilson's, of 95 %.",
    "FLOPs, prefill (median seconds) and cache are shares of what the plain model takes to read the same prompt, or in "
    "mode later the document, which is read before anyone asks.",
)


def tasks_report(rows: Sequence[Row], meta: Mapping[str, Any]) -> Report:
    """The report of these rows and of what was measured."""
    whole = [row for row in rows if row["task"] is None]
    each: dict[str, dict[str, Row]] = {row["name"]: {} for row in whole}
    for row in rows:
        if row["task"] is not None:
            each[row["name"]][row["task"]] = row
    sections = [Section("All tasks", Table(COLUMNS, whole))]
    names = list(dict.fromkeys(row["task"] for row in rows if row["task"] is not None))
    if names:
        columns = [COLUMNS[0], *(Column(name, _exact_in(name)) for name in names)]
        by_task = [{"name": name, **found} for name, found in each.items()]
        sections.append(Section("Exact answers by task", Table(columns, by_task)))
    labels = [Column("way", text("name"), "l"), Column("what it does", text("label"), "l")]
    sections.append(Section("What each way does", Table(labels, whole), printed=False))
    title = f"{meta.get('model', 'tasks')}: what is still known of {meta['tokens']} tokens"
    return Report(title, sections, _METHOD, meta)


def _exact_in(task: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{100 * row[task]['exact']:.0f} % of {row[task]['prompts']}"
