"""lmms-eval's model ``quickmerge``: a vision-language model with a recipe, asked by lmms-eval's tasks.

It is of lmms-eval's kind ``chat``: a task gives messages with images, the model's own chat template puts them, and the
answer is generated inside `quickmerge.apply`. This module imports lmms-eval and torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts  # type: ignore[import-not-found]
from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from lmms_eval.models.model_utils.gen_metrics import log_metrics  # type: ignore[import-not-found]
from lmms_eval.protocol import ChatMessages  # type: ignore[import-not-found]
from rich.progress import track

from quickmerge.console.ending import one_sentence
from quickmerge.errors import QuickmergeError
from quickmerge.merge.reducers import make_reducer
from quickmerge.models.chat import apply_chat_template
from quickmerge.models.load_vision import load_vlm
from quickmerge.recipe import Recipe
from quickmerge.recipe.options import load_recipe
from quickmerge.serve.costs import Counted

__all__ = ["QuickmergeVLM"]

MOST = 256
"""Tokens that are written where a task does not say."""


class QuickmergeVLM(lmms):  # type: ignore[misc]
    """A vision-language model of transformers that lmms-eval asks, with a recipe.

    Args:
        pretrained: a folder or a hub id.
        recipe: a `quickmerge.Recipe`, or where one lies.
        visual: the short form: a reducer for visual tokens by name, with settings (``scope``).
        keep: the share that it keeps, with ``visual`` alone.
        device: where the model is held.
        dtype: what it is held in.
        batch_size: 1; images of several prompts are of several sizes.
        attn_implementation: as `quickmerge.models.load_vlm` takes it.

    Raises:
        QuickmergeError: an argument is unknown, there is no such model or recipe, or they don't fit each other.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, recipe: Recipe | str | os.PathLike[str] | None = None, visual: str | None = None,
        keep: float | None = None, device: str = "cpu", dtype: str = "float32", batch_size: int | str = 1,
        attn_implementation: str | None = None, **unknown: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        for name in unknown:
            raise QuickmergeError(f"model_args has the unknown name {name!r}: give pretrained, recipe, visual, keep, "
                                  "dtype, attn_implementation")  # fmt: skip
        if str(batch_size) != "1":
            raise QuickmergeError(f"batch_size must be 1 for a model that reads images, got {batch_size}")
        self.recipe = _recipe(recipe, visual, keep)
        self._model, self.processor = load_vlm(
            pretrained, dtype=dtype, device=device, attn_implementation=attn_implementation, progress=False
        )
        with one_sentence():
            self.counted = Counted(self._model, self.recipe)

    @property
    def batch_size(self) -> int:
        """How many prompts are read at once."""
        return 1

    @property
    def device(self) -> Any:
        """Where the model is held."""
        return self._model.device

    @property
    def model(self) -> Any:
        """The model of transformers."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.processor.tokenizer

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers to messages with images, which are read with the recipe.

        Raises:
            QuickmergeError: a message holds a video or sound.
        """
        found, began, written = [], time.perf_counter(), 0
        for request in track(requests, "answering", disable=self.rank != 0):
            context, to_messages, given, doc, task, split = request.args
            messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc]))
            _, videos, sounds = messages.extract_media()
            if videos or sounds:
                raise QuickmergeError(f"{task} shows a video or plays a sound, which quickmerge does not take from "
                                      "lmms-eval: leave the task out")  # fmt: skip
            inputs = apply_chat_template(
                self.processor, messages.to_hf_messages(), add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            ).to(self.device)  # fmt: skip
            with self.counted.batch(task), torch.inference_mode():
                out = self._model.generate(**inputs, **_settings(given), pad_token_id=self.tokenizer.pad_token_id)
            new = out[0, inputs["input_ids"].shape[1] :]
            text = _until(self.tokenizer.decode(new, skip_special_tokens=True), given.get("until"))
            written += len(new)
            found.append(GenerationResult(text, TokenCounts(inputs["input_ids"].shape[1], len(new))))
            self.cache_hook.add_partial("generate_until", (context, given), text)
        self._log(time.perf_counter() - began, written)
        return found

    def _log(self, seconds: float, written: int) -> None:
        """Tell lmms-eval what it writes beside the scores: means over prompts, see `quickmerge.serve.costs`."""
        costs = self.counted.total.as_dict() if self.counted.costs else {}
        log_metrics(
            total_elapsed_time=seconds, total_gen_tokens=written, avg_speed=written / max(seconds, 1e-9),
            additional_metrics={f"quickmerge_{name}": value for name, value in costs.items() if value is not None},
        )  # fmt: skip

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused: texts are scored inside the one prefill.

        Raises:
            QuickmergeError: always.
        """
        raise QuickmergeError("tasks that score likelihoods are not taken from lmms-eval: their texts are read in one "
                              "piece with the prompt; give a task that generates")  # fmt: skip

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused.

        Raises:
            QuickmergeError: always.
        """
        raise QuickmergeError("tasks of several rounds are not taken from lmms-eval: give a task that asks once")


def _recipe(recipe: Recipe | str | os.PathLike[str] | None, visual: str | None, keep: float | None) -> Recipe:
    if recipe is not None and (visual is not None or keep is not None):
        raise QuickmergeError("visual and keep can't be used with recipe, which says all that is done: leave them out")
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is not None:
        return load_recipe(os.path.expanduser(os.fspath(recipe)))
    if visual is None:
        if keep is not None:
            raise QuickmergeError("keep is for a reducer: give visual=scope or another too")
        return Recipe()
    with one_sentence():
        return Recipe(visual=make_reducer(visual, place="visual", **({} if keep is None else {"keep": float(keep)})))


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """What a task's ``generation_kwargs`` are for transformers: greedy unless a temperature is given."""
    found = {name: given[name] for name in ("top_p", "num_beams") if given.get(name) is not None}
    warm = float(given.get("temperature") or 0)
    sample = {"do_sample": True, "temperature": warm} if warm > 0 else {"do_sample": False}
    if not warm:
        found.pop("top_p", None)
    return {**found, **sample, "max_new_tokens": int(given.get("max_new_tokens", MOST))}


def _until(text: str, stops: Any) -> str:
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.split(stop)[0] if stop else text
    return text
