"""The recognizer: a frozen encoder and a few blocks of a language model, which name what is in an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self, Unpack

import torch
from torch import Tensor

from quickmerge.errors import near_match, whole_number
from quickmerge.merge.reducers.base import Reducer
from quickmerge.models.kinds import KINDS
from quickmerge.models.share import HubMixin, HubOptions, fetched
from quickmerge.recognition import decode
from quickmerge.recognition.guess import Guess
from quickmerge.recognition.network import Network
from quickmerge.recognition.store import load, save

__all__ = ["METHODS", "Recognizer"]

METHODS = ("one_shot", "best_first", "greedy", "beam")


class Recognizer(HubMixin, Network):
    """Object recognition as next-token prediction (arXiv 2312.02142), from any encoder and causal language model.

    Trained are the projector, the boundary token, the blocks of the language model, its norm and its output matrix. The
    encoder is frozen, as is the input matrix of the language model where it is not the output matrix too.

    `Recognizer.new` makes one of pretrained models, `from_pretrained` loads one.
    """

    hub_kind = KINDS["recognizer"]

    # Saying -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def recognize(
        self,
        pixels: Tensor,
        *,
        top: int = 10,
        method: str = "one_shot",
        minimum: float = 0.0,
        labels: Sequence[str] | None = None,
        reducer: Reducer | None = None,
    ) -> list[list[Guess]]:
        """What is in each image, most probable first.

        Args:
            pixels: ``(B, 3, H, W)``, standardised as `prepare` does it.
            top: how many labels at most.
            method: ``"one_shot"``, ``"best_first"``, ``"greedy"`` or ``"beam"``; see `quickmerge.recognition.decode`.
            minimum: the least probability of a label.
            labels: choose among these, each scored exactly, instead of free words.
            reducer: leaves fewer tokens of each image.

        Raises:
            ValueError: naming the setting that is out of range.
            QuickmergeError: the pixels or labels can't be used.
        """
        top = whole_number("top", top)
        if method not in METHODS:
            raise ValueError(
                f"method must be one of {', '.join(METHODS)}, got {method!r}{near_match(str(method), METHODS)}"
            )
        decode.check_share("minimum", minimum)
        prefix = self.prefix(*self.look(pixels, reducer))
        if labels is not None:
            return decode.choose(self, prefix, labels, top, minimum)
        if method in ("greedy", "beam"):
            found = getattr(decode, method)(self, prefix, labels=top)
            return [[guess for guess in row if guess.score >= minimum] for row in found]
        guesses: list[list[Guess]] = getattr(decode, method)(self, prefix, top, minimum=minimum)
        return guesses

    # Files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the recognizer with its encoder, language model and tokenizer into ``folder``; other files stay.

        Raises:
            QuickmergeError: if the disk is full or not writable; what was there before is still there.
        """
        save(self, folder)

    @classmethod
    def from_pretrained(cls, folder: Path | str, **hub: Unpack[HubOptions]) -> Self:
        """Load a recognizer for inference.

        Args:
            folder: where `save_pretrained` wrote, or an id of the hub such as ``"owner/name"``.
            **hub: how it is taken from there, see `quickmerge.models.share.HubOptions`.

        Raises:
            QuickmergeError: if the folder holds no recognizer, or what it holds is damaged; or the hub has no such one.
        """
        return load(cls, fetched(folder, cls.hub_kind, **hub))
