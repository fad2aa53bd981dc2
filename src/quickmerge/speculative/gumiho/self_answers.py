"""What a model answers to prompts made of texts, written down once: the texts that its draft heads learn from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quickmerge.datasets.text import Ids, TextWindows
from quickmerge.errors import QuickmergeError, number_at_least, whole_number
from quickmerge.locks import LOCK, sole_writer
from quickmerge.models.chat import apply_chat_template
from quickmerge.models.generation import check_temperature
from quickmerge.models.identity import hash_like, model_hash
from quickmerge.training.metrics import stable_hash

__all__ = ["ASKED", "Answered", "Asking", "prompt_of", "read_answers", "write_answers"]

ASKED = (
    "Summarise this text:",
    "Explain in simple words what this text says:",
    "Continue this text:",
    "List the most important points of this text:",
    "Write a short story that begins like this text:",
    "Ask three questions about this text and answer them:",
    "What is this text about, and for whom was it written?",
    "Write a reply to the author of this text:",
)
"""What is asked about passages in turn, so that answers are of several kinds."""


@dataclass(frozen=True)
class Answered:
    """Token ids of a prompt and of what the model answered, the token that ended it included."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Asking:
    """How a model is asked.

    Args:
        passage: tokens of a text that a prompt is about.
        tokens: of an answer at most.
        temperature: of the sampling; 0 is greedy.
        batch: prompts that are answered at once.
        seed: decides which passages are taken and what is sampled.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    passage: int = 96
    tokens: int = 160
    temperature: float = 0.7
    batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("passage", "tokens", "batch"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0))
        number_at_least("temperature", self.temperature, 0)
        if self.temperature:
            check_temperature("temperature", self.temperature)


def prompt_of(tokenizer: Any, passage: str, number: int) -> list[int]:
    """The ids of the prompt with this number about a passage: a question in the chat template.

    Without a template it is the passage alone, which the model then goes on with.
    """
    if not getattr(tokenizer, "chat_template", None):
        return [int(each) for each in tokenizer(passage)["input_ids"]]
    turn = [{"role": "user", "content": f"{ASKED[number % len(ASKED)]}\n\n{passage}"}]
    text = apply_chat_template(tokenizer, turn, tokenize=False, add_generation_prompt=True)
    return [int(each) for each in tokenizer(text, add_special_tokens=False)["input_ids"]]


def write_answers(
    model: PreTrainedModel,
    tokenizer: Any,
    documents: Sequence[Path | str],
    path: Path,
    count: int,
    asking: Asking,
    *,
    held_out: Iterable[Ids] = (),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Let a model answer ``count`` prompts and write prompts and answers as lines of JSON.

    What the file holds already is kept, so that a run that was killed goes on, and a larger ``count`` adds to it; the
    answers are those that one run would have written.

    Args:
        model: a causal LM.
        tokenizer: of the model.
        documents: text files, or texts.
        path: the file. Its first line says how it was made.
        count: answers that are wanted.
        asking: how the model is asked.
        held_out: token ids of documents of which no passage is asked about.
        progress: called with the answers that there are and the number of them all.

    Raises:
        QuickmergeError: the texts do not make so many prompts, the file was made otherwise, or can't be written.
    """
    count = whole_number("count", count)
    passages = TextWindows(tokenizer, documents, asking.passage, held_out=held_out)
    if count > len(passages):
        raise QuickmergeError(
            f"the texts make {len(passages)} prompts of {asking.passage} tokens, {count} were asked for: give more "
            "texts, or ask for fewer or about shorter passages"
        )
    head = {"model": model_hash(model), "texts": passages.fingerprint(), **vars(asking)}
    # Two that add to one file would mix their answers.
    with sole_writer(path, path.with_name(f".{path.name}{LOCK}")):
        done = _resume(path, head, asking.batch)
        order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(asking.seed)).tolist()
        for start in range(done, count, asking.batch):
            numbers = range(start, min(start + asking.batch, len(passages)))
            prompts = [prompt_of(tokenizer, tokenizer.decode(passages[order[number]]), number) for number in numbers]
            torch.manual_seed(stable_hash("answers", asking.seed, start))
            answers = _generate(model, tokenizer, prompts, asking)
            rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
            _append(path, rows)
            if progress is not None:
                progress(min(start + len(rows), count), count)


@torch.no_grad()
def _generate(model: PreTrainedModel, tokenizer: Any, prompts: list[list[int]], asking: Asking) -> list[list[int]]:
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    end = {ends} if isinstance(ends, int) else set(ends or ())
    pad = tokenizer.pad_token_id
    pad = next(iter(sorted(end)), 0) if pad is None else pad
    wide = max(map(len, prompts))
    ids = torch.tensor([[pad] * (wide - len(prompt)) + prompt for prompt in prompts], device=model.device)
    valid = torch.tensor([[0] * (wide - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if asking.temperature:
        sampling = {"do_sample": True, "temperature": asking.temperature, "top_k": 0, "top_p": 1.0}
    out = model.generate(
        ids, attention_mask=valid, max_new_tokens=asking.tokens, pad_token_id=pad,
        eos_token_id=sorted(end) or None, **sampling,
    )  # fmt: skip
    return [_cut(row, end) for row in out[:, wide:].tolist()]


def _cut(answer: list[int], end: set[int]) -> list[int]:
    """An answer up to the token that ends it."""
    stop = next((at for at, token in enumerate(answer) if token in end), len(answer) - 1)
    return answer[: stop + 1]


def read_answers(path: Path, model: PreTrainedModel, count: int | None = None) -> list[Answered]:
    """The answers that `write_answers` wrote, the first ``count`` of them if that is given.

    Raises:
        QuickmergeError: the file can't be read or understood, holds too few answers, or those of another model.
    """
    rows = _lines(path)
    head = next(rows, None)
    if head is None or "model" not in head:
        raise QuickmergeError(f"{path} must hold answers as quickmerge writes them, got something else")
    given = hash_like(model, head["model"])
    if head["model"] != given:
        raise QuickmergeError(
            f"{path} holds the answers of a model with other weights ({str(head['model'])[:12]}), not of this one "
            f"({given[:12]}): let this model answer, into another file"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    found: list[Answered] = []
    for row in rows:
        ids = [row.get("prompt"), row.get("answer")]
        if not all(_are_ids(each, vocabulary) for each in ids):
            raise QuickmergeError(f"{path} is damaged: answer {len(found) + 1} is not made of token ids")
        found.append(Answered(*(tuple(each or ()) for each in ids)))
    if len(found) < (count or 1):
        raise QuickmergeError(f"{path} must hold at least {count or 1} answers, got {len(found)}")
    return found[:count]


def _are_ids(value: Any, vocabulary: int) -> bool:
    return bool(value) and isinstance(value, list) and all(type(n) is int and 0 <= n < vocabulary for n in value)


def _resume(path: Path, head: dict[str, Any], batch: int) -> int:
    """How many answers are there already, in whole batches; a part of one, which a kill left, is cut off."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, [head])
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole:
        path.unlink()
        return _resume(path, head, batch)
    known = next(_lines(path))
    for name, value in head.items():
        if known.get(name) != value:
            raise QuickmergeError(
                f"{path} was written with {name} {known.get(name)!r}, this run has {value!r}: give the same settings, "
                "or another file"
            )
    kept = (len(whole) - 1) // batch * batch
    if len(lines) > 1 + kept:
        with path.open("r+b") as file:
            file.truncate(sum(map(len, lines[: 1 + kept])))
    return kept


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line without an end is passed over."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise QuickmergeError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise QuickmergeError(f"{path} must be lines of JSON, got binary data") from None
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            return
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise QuickmergeError(f"{path} must be lines of JSON objects, got {line[:60].strip()!r}")
        yield row


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise QuickmergeError(f"{path} can't be written ({error.strerror})") from error
