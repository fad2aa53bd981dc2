"""The ways in which a vision-language model is asked: as it is, with every method, and with smaller images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from quickmerge.hosts import find_vlm, reduce
from quickmerge.reducers.base import Reducer
from quickmerge.training.data.labelled import PixelFormat

__all__ = ["FULL", "RESIZE", "AnswerArm", "answer_arms"]


@dataclass(frozen=True)
class AnswerArm:
    """One way to answer: a reducer behind the projector, or smaller images.

    Args:
        name: what the tables call it.
        keep: the share of the visual tokens that was asked for.
        attach: makes the run; None for the model as it is.
        processor: makes smaller images; None for the model's own.
        shared: whether what is left of a picture is the same for all questions about it.
    """

    name: str
    keep: float
    attach: Callable[[], AbstractContextManager[Any]] | None = None
    processor: Any = None
    shared: bool = True

    @property
    def label(self) -> str:
        """What it is called while it is measured."""
        return self.name if self.keep == 1 else f"{self.name} {self.keep:g}"

    def context(self) -> AbstractContextManager[Any]:
        """The run to enter, or nothing."""
        return nullcontext() if self.attach is None else self.attach()


FULL = AnswerArm("full", 1.0)
RESIZE = "smaller images"


def answer_arms(
    model: Any, processor: Any, reducers: Sequence[Reducer], keeps: Sequence[float], *, smaller: bool = True
) -> list[AnswerArm]:
    """Every method at every share of the visual tokens, and smaller images of about as many.

    Args:
        model: a supported vision-language model.
        processor: its processor.
        reducers: one of each method; ``keep`` is replaced.
        keeps: shares of the visual tokens to keep.
        smaller: also the model as it is on smaller images, where its tower takes images of several sizes.
    """
    found: list[AnswerArm] = []
    for keep in keeps:
        for reducer in reducers:
            method = replace(reducer, keep=keep)
            attach = _attach(model, method)
            found.append(AnswerArm(method.label, keep, attach, shared="text" not in method.asks))
        small = _smaller(model, processor, keep) if smaller else None
        if small is not None:
            found.append(AnswerArm(RESIZE, keep, None, small))
    return found


def _attach(model: Any, reducer: Reducer) -> Callable[[], AbstractContextManager[Any]]:
    def attach() -> AbstractContextManager[Any]:
        run: AbstractContextManager[Any] = reduce(model, reducer, layer=0)
        return run

    return attach


def _smaller(model: Any, processor: Any, keep: float) -> Any:
    """A processor whose images make about the share ``keep`` of the tokens; None where the tower takes but one size."""
    # Others cut pictures up, or take them as large as they are.
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
