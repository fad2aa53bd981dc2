"""One answer about a document, with what it cost: the job a user has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from quickmerge.bench.quality import check_fits, check_room
from quickmerge.merge.attach import reduce
from quickmerge.merge.reducers import Reducer
from quickmerge.merge.run import Run, RunStats, observe
from quickmerge.merge.text.modes import MIN_TOKENS, Prefix
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.models.chat import document_chat
from quickmerge.models.generation import check_temperature
from quickmerge.models.load_vision import ask_inputs


@dataclass
class Answer:
    """An answer's text, seconds to its first token (tokenizing left out), run statistics and, if reduced, plan.

    ``attention`` is what another way of saving says of itself, where one was at work too.
    """

    text: str
    ids: Tensor
    ttft_seconds: float
    stats: RunStats
    plan: MergePlan | None = None
    attention: Any = None

    def as_dict(self) -> dict[str, Any]:
        """Text and numbers, for JSON."""
        own = {} if self.attention is None else {"attention": self.attention.as_dict()}
        return {"text": self.text, "ttft_seconds": self.ttft_seconds, **self.stats.as_dict(), **own}


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
    attention: Any = None,
    min_tokens: int = MIN_TOKENS,
) -> Answer:
    """Generate an answer to ``prompt`` about ``document``, reading the document through ``reducer``.

    Only the document is reduced: template and prompt tokens stay alone. With no document the prompt itself is
    reduced, sinks and the last tokens apart. Texts of fewer than ``min_tokens`` tokens, template and all, are read in
    full. ``reducer=None`` reads everything, through the same code. ``attention`` is a run of `quickmerge.multipole` on
    this model: the answer's tokens read the rest by its clusters.
    """
    ids, protect = question_ids(model, tokenizer, document, prompt, max_new_tokens)
    run: Run = observe(model)
    if reducer is not None:
        mode = Prefix(protect=protect, recent=1 if document else 16, min_tokens=min_tokens)
        run = reduce(model, reducer, layer, mode=mode)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    text, seconds = respond(
        model, tokenizer, inputs, run if attention is None else _inside(run, attention), max_new_tokens=max_new_tokens,
        sample=sample, temperature=temperature, seed=seed,
    )  # fmt: skip
    plan = getattr(run, "main_plan", None)
    return Answer(text, ids, seconds, run.summary(), plan, None if attention is None else attention.summary())


def question_ids(
    model: Any, tokenizer: Any, document: str, prompt: str, max_new_tokens: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A prompt about a document through the chat template: its ids ``(1, N)``, and what marks all but the document.

    The function is for `Prefix.protect`. With no document nothing is marked.

    Raises:
        QuickmergeError: they and ``max_new_tokens`` more are longer than the model's positions.
    """
    text, where = document_chat(tokenizer, document, prompt)
    check_room(model, tokenizer, "the text", text, max_new_tokens)
    encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=True, add_special_tokens=False)
    ids: Tensor = encoded["input_ids"].to(model.device)
    check_fits(model, "the text", ids, max_new_tokens)
    start, end = encoded.pop("offset_mapping")[0].unbind(-1)
    inside: Tensor = (start >= where.start) & (end <= where.stop)

    def protect(_: Tensor) -> Tensor:
        outside = torch.zeros_like(inside) if not document else ~inside
        return outside.to(ids.device).expand_as(ids)

    return ids, protect


@contextmanager
def _inside(*runs: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter several runs one after the other."""
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(run)
        yield


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
    out, seconds, _ = written(
        model, tokenizer, inputs, run, max_new_tokens=max_new_tokens, sample=sample, temperature=temperature, seed=seed
    )
    return tokenizer.decode(out, skip_special_tokens=True).strip(), seconds


def written(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    run: Any,
    *,
    max_new_tokens: int,
    sample: bool,
    temperature: float | None = None,
    seed: int,
    watch: Callable[[Tensor], bool] | None = None,
) -> tuple[Tensor, float, float]:
    """The same: the ids ``(n,)`` of the answer, seconds to the first of them, and seconds to the last.

    ``watch`` is shown the ids ``(1, N)`` of prompt and answer whenever the answer has grown, and ends it by True.
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
            stopping_criteria=[clock] if watch is None else [clock, Watched(watch)],
        )
    seconds = time.perf_counter() - clock.began
    return out[0, inputs["input_ids"].shape[1] :], clock.seconds, seconds


class FirstToken:
    """A stopping criterion that never stops; it notes when the first token was there."""

    def __init__(self) -> None:
        self.began, self.seconds = time.perf_counter(), 0.0

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """False for every row of ``ids (B, N)``."""
        self.seconds = self.seconds or time.perf_counter() - self.began
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


class Watched:
    """A stopping criterion that shows the ids to somebody, who may end the text.

    Args:
        watch: gets the ids ``(B, N)``; True ends every row.
    """

    def __init__(self, watch: Callable[[Tensor], bool]) -> None:
        self.watch = watch

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """What ``watch`` says of ``ids (B, N)``, for every row."""
        return torch.full((len(ids),), self.watch(ids), dtype=torch.bool, device=ids.device)


# One answer about images, with what it cost.


@dataclass
class ImageAnswer(Answer):
    """An answer; ``visual`` says of each image (or tile of one) how many visual tokens it had and how many were kept.

    Empty where the model read all of them and nobody counted.
    """

    visual: tuple[tuple[int, int], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Text and numbers, for JSON."""
        return {**super().as_dict(), "visual": [list(pair) for pair in self.visual]}


def answer_images(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    prompt: str,
    reducer: Reducer | None,
    layer: Any = None,
    *,
    max_new_tokens: int = 128,
    sample: bool = False,
    temperature: float | None = None,
    seed: int = 0,
) -> ImageAnswer:
    """Generate an answer to ``prompt`` about ``images``, all in one message, their tokens read through ``reducer``.

    ``reducer=None`` reads everything, through the same code. Seconds to the first token include the vision tower.
    """
    inputs = ask_inputs(processor, list(images), prompt).to(model.device, model.dtype)
    check_fits(model, "the images, the prompt", inputs["input_ids"], max_new_tokens)
    run: Any = observe(model) if reducer is None else reduce(model, reducer, layer)
    text, seconds = respond(
        model, processor.tokenizer, inputs, run, max_new_tokens=max_new_tokens, sample=sample, temperature=temperature,
        seed=seed,
    )  # fmt: skip
    visual = () if reducer is None else tuple((image.count, image.left) for image in run.images)
    return ImageAnswer(text, inputs["input_ids"], seconds, run.summary(), visual=visual)


def clamped(tokens: int, visual: Sequence[tuple[int, int]]) -> str | None:
    """What to tell a user who asked for more ``tokens`` than an image has; None where that is not so."""
    fewer = sorted({there for there, _ in visual if there < tokens})
    if not fewer:
        return None
    had = f"{fewer[0]}" if len(fewer) == 1 else f"{fewer[0]} to {fewer[-1]}"
    return f"note: --tokens {tokens} is more than an image has ({had}), so that all of its tokens were kept"
