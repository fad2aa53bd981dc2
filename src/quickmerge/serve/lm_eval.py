"""lm-eval's model ``quickmerge``: its ``hf`` with a recipe, and with the cost of reading beside the scores.

A subclass of lm-eval's own adapter of transformers. What is asked for as text is generated inside `quickmerge.apply`;
what is scored inside one prefill is scored in block-causal mode, in which that prefill reads the merged past, and
refused where a recipe acts only behind the prefill. This module imports lm-eval and torch; nothing else of quickmerge
imports it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

from quickmerge.console.ending import one_sentence
from quickmerge.errors import QuickmergeError, UnknownModelError, first_sentence, near_match
from quickmerge.merge.place import Merge
from quickmerge.merge.text.modes import BlockCausal, Prefix
from quickmerge.merge.tokens.budget import Ratio, as_budget
from quickmerge.models.download import cache_folder
from quickmerge.models.embedded import EMBEDDED, MODELS
from quickmerge.models.load import find_model
from quickmerge.recipe import Recipe
from quickmerge.serve.costs import Counted
from quickmerge.serve.short_form import SETTINGS, is_setting, recipe_of

__all__ = ["QuickmergeLM", "model_folder"]

LOADING = (
    "attn_implementation", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "device_map",
    "load_in_4bit", "load_in_8bit", "low_cpu_mem_usage", "use_safetensors", "variant",
)  # fmt: skip
"""Arguments of ``from_pretrained`` that lm-eval hands on without naming them itself."""

THEIRS = tuple(name for name in inspect.signature(HFLM.__init__).parameters if name not in ("self", "kwargs"))
"""Arguments of lm-eval's ``hf``."""


def model_folder(name: str) -> str:
    """What lm-eval's ``hf`` can load: the folder of an embedded model, a folder as it is, or a hub id.

    Raises:
        UnknownModelError: it can be none of these.
        DamagedWeightsError: the folder holds truncated or garbled weights.
        FetchError: an embedded model could not be downloaded.
    """
    if name in MODELS:
        return str(EMBEDDED[name].prepare(cache_folder(None), progress=True))
    return find_model(os.path.expanduser(name))


class QuickmergeLM(HFLM):  # type: ignore[misc]
    """A model of transformers that lm-eval asks, with a recipe.

    Without a recipe, or with one that keeps everything, it is lm-eval's ``hf``, bit for bit.

    Args:
        pretrained: an embedded name, a folder, a hub id, or a model of transformers (give its ``tokenizer`` too).
        recipe: a `quickmerge.Recipe`, or where one lies.
        **given: the short form of a recipe, ``reducer="quickmerge", keep=0.4`` and what else
            `quickmerge.serve.short_form` names; and every argument of lm-eval's ``hf``, with its defaults.

    Raises:
        QuickmergeError: an argument is unknown, there is no such model or recipe, or they don't fit each other.
    """

    made: ClassVar[list[QuickmergeLM]] = []
    """The adapters that this process has made, so that whoever started lm-eval can ask them for their costs."""

    def __init__(self, pretrained: str | Any, recipe: Recipe | str | os.PathLike[str] | None = None, **given: Any):
        settings = {name: given.pop(name) for name in list(given) if is_setting(name) and name not in THEIRS}
        for name in given:
            if name not in THEIRS and name not in LOADING:
                known = [*THEIRS, *LOADING, *SETTINGS, "recipe"]
                raise QuickmergeError(f"model_args has the unknown name {name!r}{near_match(name, known)}: give "
                                      "arguments of lm-eval's hf, a recipe, or a reducer with settings")  # fmt: skip
        with one_sentence():
            self.recipe = recipe_of(recipe, settings)
        for place in ("visual", "tower"):
            if place in self.recipe.merges:
                raise QuickmergeError(f"{place} must be left out of a recipe for lm-eval, which gives no images")
        self._scoring = False
        self._tasks: dict[str, str] = {}
        self._task = ""
        if isinstance(pretrained, str):
            pretrained = model_folder(pretrained)
        try:
            super().__init__(pretrained, **given)
        except OSError as error:  # what transformers and the hub raise where there is no such model
            raise UnknownModelError(
                f"the model {pretrained!s:.200} can't be loaded ({first_sentence(error)}): check the name and the "
                "connection, or give a model folder"
            ) from error
        except TypeError as error:
            raise QuickmergeError(
                f"the model can't be loaded with these model_args ({first_sentence(error)})"
            ) from error
        with one_sentence():
            self.counted = Counted(self.model, self._with_tokenizer())
        self.made.append(self)

    def _with_tokenizer(self) -> Recipe:
        """The recipe, whose methods that go by words or lines get them of the tokenizer that lm-eval uses."""
        merge = self.recipe.merge
        if not isinstance(merge, Merge) or isinstance(merge.mode, BlockCausal):
            return self.recipe
        mode = merge.mode or Prefix()
        if mode.tokenizer is not None:
            return self.recipe
        return replace(self.recipe, merge=replace(merge, mode=replace(mode, tokenizer=self.tokenizer)))

    # What lm-eval asks for ------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts behind prompts, which are read with the recipe."""
        with self._asked_by(requests):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations: tasks of multiple choice, and others.

        Raises:
            QuickmergeError: the recipe acts only behind the prefill, inside which these are scored.
        """
        with self._scored(requests):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts: perplexity.

        Raises:
            QuickmergeError: the recipe acts only behind the prefill, inside which these are scored.
        """
        with self._scored(requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into ``config`` of its results: its own facts, and under ``quickmerge`` ours.

        These are the recipe that makes the numbers again, and what reading took: `quickmerge.serve.costs`.
        """
        return {**super().get_model_info(), "quickmerge": self.told()}

    def told(self) -> dict[str, Any]:
        """The recipe and its costs, for JSON. Of several processes it is this one's share of the prompts."""
        try:
            written = self.recipe.as_dict()
        except QuickmergeError:  # with a reducer of a user's own
            written = None
        costs = self.counted.as_dict() if self.counted.costs else {}
        return {"recipe": written, "label": self.recipe.label, "processes": self.world_size, "costs": costs}

    # What it does for it --------------------------------------------------------------------------------------------

    @contextmanager
    def _asked_by(self, requests: Sequence[Any]) -> Iterator[None]:
        """Know, within the block, by which task each prompt is asked for."""
        self._tasks = {str(request.args[0]): str(request.task_name or "") for request in requests}
        self._task = "+".join(dict.fromkeys(self._tasks.values()))
        try:
            yield
        finally:
            self._tasks = {}

    @contextmanager
    def _scored(self, requests: Sequence[Any]) -> Iterator[None]:
        wrong = _only_behind(self.recipe)
        if wrong:
            names = ", ".join(sorted({str(request.task_name) for request in requests if request.task_name}))
            raise QuickmergeError(
                f"{names or 'this task'} scores likelihoods inside the one prefill, and {wrong}: leave the task out, "
                "or use a recipe that merges in block-causal mode alone (mode=block-causal)"
            )
        self._scoring = True
        try:
            with self._asked_by(requests):
                yield
        finally:
            self._scoring = False

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of a batch and its mask ``(B, N)``; its tasks are noted, for the costs."""
        names = dict.fromkeys(self._tasks[each] for each in strings if each in self._tasks)
        self._task = "+".join(names) or self._task
        found: tuple[torch.Tensor, torch.Tensor] = super().tok_batch_encode(strings, *args, **kwargs)
        return found

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """Made-up batches are read by the plain model: it needs no less memory, and nobody asked for them."""
        scoring, self._scoring = self._scoring, False
        try:
            return int(super()._detect_batch_size(*args, **kwargs))
        finally:
            self._scoring = scoring

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits ``(B, N, V)`` of texts ``(B, N)``, padded on the right."""
        if not self._scoring:
            return super()._model_call(inps, *args, **kwargs)  # type: ignore[no-any-return]
        with self.counted.batch(self._task):
            return super()._model_call(inps, *args, **kwargs)  # type: ignore[no-any-return]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **given: Any) -> torch.Tensor:
        """Prompts ``(B, N)``, padded on the left, with what is written behind them."""
        mask = given.get("attention_mask", torch.ones_like(context))
        if not self._row_by_row(mask):
            with self.counted.batch(self._task):
                return super()._model_generate(context, max_length, stop, **given)  # type: ignore[no-any-return]
        rows = []
        for ids, own in zip(context, mask, strict=True):
            gap = len(own) - int(own.sum())
            alone = {**given, "attention_mask": own[None, gap:]}
            with self.counted.batch(self._task):
                out = super()._model_generate(ids[None, gap:], max_length - gap, stop, **alone)
            rows.append(torch.cat([ids[:gap], out[0]]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)

    def _row_by_row(self, mask: torch.Tensor) -> bool:
        """Whether each row of a batch is generated alone, which gives it the text that it has in the batch."""
        if self.recipe.decoding is not None:  # rows accept drafts one by one, and lm-eval's criteria stop whole batches
            return len(mask) > 1
        # Chunks are counted from the first token, so no row may be padded.
        merge = self.recipe.merge
        return isinstance(merge, Merge) and isinstance(merge.mode, BlockCausal) and not bool(mask.all())


def _only_behind(recipe: Recipe) -> str:
    """Why likelihoods can't be scored with a recipe; empty where they can."""
    merge, evictor = recipe.merge, recipe.evictor
    if isinstance(merge, Merge) and not isinstance(merge.mode, BlockCausal) and not _keeps_all(merge.reducer.keep):
        return f"merge ({merge.reducer.label}) is in prefix mode, whose merged tokens are read only behind the prefill"
    if evictor is not None and not _keeps_all(evictor.keep):
        return f"cache ({evictor.label}) makes the cache smaller when the prefill is over"
    if recipe.attention is not None:
        return "attention (multipole) reads clusters for tokens behind the prefill alone"
    if recipe.decoding is not None:
        return "decoding drafts tokens that are generated, of which there are none"
    return ""


def _keeps_all(keep: Any) -> bool:
    budget = as_budget(keep)
    return isinstance(budget, Ratio) and budget.keep == 1
