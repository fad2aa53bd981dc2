"""What the engine asks of a drafter, whatever it drafts with."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from quickmerge.decoding.tree import Tree
from quickmerge.errors import QuickmergeError

__all__ = ["Drafter", "serving"]

_BUSY: set[int] = set()  # ids of drafters that are held by a `serving`
_LOCK = threading.Lock()


class Drafter(ABC):
    """Guesses how the rows of a batch go on.

    The engine calls, for one ``generate``: ``check``; ``begin`` when the target has read the prompt; then, for every
    pass of the target, ``draft``, ``accept``, and ``rows`` if some rows are finished. ``draft`` is left out of a step
    in which there is no room for a draft, and ``accept`` and ``rows`` are after the last one. A drafter serves one
    ``generate`` at a time, which `serving` sees to, and ``begin`` starts it anew.

    Whatever it drafts, the text is the target's own: a bad draft costs time and nothing else.
    """

    needs_features: ClassVar[bool] = False
    """Whether it wants the target's last hidden states, behind the final norm."""

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027 - most drafters fit any model
        """Raise an `UnsupportedModelError` or a `QuickmergeError` where this drafter can't draft for ``model``."""

    @abstractmethod
    def begin(
        self, model: PreTrainedModel, ids: Tensor, valid: Tensor, features: Tensor | None, positions: Tensor
    ) -> None:
        """Take in the prompt. The first new token is not in it: that comes as the ``last`` of the first ``draft``.

        Args:
            model: the target.
            ids: ``(B, n)`` tokens of the prompt.
            valid: ``(B, n)`` bool, False for padding, which is on the left.
            features: ``(B, n, H)`` the target's last hidden states behind the final norm; None unless
                ``needs_features``. Those of a token predict the one after it.
            positions: ``(B, n)`` long, where the target read each token; anything at padding.
        """

    @abstractmethod
    def draft(self, last: Tensor, nodes: int) -> list[Tree]:
        """Guess how each row goes on.

        Args:
            last: ``(B,)`` the newest token of each row, which the target has not read yet: the root.
            nodes: how many nodes a tree may have, the root included; at least 2.

        Returns:
            B trees. The engine takes out of them what is too deep for the text that is left, and the least probable
            nodes if reading fewer is faster.
        """

    @abstractmethod
    def accept(self, tokens: list[Tensor], features: list[Tensor] | None) -> None:
        """Take in what is now part of the text and has been read by the target.

        Args:
            tokens: for each row ``(k,)`` long, k >= 1: the root, and the drafted tokens that were accepted. The token
                that the target emitted behind them is the ``last`` of the next ``draft``.
            features: for each row ``(k, H)``, the target's last hidden states at these tokens; None unless
                ``needs_features``.
        """

    @abstractmethod
    def rows(self, index: Tensor) -> None:
        """Go on with the rows ``index (R,)`` long alone, in this order; the others are finished."""


@contextmanager
def serving(drafter: Drafter) -> Iterator[None]:
    """Keep a drafter for one ``generate``.

    Raises:
        QuickmergeError: it serves another one, of another thread or around this one.
    """
    with _LOCK:
        if id(drafter) in _BUSY:
            raise QuickmergeError(
                f"a {type(drafter).__name__} drafts for one generate at a time, and another one is running: "
                "make one for each thread"
            )
        _BUSY.add(id(drafter))
    try:
        yield
    finally:
        with _LOCK:
            _BUSY.remove(id(drafter))
