"""Being attached to a model for the length of a ``with`` block, and leaving nothing behind on any way out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import nn

from quickmerge.errors import UnsupportedModelError


class Attachment(ABC):
    """What every run on a model is. Enter it with ``with``; it detaches on any way out, and may be entered again.

    Args:
        model: what it attaches to; only its name is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        self._undo: list[Callable[[], None]] = []

    @abstractmethod
    def _attach(self) -> None:
        """Hook everything, and note in ``_undo`` how to take it off."""

    def _note(self, handle: Any) -> None:
        """Remove this hook when the run is left."""
        self._undo.append(handle.remove)

    def _detach(self) -> None:
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        if self._undo:
            raise UnsupportedModelError(f"{self._name} is already inside a quickmerge run; leave that first")
        try:
            self._attach()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()
