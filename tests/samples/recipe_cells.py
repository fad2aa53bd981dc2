"""Cells of the matrix of recipes: ingredients in pairs and triples, ways to generate, and the laws that each must keep.

The ingredients come from `quickmerge.recipe` itself: one that is added there has no sample here, and the tests say so.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, get_args

import torch
from caches import held, past
from decoding_samples import prompts, tiny
from torch import Tensor
from transformers.generation.streamers import BaseStreamer
from vlm_zoo import build as build_vlm
from vlm_zoo import prompt as vlm_prompt

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.cache import Evictor
from quickmerge.merge.place import Merge
from quickmerge.merge.text.modes import BlockCausal, Mode, Prefix
from quickmerge.multipole.settings import Multipole
from quickmerge.recipe.ingredients import PLACES, Ingredients
from quickmerge.recipe.plain import TYPES
from quickmerge.speculative import Drafter, PromptLookup
from quickmerge.speculative.gumiho import Gumiho

MODELS = {
    "language": ("gemma3_text", "gpt_neox", "llama", "qwen3"),
    "vision-language": ("idefics3", "llava", "qwen2_5_vl", "qwen3_vl"),
}
TOWERS = ("idefics3", "llava")
"""Of the latter those in whose tower patches can be merged, as greedy decoding of all four shows."""
WAYS = (
    "greedy", "batch", "sampling", "num_return_sequences", "beams", "streamer", "second turn",
    "prompt_lookup_num_tokens", "assistant_model",
)  # fmt: skip
NEW = 12

NAMES: dict[type, str] = {
    Prefix: "text (prefix)", BlockCausal: "text (block causal)", Multipole: "Multipole", PromptLookup: "lookup",
    Gumiho: "heads", Evictor: "cache",
}  # fmt: skip


def options(name: str) -> list[str]:
    """What may stand at one place of a recipe."""
    if name in PLACES:
        return [NAMES[mode] for mode in get_args(Mode)] if PLACES[name] == "text" else [name]
    if name == "cache":
        return [NAMES[Evictor]]
    if name == "decoding":
        # The engine knows two kinds: those that want features and those that don't. One of each stands for the others.
        return [NAMES[kind] for kind in TYPES.values() if issubclass(kind, Drafter) and kind in NAMES]
    kinds = [kind for kind in TYPES.values() if re.search(rf"\b{kind.__name__}\b", Ingredients.__annotations__[name])]
    return [NAMES[kind] for kind in kinds]


Combination = tuple[str, ...]


def combinations() -> list[Combination]:
    """Every single ingredient, pair and triple."""
    places = [(None, *options(name)) for name in Ingredients.__dataclass_fields__]
    found = [tuple(one for one in each if one is not None) for each in product(*places)]
    return sorted((each for each in found if 1 <= len(each) <= 3), key=lambda each: (len(each), each))


@dataclass(frozen=True)
class Cell:
    """A combination in a way to generate, on a kind of model; of which families."""

    kind: str
    combination: Combination
    way: str

    def __str__(self) -> str:
        return f"{self.kind} / {' + '.join(self.combination)} / {self.way}"

    @property
    def families(self) -> tuple[str, ...]:
        """All four where it is greedy decoding; else one, not always the same."""
        every = MODELS[self.kind]
        if self.way == "greedy":
            return every
        if "tower" in self.combination and self.kind == "vision-language":
            every = TOWERS
        return (every[sum(map(ord, str(self))) % len(every)],)


def cells() -> Iterator[Cell]:
    """All of them. What a kind of model has no place for is tried alone, and refused there."""
    for kind in MODELS:
        for combination in combinations():
            foreign = {"visual", "tower"} if kind == "language" else {NAMES[BlockCausal]}
            if len(combination) > 1 and foreign & set(combination):
                continue
            ways = WAYS if kind == "language" or len(combination) < 3 else WAYS[:2]
            yield from (Cell(kind, combination, way) for way in ways)


# Making them ---------------------------------------------------------------------------------------------------------


@cache
def model_of(kind: str, family: str, seed: int = 0) -> Any:
    """A random model in float64."""
    return tiny(family, seed=seed) if kind == "language" else build_vlm(family, seed=seed).double()


@cache
def heads_of(kind: str, family: str) -> Drafter:
    """Random heads."""
    torch.manual_seed(3)
    return Gumiho.new(model_of(kind, family), mlp_depth=3, inner=20)


def inputs_of(model: Any, kind: str, rows: int) -> dict[str, Any]:
    """A prompt, or a padded batch of them."""
    if kind == "language":
        return dict(prompts([24, 17, 9][:rows], seed=1))
    given = vlm_prompt(model, [[0], [1, 2], []][:rows])
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


def recipe_of(cell: Cell, family: str, *, neutral: bool = False) -> qm.Recipe:
    """The recipe of a cell; a ``neutral`` one has settings with which it changes nothing."""
    keep, text = 1.0 if neutral else 0.5, [1] if cell.kind == "language" else [3]
    budget = 10**6 if neutral else 4
    drafts: dict[str, Any] = {"lookup": PromptLookup(ngram=1, length=4)}
    if "heads" in cell.combination:
        drafts["heads"] = heads_of(cell.kind, family)
    made: dict[str, dict[str, Any]] = {
        "text (prefix)": {"merge": Merge(qm.QuickMerge(keep=keep), text, Prefix(min_tokens=0, recent=2, sinks=1))},
        "text (block causal)": {"merge": Merge(qm.QuickMerge(keep=keep), 0, BlockCausal(chunk=8, window=4, sinks=1))},
        "visual": {"visual": qm.QuickMergeVision(keep=keep)},
        "tower": {"tower": Merge(qm.ToMe(keep=keep), unmerge=family == "idefics3")},
        # Heads that keep different numbers of entries, so that a batch and drafts meet all there is.
        "cache": {"cache": qm.KeyDiff(keep=keep, heads="adaptive", sinks=1, min_tokens=0)},
        "Multipole": {"attention": Multipole(budget=budget, interval=5, sink=2, ratio=0.5, block=16)},
        **{name: {"decoding": qm.Speculation(one, tree=5)} for name, one in drafts.items()},
    }
    given: dict[str, Any] = {}
    for name in cell.combination:
        given |= made[name]
    return qm.Recipe(**given)


class Collect(BaseStreamer):  # type: ignore[misc]
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        pass


def write(cell: Cell, model: Any, rows: int | None = None) -> Tensor:
    """What the model writes in the way of a cell, ``(R, L)`` ids; never ending early."""
    count = {"batch": 3}.get(cell.way, 1) if rows is None else rows
    inputs = inputs_of(model, cell.kind, count)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    stream = Collect()
    if cell.way in ("sampling", "num_return_sequences"):
        torch.manual_seed(7)
        settings |= {"do_sample": True, "temperature": 1.2}
    settings |= {
        "num_return_sequences": {"num_return_sequences": 2},
        "beams": {"num_beams": 2},
        "streamer": {"streamer": stream},
        "second turn": {"return_dict_in_generate": True},
        "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
        "assistant_model": {"assistant_model": tiny("llama", seed=1)},
    }.get(cell.way, {})
    out = model.generate(**inputs, **settings)
    if cell.way == "streamer":
        assert stream.ids == out[0].tolist()
    if cell.way != "second turn":
        return out  # type: ignore[no-any-return]
    more = torch.tensor([[5, 9, 11]])
    turn = {
        "input_ids": torch.cat([out.sequences, more], 1),
        "attention_mask": torch.ones(1, out.sequences.shape[1] + 3, dtype=torch.long),
        **past(copy.deepcopy(held(out))),
    }
    return model.generate(**turn, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)  # type: ignore[no-any-return]


# The laws ------------------------------------------------------------------------------------------------------------


def check(cell: Cell, family: str) -> str:
    """``"works"``, or why it is refused.

    A recipe that drafts writes what it writes without drafts, and samples the same with trees of one node. Settings
    with which an ingredient changes nothing change nothing together. A row of a batch is what it is alone. Decoding of
    transformers' own that guesses writes what plain greedy decoding writes.

    Raises:
        AssertionError: a law does not hold.
    """
    model = model_of(cell.kind, family)
    before = write(replace(cell, way="greedy"), model)
    try:
        recipe = recipe_of(cell, family)
        with torch.no_grad(), qm.apply(model, recipe):
            found = write(cell, model)
        with torch.no_grad():
            _laws(cell, family, model, recipe, found)
    except QuickmergeError as error:
        return "refused: " + re.sub(rf"\b(a )?{type(model).__name__}\b", "the model", str(error))
    finally:
        assert torch.equal(write(replace(cell, way="greedy"), model), before)
    return "works"


def _laws(cell: Cell, family: str, model: Any, recipe: qm.Recipe, found: Tensor) -> None:
    drafting = recipe.speculation
    if drafting is not None:
        sampled = cell.way in ("sampling", "num_return_sequences")
        other = replace(recipe, decoding=replace(drafting, tree=1) if sampled else None)
        with qm.apply(model, other):
            assert torch.equal(found, write(cell, model)), "drafts change what is written"
        return
    neutral = recipe_of(cell, family, neutral=True)
    with qm.apply(model, neutral):
        same = write(cell, model)
    assert torch.equal(same, write(cell, model)), "settings that change nothing change what is written"
    if cell.way in ("prompt_lookup_num_tokens", "assistant_model"):
        with qm.apply(model, recipe):
            assert torch.equal(found, write(replace(cell, way="greedy"), model)), "guesses change what is written"
    if cell.way == "batch":
        with qm.apply(model, recipe):
            alone = write(cell, model, rows=1)
        assert torch.equal(found[0, -NEW:], alone[0, -NEW:]), "a row of a batch is another text than alone"
