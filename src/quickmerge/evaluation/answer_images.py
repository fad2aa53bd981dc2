"""One answer about images, with what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from quickmerge.evaluation.answer import Answer, check_fits, respond
from quickmerge.hosts import observe, reduce
from quickmerge.models.vlm import ask_inputs
from quickmerge.reducers import Reducer


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
