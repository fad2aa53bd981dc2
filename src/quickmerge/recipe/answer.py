"""One answer by a recipe, about a document or about images, with what it cost; and one by the model alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from quickmerge.bench.quality import check_fits
from quickmerge.merge.bench.answer import question_ids, written
from quickmerge.merge.place import Merge
from quickmerge.merge.run import ObserveRun, observe
from quickmerge.merge.text.modes import Prefix, protecting
from quickmerge.models.load_vision import ask_inputs
from quickmerge.recipe.recipe import Recipe, apply
from quickmerge.recipe.run import RecipeRun, RecipeStats

__all__ = ["RecipeAnswer", "Watch", "answer", "answer_images", "compared"]

Watch = Callable[[RecipeRun | ObserveRun, Tensor], bool]
"""Is shown the run and the ids ``(1, N)`` of prompt and answer whenever the answer has grown; True ends it there."""


@dataclass(frozen=True)
class RecipeAnswer:
    """An answer and what it took.

    Attributes:
        text: the answer.
        ids: ``(n,)`` its tokens, the one that ends it included.
        ttft_seconds: to the first of them; tokenizing left out.
        seconds: to the last of them.
        stats: what the recipe says of itself, or of the model alone what was counted of it.
    """

    text: str
    ids: Tensor
    ttft_seconds: float
    seconds: float
    stats: Any

    @property
    def tokens(self) -> int:
        """How many tokens the answer has."""
        return len(self.ids)

    def as_dict(self) -> dict[str, Any]:
        """Text and numbers, for JSON."""
        took = {"tokens": self.tokens, "ttft_seconds": self.ttft_seconds, "seconds": self.seconds}
        return {"text": self.text, **took, **self.stats.as_dict()}


def answer(
    model: Any,
    tokenizer: Any,
    document: str,
    prompt: str,
    recipe: Recipe | None,
    *,
    max_new_tokens: int = 128,
    sample: bool = False,
    temperature: float | None = None,
    seed: int = 0,
    watch: Watch | None = None,
) -> RecipeAnswer:
    """Generate an answer to ``prompt`` about ``document`` by a recipe; None is the model alone, by the same code.

    Where the recipe merges in prefix mode and protects nothing itself but literals, only the document is merged:
    template and prompt stay alone. With no document the prompt itself is. ``watch`` follows the answer and may end it.

    Raises:
        QuickmergeError: the text and the answer are too long for the model, or the recipe does not fit it.
    """
    ids, protect = question_ids(model, tokenizer, document, prompt, max_new_tokens)
    if recipe is not None and isinstance(recipe.merge, Merge):
        mode = Prefix() if recipe.merge.mode is None else recipe.merge.mode
        if isinstance(mode, Prefix) and not mode.masks and document:
            mode = replace(protecting(mode, protect), recent=1)
            recipe = replace(recipe, merge=replace(recipe.merge, mode=mode))
    inputs = {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}
    return _respond(
        model,
        tokenizer,
        inputs,
        recipe,
        max_new_tokens=max_new_tokens,
        sample=sample,
        temperature=temperature,
        seed=seed,
        watch=watch,
    )


def answer_images(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    prompt: str,
    recipe: Recipe | None,
    *,
    max_new_tokens: int = 128,
    sample: bool = False,
    temperature: float | None = None,
    seed: int = 0,
    watch: Watch | None = None,
) -> RecipeAnswer:
    """The same about ``images``, all in one message. Seconds to the first token include the vision tower."""
    inputs = ask_inputs(processor, list(images), prompt).to(model.device, model.dtype)
    check_fits(model, "the images, the prompt", inputs["input_ids"], max_new_tokens)
    return _respond(
        model, processor.tokenizer, inputs, recipe, max_new_tokens=max_new_tokens, sample=sample,
        temperature=temperature, seed=seed, watch=watch,
    )  # fmt: skip


def _respond(
    model: Any, tokenizer: Any, inputs: Mapping[str, Any], recipe: Recipe | None, watch: Watch | None, **settings: Any
) -> RecipeAnswer:
    run: RecipeRun | ObserveRun = observe(model) if recipe is None else apply(model, recipe)
    seen = None if watch is None else partial(watch, run)
    ids, first, seconds = written(model, tokenizer, inputs, run, watch=seen, **settings)
    text, stats = tokenizer.decode(ids, skip_special_tokens=True).strip(), run.summary()
    # What a pass takes is measured once for each model, and not for this answer.
    once = behind = 0.0
    if isinstance(stats, RecipeStats) and "decoding" in stats:
        once, behind = stats["decoding"].measure_seconds, stats["decoding"].measure_behind_seconds
    return RecipeAnswer(text, ids.cpu(), first - (once - behind), seconds - once, stats)


def compared(recipe: RecipeAnswer, plain: RecipeAnswer) -> str:
    """A line on both answers: how much faster the first token came, and each one behind it; and whether they agree."""
    same = recipe.ids.tolist() == plain.ids.tolist()
    text = "the same text, token for token" if same else "another text"
    told = [f"first token {plain.ttft_seconds / recipe.ttft_seconds:.2f}x as fast"]
    if min(recipe.tokens, plain.tokens) > 1:
        told.append(f"each next one {_pace(plain) / _pace(recipe):.2f}x as fast")
    return f"recipe against plain: {', '.join([*told, text])}"


def _pace(answer: RecipeAnswer) -> float:
    """Seconds for each token behind the first."""
    return (answer.seconds - answer.ttft_seconds) / (answer.tokens - 1)
