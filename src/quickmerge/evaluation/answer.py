"""One answer about a document, with what it cost: the job a user has."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quickmerge.attention import Multipole, MultipoleStats, multipole
from quickmerge.errors import QuickmergeError, check_text
from quickmerge.evaluation.first_tokens import check_room
from quickmerge.hosts import Run, observe, reduce
from quickmerge.hosts.rows import MIN_TOKENS
from quickmerge.hosts.summary import RunStats
from quickmerge.models.generation import check_temperature
from quickmerge.models.template import apply_chat_template, question
from quickmerge.reducers import Reducer
from quickmerge.tokens.plan import MergePlan


@dataclass
class Answer:
    """An answer's text, seconds to its first token (tokenizing left out), run statistics and, if reduced, plan.

    ``attention`` says what multipole attention read, where it was asked for.
    """

    text: str
    ids: Tensor
    ttft_seconds: float
    stats: RunStats
    plan: MergePlan | None = None
    attention: MultipoleStats | None = None

    def as_dict(self) -> dict[str, Any]:
        """Text and numbers, for JSON."""
        own = {} if self.attention is None else {"attention": self.attention.as_dict()}
        return {"text": self.text, "ttft_seconds": self.ttft_seconds, **self.stats.as_dict(), **own}


def chat(tokenizer: Any, document: str, prompt: str) -> tuple[str, slice]:
    """The text the model reads, and where in it the document stands.

    Document and prompt go into one user message where the tokenizer has a chat template, else one after the other.
    """
    for name, given in (("document", document), ("prompt", prompt)):
        check_text(name, given)
    message = question(document, prompt)
    text = message[0]["content"]
    if getattr(tokenizer, "chat_template", None):
        text = apply_chat_template(tokenizer, message, tokenize=False, add_generation_prompt=True)
    # A template may strip white space at the ends; what is between stays as it is.
    body = document.strip()
    start = text.find(body) if body else len(text)
    if start < 0:
        raise QuickmergeError("the chat template changes the document's text, so its tokens can't be told apart")
    return text, slice(start, start + len(body))


def answer(
    model: Any,
    tokenizer: Any,
    document: str,
    prompt: str,
    reducer: Reducer | None,
    layer: Any = None,
    *,
    max_new_tokens: int = 128,
    sample: bool = False,
    temperature: float | None = None,
    seed: int = 0,
    attention: Multipole | None = None,
    min_tokens: int = MIN_TOKENS,
) -> Answer:
    """Generate an answer to ``prompt`` about ``document``, reading the document through ``reducer``.

    Only the document is reduced: template and prompt tokens stay alone. With no document the prompt itself is
    reduced, sinks and the last tokens apart. Texts of fewer than ``min_tokens`` tokens, template and all, are read in
    full. ``reducer=None`` reads everything, through the same code. With ``attention`` the answer's tokens read the rest
    by its clusters.
    """
    text, where = chat(tokenizer, document, prompt)
    check_room(model, tokenizer, "the text", text, max_new_tokens)
    encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=True, add_special_tokens=False)
    ids = encoded["input_ids"].to(model.device)
    check_fits(model, "the text", ids, max_new_tokens)
    start, end = encoded.pop("offset_mapping")[0].unbind(-1)
    inside = (start >= where.start) & (end <= where.stop)

    def protect(_: Tensor) -> Tensor:
        return (~inside).to(ids.device).expand_as(ids) if document else torch.zeros_like(ids, dtype=torch.bool)

    run: Run = observe(model)
    if reducer is not None:
        run = reduce(model, reducer, layer, protect=protect, recent=1 if document else 16, min_tokens=min_tokens)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    reading = None if attention is None else multipole(model, attention)
    text, seconds = respond(
        model, tokenizer, inputs, run if reading is None else _inside(run, reading), max_new_tokens=max_new_tokens,
        sample=sample, temperature=temperature, seed=seed,
    )  # fmt: skip
    plan = getattr(run, "main_plan", None)
    return Answer(text, ids, seconds, run.summary(), plan, None if reading is None else reading.summary())


@contextmanager
def _inside(*runs: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter several runs one after the other."""
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(run)
        yield


def check_fits(model: Any, what: str, ids: Tensor, max_new_tokens: int) -> None:
    """Raise QuickmergeError unless a model has positions for ``ids (1, N)``, made of ``what``, and an answer."""
    if not ids.numel():
        raise QuickmergeError(f"{what} must have some tokens, got none: the template or the tokenizer drops all of it")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise QuickmergeError(
            f"{what} and --max-new-tokens must fit the model's {limit} positions, "
            f"got {ids.shape[1]} and {max_new_tokens} tokens"
        )


def respond(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    run: Any,
    *,
    max_new_tokens: int,
    sample: bool,
    temperature: float | None = None,
    seed: int,
) -> tuple[str, float]:
    """Generate inside a run: the text of the answer, and seconds to its first token.

    Args:
        model: the model.
        tokenizer: of the model.
        inputs: of ``generate``, ``input_ids (1, N)`` among them.
        run: what to enter meanwhile.
        max_new_tokens: of the answer.
        sample: sample instead of greedy decoding.
        temperature: of the sampling; None leaves it to the model's generation config.
        seed: for that.
    """
    if temperature is not None:
        check_temperature("temperature", temperature)
    torch.manual_seed(seed)
    clock = FirstToken()
    with torch.inference_mode(), run:
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            **({} if temperature is None else {"temperature": temperature}),
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=[clock],
        )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(), clock.seconds


class FirstToken:
    """A stopping criterion that never stops; it notes when the first token was there."""

    def __init__(self) -> None:
        self.began, self.seconds = time.perf_counter(), 0.0

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """False for every row of ``ids (B, N)``."""
        self.seconds = self.seconds or time.perf_counter() - self.began
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
