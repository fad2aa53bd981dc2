"""Speculative decoding as an ingredient: what drafts, and a run in which plain ``generate`` is speculative."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError, UnsupportedModelError, near_match, whole_number
from quickmerge.models.attachment import ASSISTED, Attachment, PerThread, setting, watch_generate
from quickmerge.speculative.drafter import Drafter, Stats
from quickmerge.speculative.engine import SpeculativeDecoding
from quickmerge.speculative.proof import check_target

__all__ = ["Speculation", "SpeculationRun"]


@dataclass(frozen=True)
class Speculation:
    """A drafter and how large its trees may be; see `quickmerge.SpeculativeDecoding`, which has the same settings.

    Args:
        drafter: what guesses, such as ``PromptLookup()`` or ``Gumiho.from_pretrained(folder)``.
        nodes: the most nodes of a tree if ``tree`` is ``"auto"``, the root included.
        tree: ``"auto"``, or how many nodes are read in a step for each row, the root included.

    Raises:
        QuickmergeError: for another drafter; ValueError for a number out of range.
    """

    drafter: Drafter
    nodes: int = 32
    tree: int | str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.drafter, Drafter):
            raise QuickmergeError(f"drafter must be a quickmerge Drafter such as PromptLookup(), got "
                                  f"{self.drafter!r:.200}")  # fmt: skip
        object.__setattr__(self, "nodes", whole_number("nodes", self.nodes))
        if isinstance(self.tree, str):
            if self.tree != "auto":
                hint = near_match(self.tree, ["auto"])
                raise QuickmergeError(f"tree must be 'auto' or a whole number of at least 1, got {self.tree!r}{hint}")
        else:
            object.__setattr__(self, "tree", whole_number("tree", self.tree))


REPLACED = ("custom_generate", *ASSISTED)
"""Arguments of ``generate`` that would decode in another way."""


class SpeculationRun(Attachment):
    """A model whose plain ``generate`` drafts and checks, as with ``custom_generate=SpeculativeDecoding(...)``.

    Each call gets a drafter of its own, a shallow copy of the recipe's, so several threads may generate at once. The
    summary is then of the thread that ended last.
    """

    _counts: PerThread[Stats | None] = PerThread(lambda: None)

    def __init__(self, model: PreTrainedModel, settings: Speculation) -> None:
        super().__init__(model)
        if not callable(getattr(model, "generate", None)):
            raise UnsupportedModelError(f"decoding is for models that generate text, got {self._name}, which has no "
                                        "generate: leave it out")  # fmt: skip
        self.model, self.settings = model, settings
        # What it prepares for a model - heads on its device, say - is kept here and shared by the copies.
        self._drafter = copy.copy(settings.drafter)
        self._checking = threading.Lock()
        self._last = Stats()
        self.check()

    def check(self) -> None:
        """Raise unless the model reads trees and the drafter was made for it; see `quickmerge.SpeculativeDecoding`."""
        check_target(self.model)
        with self._checking:
            self._drafter.check(self.model)

    def _attach(self) -> None:
        check_target(self.model)  # among the other ingredients, which are there by now
        self._undo.append(watch_generate(self.model, self._around_generate))

    def _around_generate(self, given: dict[str, Any], call: Callable[..., Any]) -> Any:
        for name in REPLACED:
            value = setting(self.model, given, name)
            if value is not None:
                shown = repr(value) if isinstance(value, (int, str)) else type(value).__name__
                raise QuickmergeError(
                    f"{name} must be left out inside a recipe with decoding, whose "
                    f"{type(self._drafter).__name__} drafts in its place, got {shown}"
                )
        with self._checking:
            self._drafter.check(self.model)
            drafter = copy.copy(self._drafter)
        engine = SpeculativeDecoding(drafter, nodes=self.settings.nodes, tree=self.settings.tree)
        out = call(custom_generate=engine)
        self._counts = self._last = engine.stats
        return out

    def summary(self) -> Stats:
        """Counts of this thread's last ``generate``; of the last one of all, if this thread has had none."""
        return self._last if self._counts is None else self._counts
