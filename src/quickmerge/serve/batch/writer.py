"""What a worker of a batch job does: it loads a model once, and lets it answer rows in batches.

Nothing here knows of Ray. A batch's rows are answered as each would be alone: rows are padded on the left, a greedy
answer depends on no other row, and a sampled one draws from a generator of its own row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quickmerge.bench.quality import check_fits, check_room
from quickmerge.errors import QuickmergeError, first_sentence
from quickmerge.merge.place import Merge
from quickmerge.merge.text.modes import BlockCausal, Prefix
from quickmerge.models import load
from quickmerge.models.chat import apply_chat_template, document_chat
from quickmerge.models.generation import own_generation
from quickmerge.models.identity import model_hash
from quickmerge.recipe import Recipe, apply
from quickmerge.serve.batch.draws import Draws, row_seed, sampling
from quickmerge.serve.batch.rows import Row

__all__ = ["MODES", "Checked", "Writer", "WriterSettings", "check"]

MODES = ("chat", "completion")


@dataclass(frozen=True)
class WriterSettings:
    """What a worker is told.

    Args:
        model: a name, a folder or a hub id, as `quickmerge.load` takes them.
        recipe: what is done to it.
        mode: ``"chat"``: a prompt is a user's message, by the tokenizer's chat template if it has one;
            ``"completion"``: the model goes on with the text.
        documents: whether the rows are questions about documents; then the documents alone are merged.
        max_new_tokens: of an answer.
        sample: sample instead of greedy decoding.
        temperature: of that; None leaves it to the model's generation config.
        seed: for that.
        dtype: of the weights.
        device: where they are held.
        threads: that torch computes with on a CPU; None leaves it.
    """

    model: str
    recipe: Recipe
    mode: str = "chat"
    documents: bool = False
    max_new_tokens: int = 128
    sample: bool = False
    temperature: float | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None


class Writer:
    """A model that answers rows.

    Args:
        settings: what is wanted.

    Raises:
        QuickmergeError: the model can't be loaded, or the recipe can't be done to it.
    """

    def __init__(self, settings: WriterSettings) -> None:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.model, self.tokenizer = _loaded(settings)
        self._outside: Tensor | None = None
        recipe = settings.recipe
        if settings.documents:
            recipe = self._sparing(recipe)
        self.warpers = sampling(self.model.generation_config, settings.temperature) if settings.sample else None
        merge = recipe.merge if isinstance(recipe.merge, Merge) else None
        # Drafts are checked row by row, each in passes of its own.
        self.one_by_one = recipe.speculation is not None
        self.no_padding = merge is not None and isinstance(merge.mode, BlockCausal)
        self.run = apply(self.model, recipe)
        self.run.attach()

    def _sparing(self, recipe: Recipe) -> Recipe:
        """The recipe, in prefix mode with all but the document left alone, as an answer about one document has it."""
        if not isinstance(recipe.merge, Merge):
            return recipe
        mode = Prefix() if recipe.merge.mode is None else recipe.merge.mode
        if not isinstance(mode, Prefix) or mode.protect is not None:
            return recipe
        mode = replace(mode, protect=self._around, recent=1)
        return replace(recipe, merge=replace(recipe.merge, mode=mode))

    def _around(self, ids: Tensor) -> Tensor:
        """``(B, N)`` bool: what of the batch is no document."""
        assert self._outside is not None
        return self._outside.to(ids.device).expand_as(ids)

    def write(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Answer some rows.

        Returns:
            For each row a dict with ``index``, ``id`` and ``hash``; and with ``error``, or with ``text``,
            ``tokens_read`` of the prompt, ``tokens_kept`` in the cache (mean over layers), ``tokens_written``,
            ``seconds`` from the start of its batch to its last token, and ``finish_reason``: ``"stop"`` or
            ``"length"``.
        """
        found: list[dict[str, Any]] = []
        read: list[tuple[Row, list[int], list[bool]]] = []
        for row in rows:
            try:
                read.append((row, *self._read(row)))
            except ValueError as error:
                found.append(_failed(row, error))
        for batch in self._batches(read):
            try:
                found += self._answer(batch)
                continue
            except Exception as error:
                if len(batch) == 1:
                    found.append(_failed(batch[0][0], error))
                    continue
            # One of them, or all together, can't be done: each by itself tells.
            for one in batch:
                try:
                    found += self._answer([one])
                except Exception as error:
                    found.append(_failed(one[0], error))
        return found

    def _batches(self, read: list[tuple[Row, list[int], list[bool]]]) -> list[list[tuple[Row, list[int], list[bool]]]]:
        if self.one_by_one:
            return [[each] for each in read]
        if not self.no_padding:
            return [read] if read else []
        by_length: dict[int, list[tuple[Row, list[int], list[bool]]]] = {}
        for each in read:
            by_length.setdefault(len(each[1]), []).append(each)
        return list(by_length.values())

    def _read(self, row: Row) -> tuple[list[int], list[bool]]:
        """The ids of a row's prompt, and which of them are no document."""
        wanted = self.settings.max_new_tokens
        text, where = self._text(row)
        check_room(self.model, self.tokenizer, "the prompt", text, wanted)
        documents = row.document is not None
        encoded = self.tokenizer(
            text, add_special_tokens=self.settings.mode == "completion", return_offsets_mapping=documents,
            verbose=False,
        )  # fmt: skip
        ids: list[int] = encoded["input_ids"]
        check_fits(self.model, "the prompt", torch.tensor([ids]), wanted)
        if not documents:
            return ids, [False] * len(ids)
        inside = [start >= where.start and end <= where.stop for start, end in encoded["offset_mapping"]]
        return ids, [not each for each in inside]

    def _text(self, row: Row) -> tuple[str, slice]:
        if isinstance(row.prompt, list):
            if self.settings.mode == "completion":
                raise QuickmergeError("messages of a chat need the chat mode, got the completion mode")
            if not getattr(self.tokenizer, "chat_template", None):
                raise QuickmergeError("messages of a chat need a tokenizer with a chat template, got one without")
            text = apply_chat_template(self.tokenizer, row.prompt, tokenize=False, add_generation_prompt=True)
            return text, slice(0, 0)
        if self.settings.mode == "chat":
            return document_chat(self.tokenizer, row.document or "", row.prompt)
        if row.document is None:
            return row.prompt, slice(0, 0)
        return f"{row.document}\n\n{row.prompt}", slice(0, len(row.document))

    def _answer(self, batch: Sequence[tuple[Row, list[int], list[bool]]]) -> list[dict[str, Any]]:
        model, settings = self.model, self.settings
        width = max(len(ids) for _, ids, _ in batch)
        ends, pad = _ends(model), self.tokenizer.pad_token_id
        pad = pad if pad is not None else min(ends, default=0)
        padded = torch.tensor([[pad] * (width - len(ids)) + ids for _, ids, _ in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids, _ in batch], device=model.device)
        self._outside = torch.tensor([[False] * (width - len(out)) + out for _, _, out in batch], device=model.device)
        asked: dict[str, Any] = {"do_sample": False}
        seeds = [row_seed(settings.seed, row.index) for row, _, _ in batch]
        if settings.sample and self.one_by_one:
            heat = {} if settings.temperature is None else {"temperature": settings.temperature}
            asked = {"do_sample": True, **heat}
            torch.manual_seed(seeds[0])
        elif self.warpers is not None:
            asked["logits_processor"] = type(self.warpers)([*self.warpers, Draws(seeds, model.device)])
        clock = _Clock()
        with torch.inference_mode():
            out = model.generate(
                input_ids=padded, attention_mask=mask, max_new_tokens=settings.max_new_tokens, pad_token_id=pad,
                stopping_criteria=[clock], **asked,
            )  # fmt: skip
        ended = clock.seconds()
        entries = self._entries(len(batch))
        return [
            self._result(row, len(ids), out[i, width:].tolist(), ends, entries[i] if entries else len(ids), ended)
            for i, (row, ids, _) in enumerate(batch)
        ]

    def _entries(self, rows: int) -> list[float]:
        """What the cache holds of each row's prompt; empty where nothing makes it smaller."""
        for stats in self.run.summary().of.values():
            counted: list[float] = getattr(stats, "entries_by_row", [])
            if len(counted) == rows:
                return counted
        return []

    def _result(
        self, row: Row, read: int, written: list[int], ends: set[int], kept: float, seconds: list[float]
    ) -> dict[str, Any]:
        end = next((at for at, token in enumerate(written) if token in ends), None)
        written = written if end is None else written[: end + 1]
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        return {
            **_named(row), "text": text.strip() if self.settings.mode == "chat" else text, "tokens_read": read,
            "tokens_kept": float(kept), "tokens_written": len(written),
            "seconds": seconds[min(len(written), len(seconds)) - 1],
            "finish_reason": "length" if end is None else "stop",
        }  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """What trying a job's model out has told: a hash of its weights (None where it has none) and notes to tell."""

    weights: str | None
    notes: tuple[str, ...]


def check(settings: WriterSettings) -> Checked:
    """Load the model and see that the recipe can be done to it; nothing is kept.

    Raises:
        QuickmergeError: the model can't be loaded, or the recipe is for another one.
    """
    model, _, notes = _opened(settings)
    settings.recipe.check(model)
    if settings.sample:
        sampling(model.generation_config, settings.temperature)
    try:
        weights: str | None = model_hash(model)
    except QuickmergeError:  # packed weights have no such hash
        weights = None
    return Checked(weights, tuple(notes))


def _opened(settings: WriterSettings) -> tuple[Any, Any, list[str]]:
    model, tokenizer = load(settings.model, dtype=settings.dtype, device=settings.device, progress=False)
    return model, tokenizer, own_generation(model)


def _loaded(settings: WriterSettings) -> tuple[Any, Any]:
    model, tokenizer, _ = _opened(settings)
    return model, tokenizer


def _ends(model: Any) -> set[int]:
    """The tokens that end a text."""
    given = model.generation_config.eos_token_id
    return set() if given is None else {given} if isinstance(given, int) else set(given)


def _named(row: Row) -> dict[str, Any]:
    return {"index": row.index, "id": row.id, "hash": row.hash}


def _failed(row: Row, error: BaseException) -> dict[str, Any]:
    told = str(error) if isinstance(error, QuickmergeError) else f"{type(error).__name__}: {first_sentence(error)}"
    return {**_named(row), "error": told}


class _Clock:
    """A stopping criterion that never stops; it notes when each token was there."""

    def __init__(self) -> None:
        self._began, self._at = time.perf_counter(), list[float]()

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """False for every row of ``ids (B, N)``."""
        self._at.append(time.perf_counter() - self._began)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def seconds(self) -> list[float]:
        """From the beginning to each token of the batch; of drafted ones several come at once."""
        return self._at or [time.perf_counter() - self._began]
