"""Telling training text from held-out text: no long passage may stand in both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.files import read_text

Ids: TypeAlias = Sequence[int] | NDArray[Any]

LONG = 32
"""Tokens in a row that two texts of different origin do not share by chance."""


class Passages:
    """Every run of ``n`` tokens in some documents, kept so that other documents can be looked up in them.

    Args:
        documents: the token ids of each held-out document.
        n: tokens of a passage, at least 1.
    """

    def __init__(self, documents: Iterable[Ids], n: int = LONG) -> None:
        n = whole_number("n", n)
        self.n = n
        # A fixed draw: a hash only has to spread, and the passages it finds are compared token by token.
        self._factors = np.random.default_rng(0).integers(1, 2**63, size=n, dtype=np.uint64)
        self._runs = [_runs(_array(ids), n) for ids in documents]
        hashes = np.concatenate([np.empty(0, np.uint64), *map(self._hash, self._runs)])
        order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[order]
        # which document each passage stands in, and where
        places = [(document, at) for document, runs in enumerate(self._runs) for at in range(len(runs))]
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)[order]

    def starts(self, ids: Ids) -> NDArray[np.bool_]:
        """Where passages that are known begin in a document of N tokens: (N - n + 1,) truth values, none if N < n."""
        runs = _runs(_array(ids), self.n)
        hashes = self._hash(runs)
        first = np.searchsorted(self._sorted, hashes, side="left")
        last = np.searchsorted(self._sorted, hashes, side="right")
        known = np.zeros(len(runs), dtype=np.bool_)
        for at in np.flatnonzero(last > first):
            places = self._places[first[at] : last[at]]
            known[at] = any(np.array_equal(self._runs[document][start], runs[at]) for document, start in places)
        return known

    def _hash(self, runs: NDArray[np.int64]) -> NDArray[np.uint64]:
        total = np.zeros(len(runs), dtype=np.uint64)
        for place, factor in enumerate(self._factors):  # column by column, so that no copy of all runs is made
            total += (runs[:, place].astype(np.uint64) + np.uint64(1)) * factor
        return total


def overlap(window_ids: Ids, held_out_ids: Ids, n: int = LONG) -> bool:
    """Whether any run of ``n`` tokens stands in both; texts shorter than ``n`` share none."""
    return bool(Passages([held_out_ids], n).starts(window_ids).any())


def _array(ids: Ids) -> NDArray[np.int64]:
    return np.asarray(ids, dtype=np.int64).reshape(-1)


def _runs(ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The runs of ``n`` tokens, (N - n + 1, n), as a view that takes no memory."""
    if len(ids) < n:
        return np.empty((0, n), np.int64)
    return np.lib.stride_tricks.sliding_window_view(ids, n)


# Texts as windows of tokens.


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


# A document, cut into context and continuation.


LEAST = 1000
"""Fewest tokens a document must have to be measured."""


@dataclass(frozen=True)
class Document:
    """``context (1, N)`` and ``target (1, M)`` token ids of one document; ``kind`` groups documents in tables.

    ``start`` is the number of tokens that the context begins with because every text of the tokenizer does, such as a
    BOS: a model that was always given one is at a loss without.
    """

    name: str
    context: Tensor
    target: Tensor
    kind: str | None = None
    start: int = 0

    @property
    def nothing(self) -> Tensor | None:
        """``(1, start)``, what is read in place of the context where there is none."""
        return self.context[:, : self.start] if self.start else None


def start_of(tokenizer: Any) -> list[int]:
    """The BOS, where a tokenizer puts it in front of every text: a model that always had one is at a loss without."""
    if getattr(tokenizer, "bos_token_id", None) is None:
        return []
    ids: list[int] = tokenizer("a")["input_ids"]
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def split_document(
    tokenizer: Any, text: str, name: str, *, context: int = 1024, target: int = 192, kind: str | None = None
) -> Document:
    """Cut a text into ``context`` tokens and the ``target`` tokens that follow, from its start.

    Where the tokenizer puts a BOS in front of every text, the context has it besides.

    A document shorter than ``context + target`` gives what is left of it before the last ``target`` tokens.

    Raises:
        QuickmergeError: for fewer than 1,000 tokens, or a target that leaves no context.
    """
    if target < 2 or context < 2:
        raise QuickmergeError(f"context and target must be at least 2 tokens, got {context} and {target}")
    # Only the first so many characters can matter; no token is longer than a few hundred of them.
    ids = tokenizer(text[: 64 * (context + target + LEAST)], add_special_tokens=False)["input_ids"]
    if len(ids) < LEAST:
        raise QuickmergeError(f"{name} must have at least {LEAST} tokens to be measured, got {len(ids)}")
    length = min(context, len(ids) - target)
    if length < 2:
        raise QuickmergeError(f"target must leave some context in {name} ({len(ids)} tokens), got {target}")
    start = start_of(tokenizer)
    row = torch.tensor([start + ids[: length + target]])
    length += len(start)
    return Document(name, row[:, :length], row[:, length:], kind, len(start))
