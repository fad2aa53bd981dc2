"""A document that is read once, and as many questions about it as one likes.

A document can be reduced before anybody asks, and what is left of it copied for each question. That costs one prefill
in place of many; and whatever is reduced can't know what will be asked. So what stays is by default what the model
needs to say the document again (KVzip), and not what the last tokens look at.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from quickmerge.bench.harness import now
from quickmerge.bench.quality import check_fits, check_room
from quickmerge.errors import QuickmergeError, check_string
from quickmerge.merge.bench.answer import written
from quickmerge.merge.cache import Evictor, KVzip
from quickmerge.merge.place import Merge
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.run import ObserveRun, cache_bytes, observe
from quickmerge.merge.text.modes import Prefix, protecting
from quickmerge.models.chat import around_document
from quickmerge.models.compat import cache_argument, cache_name
from quickmerge.recipe.answer import RecipeAnswer
from quickmerge.recipe.recipe import Recipe, apply
from quickmerge.recipe.run import RecipeRun

__all__ = ["Reading", "read"]

DEFAULT = Recipe(cache=KVzip(0.4))


class Reading:
    """What a model has read of a document; see `read`, which makes it.

    Attributes:
        model: the model, which is as it was between questions.
        tokenizer: of the model.
        recipe: what is done to the model while it reads and answers; None for nothing.
        ids: ``(1, N)``, the tokens that were read: the beginning of the user's turn and the document.
        seconds: that it took to read them.
        stats: what the recipe says of it, or what was counted of the model alone.
    """

    def __init__(
        self, model: Any, tokenizer: Any, recipe: Recipe | None, before: str, ids: Tensor, cache: Cache, seconds: float,
        stats: Any,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.recipe, self.ids = model, tokenizer, recipe, ids
        self.seconds, self.stats = seconds, stats
        self._before, self._cache = before, cache

    def __repr__(self) -> str:
        label = "nothing" if self.recipe is None else self.recipe.label
        return f"{type(self).__name__}({self.ids.shape[1]} tokens, {label})"

    @property
    def cache_bytes(self) -> int:
        """Memory of the keys and values that are held of the document."""
        return cache_bytes(self._cache)

    def ask(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        sample: bool = False,
        temperature: float | None = None,
        seed: int = 0,
    ) -> RecipeAnswer:
        """Answer a question about the document, in the same user's turn.

        Each question is read behind a copy of what was read, so that an answer depends on no other one. Seconds to the
        first token are those of the question; the document's are the reading's own.

        Args:
            prompt: what is asked.
            max_new_tokens: of the answer.
            sample: sample instead of greedy decoding.
            temperature: of the sampling; None leaves it to the model's generation config.
            seed: for that.

        Raises:
            QuickmergeError: the prompt is empty, document, prompt and answer are too long for the model, or its chat
                template writes before the document what depends on the prompt.
        """
        _check_text("prompt", prompt)
        before, behind = around_document(self.tokenizer, prompt)
        if before != self._before:
            raise QuickmergeError("the chat template writes something else before the document for this prompt, so "
                                  "that the document can't be read before anyone asks")  # fmt: skip
        ids = torch.cat([self.ids, _ids(self.model, self.tokenizer, behind)], 1)
        check_fits(self.model, "the document, the prompt", ids, max_new_tokens)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), cache_name(): deepcopy(self._cache)}
        run = _run(self.model, self.recipe)
        out, first, seconds = written(
            self.model, self.tokenizer, inputs, run, max_new_tokens=max_new_tokens, sample=sample,
            temperature=temperature, seed=seed,
        )  # fmt: skip
        text = self.tokenizer.decode(out, skip_special_tokens=True).strip()
        stats = self.stats if self.recipe is None else run.summary()
        return RecipeAnswer(text, out.cpu(), first, seconds, stats)


def read(
    model: Any, tokenizer: Any, document: str, recipe: Recipe | Reducer | Merge | Evictor | None = DEFAULT
) -> Reading:
    """Read a document once, with fewer tokens, and ask about it as often as one likes.

    ``reading = read(model, tokenizer, text)``, then ``reading.ask("...").text``. The document stands at the beginning
    of the user's turn, where the tokenizer has a chat template, and each question behind it in that turn. White space
    around the document is left out.

    Args:
        model: a causal language model in eval mode.
        tokenizer: of the model.
        document: what is read.
        recipe: what is done to the model while it reads and while it answers: a `Recipe`, a reducer, a `Merge`, or a
            method for the cache. Where it merges in prefix mode and protects nothing itself but literals, the chat
            template in front of the document stays alone. None reads everything. Default: the document is read a second
            time, by which 0.4 of its cache is chosen (`KVzip`).

    Returns:
        A `Reading`.

    Raises:
        UnsupportedModelError: the recipe can't be done to the model.
        QuickmergeError: the document is empty or too long for the model, or the recipe is none.
    """
    _check_text("document", document)
    if isinstance(recipe, (Reducer, Merge)):
        recipe = Recipe(merge=recipe)
    elif isinstance(recipe, Evictor):
        recipe = Recipe(cache=recipe)
    if recipe is not None and not isinstance(recipe, Recipe):
        raise QuickmergeError(
            f"recipe must be a Recipe, a reducer, a Merge, a method for the cache or None, got {recipe!r:.200}"
        )
    document = document.strip()
    before, _ = around_document(tokenizer, "?")
    check_room(model, tokenizer, "the document", before + document, 1)
    head = _ids(model, tokenizer, before)
    ids = torch.cat([head, _ids(model, tokenizer, document)], 1)
    check_fits(model, "the document", ids, 1)
    run = _run(model, _protecting(recipe, head.shape[1]))
    # Drafted tokens are taken back, so that what goes with them needs a cache without sliding windows.
    drafts = recipe is not None and recipe.speculation is not None
    cache = DynamicCache() if drafts else DynamicCache(config=model.config)
    with torch.inference_mode(), run:
        began = now(model.device)
        # The logits are of no account: a question follows.
        model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        seconds = now(model.device) - began
    return Reading(model, tokenizer, recipe, before, ids, cache, seconds, run.summary())


def _run(model: Any, recipe: Recipe | None) -> RecipeRun | ObserveRun:
    return observe(model) if recipe is None else apply(model, recipe)


def _protecting(recipe: Recipe | None, head: int) -> Recipe | None:
    """The recipe with the first ``head`` tokens of a prompt left alone, where it can and doesn't say otherwise."""
    if recipe is None or not isinstance(recipe.merge, Merge) or not head:
        return recipe
    mode = Prefix() if recipe.merge.mode is None else recipe.merge.mode
    if not isinstance(mode, Prefix) or mode.masks:
        return recipe

    def protect(ids: Tensor) -> Tensor:
        return (torch.arange(ids.shape[1], device=ids.device) < head).expand_as(ids)

    return replace(recipe, merge=replace(recipe.merge, mode=protecting(mode, protect)))


def _ids(model: Any, tokenizer: Any, text: str) -> Tensor:
    """``(1, n)`` on the model's device, nothing added; n may be 0."""
    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    return torch.tensor([found], dtype=torch.long, device=model.device)


def _check_text(name: str, text: str) -> None:
    check_string(name, text)
    if not text.strip():
        raise QuickmergeError(f"{name} must hold some text, got an empty one")
