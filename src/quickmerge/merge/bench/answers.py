"""Whether a vision-language model answers questions with an exact match, unmodified or with fewer tokens.

A greedy answer is the right one if and only if the most likely token is the right one wherever the right answer, and
the token that ends it, is read: as long as that holds, greedy decoding reads the same. So no answer is decoded.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from quickmerge.bench.harness import Arm
from quickmerge.datasets.annotated import Question
from quickmerge.datasets.labelled import PixelFormat
from quickmerge.errors import QuickmergeError
from quickmerge.merge.attach import reduce
from quickmerge.merge.reducers.base import Reducer
from quickmerge.models.chat import answer_ids
from quickmerge.models.columns import stored
from quickmerge.models.compat import cache_argument, returned_cache
from quickmerge.models.load_vision import ask_inputs
from quickmerge.models.vlm import find_vlm

__all__ = ["FULL", "RESIZE", "Answered", "AskedQuestion", "answer_arms", "ask", "exact_answers"]


@dataclass(frozen=True)
class AskedQuestion:
    """A question as a model takes it: all inputs of the prompt, and the tokens of the right answer to its end."""

    inputs: dict[str, Any]
    answer: tuple[int, ...]

    @property
    def ids(self) -> Tensor:
        """``(1, N)``, the prompt's tokens."""
        ids: Tensor = self.inputs["input_ids"]
        return ids

    def head(self, count: int) -> dict[str, Any]:
        """The inputs of the first ``count`` tokens, and the whole image."""
        shape = self.ids.shape
        return {
            name: value[:, :count] if isinstance(value, Tensor) and value.shape == shape else value
            for name, value in self.inputs.items()
        }


@dataclass(frozen=True)
class Answered:
    """Which questions were answered with exact match, and of the image's tokens how many there were and were kept."""

    right: tuple[bool, ...]
    visual_in: int
    visual_kept: float


def ask(model: Any, processor: Any, image: Image.Image, questions: Sequence[Question]) -> list[AskedQuestion]:
    """Questions about one image as the model takes them, on its device and in its precision."""
    tokenizer = processor.tokenizer
    asked = []
    for question in questions:
        inputs = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            if isinstance(value, Tensor)
            else value
            for name, value in ask_inputs(processor, [image], question.question).items()
        }
        asked.append(AskedQuestion(inputs, tuple(answer_ids(tokenizer, question.answer))))
    return asked


def exact_answers(
    model: Any, asked: Sequence[AskedQuestion], run: AbstractContextManager[Any], *, shared: bool = True
) -> Answered:
    """Which of the questions about one image a model answers with an exact match.

    The image is read once, with what all prompts have in common, into a cache; then one question after another is
    read on that cache, which is cut back each time. A method that looks at the question must see it in full, and
    nothing of the answer: with ``shared=False`` each prompt is read on its own, and the answer on its cache. The tower
    looks at the image once either way, where the model takes features in place of pixels.

    Args:
        model: a vision-language model in eval mode.
        asked: questions about one image, see `ask`.
        run: what to enter meanwhile, `quickmerge.reduce` at layer 0 or nothing.
        shared: whether what is left of the image is the same for all questions.

    Raises:
        QuickmergeError: there is no question, or no image in a prompt.
    """
    if not asked:
        raise QuickmergeError("questions must be at least one, got none")
    image = model.config.image_token_id
    common = _common(asked, image) if shared else None
    groups = [[one] for one in asked] if common is None else [list(asked)]
    right: list[bool] = []
    kept = []
    visual = int((asked[0].ids == image).sum())
    with torch.inference_mode(), run:
        seen = _seen(model, asked[0].inputs) if len(groups) > 1 else {}
        for group in groups:
            first = group[0]
            count = first.ids.shape[1] if common is None else common
            out = model(**{**first.head(count), **seen}, use_cache=True, logits_to_keep=1)
            cache = returned_cache(out)
            kept.append(visual - (count - stored(cache.layers[0])))
            for one in group:
                right.append(_is_right(model, one, count, out.logits[:, -1:], cache))
    return Answered(tuple(right), visual, sum(kept) / len(kept))


def _seen(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs that put the image's features in the place of its pixels, so that several prompts look at it once.

    Nothing where the model takes no features.
    """
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return {}
    look = model.base_model.get_image_features
    wanted = inspect.signature(look).parameters
    features = look(**{name: value for name, value in inputs.items() if name in wanted}, return_dict=True)
    return {"pixel_values": None, "mm_encoder_outputs": {"image": features}}


def _is_right(model: Any, one: AskedQuestion, count: int, last: Tensor, cache: Any) -> bool:
    """Whether the answer is greedy's, where ``cache`` holds the prompt's first ``count`` tokens; it is left as it was.

    Args:
        model: the model.
        one: the question.
        count: how many of its tokens were read.
        last: ``(1, 1, vocabulary)``, the logits behind these.
        cache: what they left.
    """
    answer = torch.tensor(one.answer, device=last.device)
    rest = torch.cat([one.ids[0, count:], answer[:-1]])
    logits = last
    if len(rest):
        more = model(input_ids=rest[None], **cache_argument(model, cache), use_cache=True).logits
        cache.crop(-len(rest))
        logits = torch.cat([last, more], 1)
    return bool((logits[0, -len(answer) :].argmax(-1) == answer).all())


def _common(asked: Sequence[AskedQuestion], image: int) -> int | None:
    """How many tokens all prompts begin with; None if these don't hold the image and something behind it.

    The last token that is read is not the image's own, since hosts keep that one as it is.
    """
    most = min(one.ids.shape[1] for one in asked) - 1
    same = torch.stack([one.ids[0, :most] == asked[0].ids[0, :most] for one in asked]).all(0)
    count = int(same.long().cumprod(0).sum())
    where = (asked[0].ids[0] == image).nonzero()
    if not len(where):
        raise QuickmergeError("each prompt must hold an image, got one without")
    return count if count > int(where[-1]) + 1 else None


# The ways in which a vision-language model is asked: as it is, with every method, and with smaller images. Settings of
# their arms: ``keep``, the share of the visual tokens; ``processor``, which makes smaller images, where it is not the
# model's own; ``shared``, whether what is left of an image is the same for all questions about it (usually).


FULL = Arm("full", settings={"keep": 1.0})
RESIZE = "smaller images"


def answer_arms(
    model: Any, processor: Any, reducers: Sequence[Reducer], keeps: Sequence[float], *, smaller: bool = True
) -> list[Arm]:
    """Every method at every share of the visual tokens, and smaller images of about as many.

    Args:
        model: a supported vision-language model.
        processor: its processor.
        reducers: one of each method; ``keep`` is replaced.
        keeps: shares of the visual tokens to keep.
        smaller: also the unmodified model on smaller images, where its tower takes images of several sizes.
    """
    found: list[Arm] = []
    for keep in keeps:
        for reducer in reducers:
            method = replace(reducer, keep=keep)
            settings = {"keep": keep, "shared": "text" not in method.needs.visual}
            found.append(Arm(method.label, _attach(model, method), settings, {"visual": method}))
        small = _smaller(model, processor, keep) if smaller else None
        if small is not None:
            found.append(Arm(RESIZE, settings={"keep": keep, "processor": small}))
    return found


def _attach(model: Any, reducer: Reducer) -> Callable[[], AbstractContextManager[Any]]:
    def attach() -> AbstractContextManager[Any]:
        run: AbstractContextManager[Any] = reduce(model, reducer, layer=0)
        return run

    return attach


def _smaller(model: Any, processor: Any, keep: float) -> Any:
    """A processor whose images make about the share ``keep`` of the tokens; None where the tower takes but one size."""
    # Others cut images up, or take them as large as they are.
    if find_vlm(model).family.layout != "patches" or hasattr(model.config, "image_grid_pinpoints"):
        return None
    images = processor.image_processor
    form, patch = PixelFormat.of(images), model.config.vision_config.patch_size
    sides = {
        name: max(1, round(pixels / patch * math.sqrt(keep))) * patch
        for name, pixels in (("height", form.height), ("width", form.width))
    }
    size: dict[str, Any] = {"size": sides}
    if getattr(images, "do_center_crop", False):
        size = {"size": {"shortest_edge": min(sides.values())}, "crop_size": sides}
    made = copy.deepcopy(processor)
    made.image_processor = type(images).from_dict({**images.to_dict(), **size})
    pixels = torch.zeros(1, 3, sides["height"], sides["width"], dtype=model.dtype, device=model.device)
    try:
        with torch.inference_mode():
            model.get_image_features(pixel_values=pixels)
    except ValueError:  # its positions are not stretched
        return None
    return made
