"""Texts as windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.files import read_text
from quickmerge.training.data.held_out import LONG, Ids, Passages


class TextWindows(Dataset[Tensor]):
    """Windows of ``length`` tokens, cut from each document from its start; what is left over at its end is dropped.

    The documents are tokenised once, when the first window or the number of windows is asked for.

    Args:
        tokenizer: a tokenizer of transformers.
        documents: files to read, or the texts themselves.
        length: tokens of a window.
        stride: tokens from the start of a window to the start of the next; None is ``length``, so that none overlap.
        held_out: token ids of documents that must stay unseen. Windows that share a passage of ``passage`` tokens
            with one of them are dropped.
        passage: see ``held_out``.
        progress: called with the documents tokenised so far and the number of them all, after each.

    Raises:
        ValueError: ``length``, ``stride`` or ``passage`` is no whole number of at least 1.
        QuickmergeError: from whatever needs the tokens first. A file is no text, no document is long enough, or every
            window shares a passage with a held-out document.
    """

    def __init__(
        self,
        tokenizer: Any,
        documents: Sequence[Path | str],
        length: int,
        *,
        stride: int | None = None,
        held_out: Iterable[Ids] = (),
        passage: int = LONG,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        length = whole_number("length", length)
        self.length = length
        self.stride = length if stride is None else whole_number("stride", stride)
        self._tokenizer = tokenizer
        self._documents = documents
        self._held_out = Passages(held_out, passage)
        self._progress = progress
        self._tokens: list[NDArray[np.int32]] | None = None
        self._names: list[str] = []
        self._windows: NDArray[np.int64] = np.empty((0, 2), np.int64)  # document and first token of each
        self._skipped = 0
        self._overlapping = 0

    @property
    def skipped(self) -> int:
        """Documents too short for one window."""
        self._read()
        return self._skipped

    @property
    def overlapping(self) -> int:
        """Windows dropped because they share a passage with a held-out document."""
        self._read()
        return self._overlapping

    def __len__(self) -> int:
        self._read()
        return len(self._windows)

    def __getitem__(self, index: int) -> Tensor:
        """One window, ``(length,)`` token ids as int64."""
        tokens, (document, start) = self._read(), self._windows_at(index)
        return torch.from_numpy(tokens[document][start : start + self.length].astype(np.int64))

    def describe(self, index: int) -> str:
        """Where a window stands, like ``"whale.txt, tokens 1216-2432"``: its first token, and the first behind it."""
        document, start = self._windows_at(index)
        return f"{self._names[document]}, tokens {start}-{start + self.length}"

    def fingerprint(self) -> str:
        """A sha256 over the windows and their token ids, in hexadecimal: it differs where the training would."""
        tokens = self._read()
        digest = hashlib.sha256(f"{self.length} {len(self._windows)}".encode())
        for document, start in self._windows:
            digest.update(tokens[document][start : start + self.length].astype("<i4").tobytes())
        return digest.hexdigest()

    def _windows_at(self, index: int) -> tuple[int, int]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"window {index} of {count}")
        document, start = self._windows[index]
        return int(document), int(start)

    def _read(self) -> list[NDArray[np.int32]]:
        if self._tokens is not None:
            return self._tokens
        tokens: list[NDArray[np.int32]] = []
        names: list[str] = []
        windows: list[tuple[int, int]] = []
        longest = self._skipped = self._overlapping = 0
        for at, source in enumerate(self._documents):
            text = read_text(source) if isinstance(source, Path) else source
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            tokens.append(np.asarray(ids, dtype=np.int32))
            names.append(source.name if isinstance(source, Path) else f"text {at + 1}")
            longest = max(longest, len(ids))
            starts = np.arange(0, len(ids) - self.length + 1, self.stride, dtype=np.int64)
            seen = self._shares(tokens[-1], starts)
            self._skipped += not len(starts)
            self._overlapping += int(seen.sum())
            windows += [(at, int(start)) for start in starts[~seen]]
            if self._progress is not None:
                self._progress(at + 1, len(self._documents))
        if not windows:
            raise QuickmergeError(self._nothing(longest))
        self._windows = np.array(windows, dtype=np.int64)
        self._names = names
        self._tokens = tokens
        return tokens

    def _shares(self, ids: NDArray[np.int32], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For each window, whether a passage that begins and ends in it stands in a held-out document."""
        before = np.concatenate([[0], np.cumsum(self._held_out.starts(ids))])  # known passages that begin before each
        end = np.minimum(starts + max(0, self.length - self._held_out.n + 1), len(before) - 1)
        return np.asarray(before[end] > before[np.minimum(starts, end)])

    def _nothing(self, longest: int) -> str:
        if not self._documents:
            return "there are no documents to train on"
        if self._overlapping:
            return (
                f"all {self._overlapping} windows share {self._held_out.n} tokens in a row with a held-out document: "
                "train on other texts"
            )
        return (
            f"training needs a text of at least {self.length} tokens, and the longest of {len(self._documents)} has "
            f"{longest}: give longer texts or a smaller length"
        )
