"""What speculation did and what it took."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError
from quickmerge.models.moved import read
from quickmerge.speculative.tree import Tree

if TYPE_CHECKING:
    from quickmerge.speculative.cost import Cost

__all__ = ["Drafter", "Stats", "serving", "texts_of"]


@dataclass
class Stats:
    """Counts of one ``generate``, or of several added up.

    A pass of the target that reads a batch counts once in ``passes`` and once for every unfinished row in
    ``row_passes``. Reading the prompt, which gives the first token of each row, counts in neither.

    Attributes:
        passes: of the target behind the prompt.
        row_passes: summed over the rows that were not finished.
        tokens: new tokens of all rows, up to and including the one that ended each.
        rows: rows of all batches.
        nodes: tree nodes that were read, roots included, padding not.
        offered: how many trees reached depth 1, 2, ...; a row that has no draft offers nothing.
        accepted: how many walks did.
        draft_seconds: in the drafter.
        target_seconds: in passes of the target behind the prompt.
        prompt_seconds: in reading the prompt.
        seconds: all of these and everything in between.
        measure_seconds: in timing the target, once for each model, and not in ``seconds``.
        measure_behind_seconds: of these those behind the prompt, once for each length of text, where what a pass takes
            depends on that.
        lossless: False if a tree let a node see what is no part of its text, see `Tree.extra`.
        chains: the trait of the target for which one path of each tree was read; empty where trees were.
    """

    passes: int = 0
    row_passes: int = 0
    tokens: int = 0
    rows: int = 0
    nodes: int = 0
    offered: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    target_seconds: float = 0.0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    measure_seconds: float = 0.0
    measure_behind_seconds: float = 0.0
    lossless: bool = True
    chains: str = ""

    @property
    def tokens_per_pass(self) -> float:
        """New tokens of a row for each pass that read it, the target's own one at the end of a walk included.

        Tokens that come from reading the prompt are left out on both sides, so decoding without a draft has exactly 1.
        """
        return (self.tokens - self.rows) / self.row_passes if self.row_passes else 1.0

    @property
    def acceptance(self) -> list[float]:
        """For depth 1, 2, ...: the share of walks that went so far among all passes of a row."""
        return [count / self.row_passes for count in self.accepted]

    def count(self, offered: int, path: int, nodes: int) -> None:
        """Add one row of one pass: depth of its tree, depth that the walk reached, nodes read."""
        self.row_passes += 1
        self.nodes += nodes
        for counts, depth in ((self.offered, offered), (self.accepted, path)):
            counts.extend([0] * (depth - len(counts)))
            for i in range(depth):
                counts[i] += 1

    def __add__(self, other: Stats) -> Stats:
        counts = ("passes", "row_passes", "tokens", "rows", "nodes")
        times = (
            "draft_seconds", "target_seconds", "prompt_seconds", "seconds", "measure_seconds", "measure_behind_seconds",
        )  # fmt: skip
        total = {name: getattr(self, name) + getattr(other, name) for name in counts + times}
        total |= {name: _sum(getattr(self, name), getattr(other, name)) for name in ("offered", "accepted")}
        return Stats(**total, lossless=self.lossless and other.lossless, chains=self.chains or other.chains)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**self.__dict__, "tokens_per_pass": self.tokens_per_pass, "acceptance": self.acceptance}

    def __str__(self) -> str:
        return self.summary() if self.rows else "nothing has been generated yet"

    def summary(self) -> str:
        """A few lines for people."""
        rest = self.seconds - self.draft_seconds - self.target_seconds - self.prompt_seconds
        going = ", ".join(f"{share:.2f}" for share in self.acceptance) or "none"
        return "\n".join(
            [
                f"{self.tokens} tokens in {self.passes} passes of the target behind the prompt",
                f"{self.tokens_per_pass:.2f} tokens per forward pass and row (its own one included), "
                f"{self.nodes / max(1, self.row_passes):.1f} nodes read",
                f"walks that reached depth 1, 2, ...: {going}",
                *([f"one path of each draft was read: {self.chains}"] if self.chains else []),
                f"seconds: prompt {self.prompt_seconds:.2f}, target {self.target_seconds:.2f}, "
                f"drafter {self.draft_seconds:.2f}, between them {rest:.2f}",
                "lossless: the text is what the target writes without drafts"
                if self.lossless
                else "LOSSY: nodes saw what was no part of their text, so the target alone may write another one",
            ]
        )


def _sum(a: list[int], b: list[int]) -> list[int]:
    wide = max(len(a), len(b))
    return [x + y for x, y in zip(a + [0] * (wide - len(a)), b + [0] * (wide - len(b)), strict=True)]


# What the engine asks of a drafter, whatever it drafts with.


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

    needs_features: bool = False
    """Whether it wants the target's last hidden states, behind the final norm."""

    def expect(self, cost: Cost | None) -> None:  # noqa: B027 - most drafters have nothing to decide
        """Hear, before ``begin``, what passes of the target take; None where nobody has measured it."""

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027 - most drafters fit any model
        """Raise an `UnsupportedModelError` or a `QuickmergeError` where this drafter can't draft for ``model``."""

    @abstractmethod
    def begin(
        self, model: PreTrainedModel, ids: Tensor, valid: Tensor, features: Tensor | None, positions: Tensor
    ) -> None:
        """Take in the prompt. The first new token is not in it: that comes as the ``last`` of the first ``draft``.

        Args:
            model: the target.
            ids: ``(B, n)`` tokens of the prompt. For a drafter that wants features, and so ``valid``, ``features`` and
                ``positions`` too: those at whose places the entries of the last block stand, where the prompt was
                merged; and those that are new, where it goes on from a filled cache.
            valid: ``(B, n)`` bool, False for padding, which is on the left.
            features: ``(B, n, H)`` the target's last hidden states behind the final norm; None unless
                ``needs_features``. Those of a token predict the one after it.
            positions: ``(B, n)`` long, where the target read each token; anything at padding.
        """

    @abstractmethod
    def draft(self, last: Tensor, nodes: int) -> list[Tree]:
        """Guess how each row goes on.

        Args:
            last: ``(B,)`` the newest token of each row, on the host, which the target has not read yet: the root.
            nodes: how many nodes a tree may have, the root included; at least 2.

        Returns:
            B trees. The engine takes out of them what is too deep for the text that is left, and the least probable
            nodes if reading fewer is faster.
        """

    @abstractmethod
    def accept(self, tokens: list[Tensor], features: list[Tensor] | None) -> None:
        """Take in what is now part of the text and has been read by the target.

        Args:
            tokens: for each row ``(k,)`` long, on the host, k >= 1: the root, and the drafted tokens that were
                accepted. The token that the target emitted behind them is the ``last`` of the next ``draft``.
            features: for each row ``(k, H)``, the target's last hidden states at these tokens; None unless
                ``needs_features``.
        """

    @abstractmethod
    def rows(self, index: Tensor) -> None:
        """Go on with the rows ``index (R,)`` long, on the host, alone, in this order; the others are finished."""


def texts_of(ids: Tensor, valid: Tensor) -> list[list[int]]:
    """The tokens of each row ``ids (B, n)`` that are ``valid (B, n)``, by one wait for the device."""
    there, real = read(ids, valid)
    assert there is not None and real is not None
    return [row[keep].tolist() for row, keep in zip(there, real, strict=True)]


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
