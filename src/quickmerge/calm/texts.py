"""The tokenizer of a CALM: a given one, or one that is made of the training text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from quickmerge.calm.chunks import chunk_count, chunk_document
from quickmerge.datasets.text import LONG, Ids, Passages
from quickmerge.errors import QuickmergeError, UnknownModelError, UnsupportedModelError, first_sentence, whole_number
from quickmerge.files import read_text
from quickmerge.models.tokenizers import load_tokenizer

__all__ = ["END", "CalmTexts", "document_chunks", "end_of", "pad_of", "read_tokenizer", "train_tokenizer"]


END = "<|endoftext|>"
ENDS = (END, "</s>", "<|im_end|>", "<|end_of_text|>", "<eos>")
"""What end tokens are called where a file does not say which one it is."""


def read_tokenizer(name: str) -> Any:
    """A tokenizer of transformers with an end token.

    Args:
        name: as `quickmerge.models.tokenizers.load_tokenizer` takes it; of a tokenizer.json, what lies beside it is
            read too.

    Raises:
        QuickmergeError: there is none, or it has no end token.
    """
    path = Path(name)
    whole = path.is_file() and (path.parent / "tokenizer_config.json").is_file()
    try:
        tokenizer: Any = load_tokenizer(path.parent if whole else name)
    except (UnknownModelError, UnsupportedModelError) as error:
        raise QuickmergeError(
            f"tokenizer must be a model's name, a folder or a tokenizer.json file, got {name!r} "
            f"({first_sentence(error)})"
        ) from error
    if tokenizer.eos_token_id is None:
        known = tokenizer.get_vocab()
        end = next((token for token in ENDS if token in known), None)
        if end is None:
            raise QuickmergeError(
                f"tokenizer {name!r} must have an end token, which closes a document, got none: name one as eos_token "
                "in a tokenizer_config.json beside it"
            )
        tokenizer.eos_token = end
    return tokenizer


def train_tokenizer(documents: Sequence[Path | str], size: int) -> Any:
    """A byte-level BPE tokenizer of some texts: it can write any text.

    Args:
        documents: files to read, or the texts themselves.
        size: tokens, the 256 bytes and the end token included.

    Raises:
        QuickmergeError: the texts are too few for so many tokens, or a file is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    size = whole_number("vocabulary", size, 257)

    def texts() -> Iterator[str]:
        for source in documents:
            yield read_text(source) if isinstance(source, Path) else source

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts(), trainer)
    if made.get_vocab_size() != size:
        raise QuickmergeError(
            f"vocabulary must be at most {made.get_vocab_size()}, as many different tokens as the texts give, "
            f"got {size}"
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, padding_side="left")


# Texts as windows of chunks, for both stages of CALM's training.


def pad_of(tokenizer: Any) -> int:
    """The id of the pad: the one behind all that the tokenizer knows, so that no text can use it."""
    return len(tokenizer)


def end_of(tokenizer: Any) -> int:
    """The id of the token that closes a document.

    Raises:
        QuickmergeError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise QuickmergeError("tokenizer must have an end token (eos_token), which closes a document, got none")
    return int(tokenizer.eos_token_id)


class CalmTexts(Dataset[Tensor]):
    """Windows of ``chunks`` chunks of ``patch`` tokens, each of one document.

    A document is cut as `chunk_document` does it; every time that a window is asked for, the pads in front of its
    document are drawn anew, so that any token comes to stand anywhere in a chunk. They come from the global generator
    of torch. The last window of a document ends with it and begins before the end of the window before, where that
    is needed for it to be full; a document shorter than one window has pads behind.

    The documents are tokenised once, when the first window or the number of windows is asked for.

    Args:
        tokenizer: a tokenizer of transformers with an end token.
        documents: files to read, or the texts themselves.
        patch: K, tokens of a chunk.
        chunks: T, chunks of a window.
        phase: pads in front of every document, instead of random ones.
        held_out: token ids of documents that must stay unseen. Windows that may share a passage of ``passage`` tokens
            with one of them are dropped.
        passage: see ``held_out``.
        progress: called with the documents tokenised so far and the number of them all, after each.

    Raises:
        ValueError: a setting is out of range.
        QuickmergeError: the tokenizer has no end token; or, from whatever needs the tokens first, a file is no text,
            there is no document, or every window shares a passage with a held-out document.
    """

    def __init__(
        self,
        tokenizer: Any,
        documents: Sequence[Path | str],
        patch: int,
        chunks: int,
        *,
        phase: int | None = None,
        held_out: Iterable[Ids] = (),
        passage: int = LONG,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        patch = whole_number("patch", patch)
        chunks = whole_number("chunks", chunks)
        if phase is not None and (isinstance(phase, bool) or not isinstance(phase, int) or not 0 <= phase < patch):
            raise ValueError(f"phase must be a whole number from 0 to {patch - 1} or None, got {phase!r}")
        self.patch, self.chunks, self.phase = patch, chunks, phase
        self.pad, self.eos = pad_of(tokenizer), end_of(tokenizer)
        self.vocabulary = self.pad + 1
        self._tokenizer = tokenizer
        self._documents = documents
        self._held_out = Passages(held_out, passage)
        self._progress = progress
        self._tokens: list[NDArray[np.int32]] | None = None
        self._names: list[str] = []
        self._windows: NDArray[np.int64] = np.empty((0, 2), np.int64)  # document, and number of the window in it
        self._overlapping = 0

    @property
    def overlapping(self) -> int:
        """Windows dropped because they may share a passage with a held-out document."""
        self._read()
        return self._overlapping

    @property
    def tokens(self) -> int:
        """Tokens of all documents, end tokens included, those of dropped windows too."""
        return sum(len(ids) + 1 for ids in self._read())

    def counts(self) -> Tensor:
        """How often each id is in the documents, ``(V,)``; the pad as often as there are pads on average."""
        tokens = self._read()
        counts = np.zeros(self.vocabulary)
        for ids in tokens:
            counts[: self.pad] += np.bincount(ids, minlength=self.pad)
        counts[self.eos] += len(tokens)
        counts[self.pad] = len(tokens) * (self.patch - 1)
        return torch.from_numpy(counts)

    def __len__(self) -> int:
        self._read()
        return len(self._windows)

    def __getitem__(self, index: int) -> Tensor:
        """One window, ``(T * K,)`` token ids as int64."""
        tokens, (document, number) = self._read(), self._window_at(index)
        ids = tokens[document]
        phase = int(torch.randint(self.patch, ())) if self.phase is None else self.phase
        total = chunk_count(len(ids), self.patch, phase)
        # Where the pads have pushed a document over the edge of its last window, that window moves along.
        last = number + 1 == self._windows_of(len(ids))
        first = max(0, total - self.chunks) if last else number * self.chunks
        return self._cut(ids, phase, first, total)

    def _cut(self, ids: NDArray[np.int32], phase: int, first: int, total: int) -> Tensor:
        """Chunks ``first`` to ``first + T`` of a document, without building the others."""
        front, low = phase if first == 0 else 0, max(0, first * self.patch - phase)
        if first + self.chunks < total:
            middle = ids[low : (first + self.chunks) * self.patch - phase].astype(np.int64)
            return F.pad(torch.from_numpy(middle), (front, 0), value=self.pad)
        end = chunk_document(ids[low:], self.patch, self.eos, self.pad, front).flatten()
        return F.pad(end, (0, self.chunks * self.patch - len(end)), value=self.pad)

    def describe(self, index: int) -> str:
        """Where a window stands, like ``"whale.txt, window 3"``."""
        document, number = self._window_at(index)
        return f"{self._names[document]}, window {number + 1}"

    def fingerprint(self) -> str:
        """A sha256 over the windows and the documents' token ids, in hexadecimal: it differs where training would."""
        tokens = self._read()
        digest = hashlib.sha256(f"{self.patch} {self.chunks} {self.phase} {self.eos} {self.pad}".encode())
        digest.update(self._windows.astype("<i8").tobytes())
        for ids in tokens:
            digest.update(f"{len(ids)} ".encode() + ids.astype("<i4").tobytes())
        return digest.hexdigest()

    def _windows_of(self, length: int) -> int:
        return -(-chunk_count(length, self.patch, self.phase or 0) // self.chunks)

    def _window_at(self, index: int) -> tuple[int, int]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"window {index} of {count}")
        document, number = self._windows[index]
        return int(document), int(number)

    def _read(self) -> list[NDArray[np.int32]]:
        if self._tokens is not None:
            return self._tokens
        tokens: list[NDArray[np.int32]] = []
        names: list[str] = []
        windows: list[tuple[int, int]] = []
        self._overlapping = 0
        for at, source in enumerate(self._documents):
            text = read_text(source) if isinstance(source, Path) else source
            ids = np.asarray(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)
            if len(ids):
                seen = self._shares(ids)
                self._overlapping += int(seen.sum())
                windows += [(len(tokens), int(number)) for number in np.flatnonzero(~seen)]
                tokens.append(ids)
                names.append(source.name if isinstance(source, Path) else f"text {at + 1}")
            if self._progress is not None:
                self._progress(at + 1, len(self._documents))
        if not windows:
            raise QuickmergeError(
                f"all {self._overlapping} windows share {self._held_out.n} tokens in a row with a held-out document: "
                "train on other texts"
                if self._overlapping
                else "there are no documents to train on"
            )
        self._windows = np.array(windows, dtype=np.int64)
        self._names = names
        self._tokens = tokens
        return tokens

    def _shares(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """For each window of a document, whether it may hold a passage of a held-out document."""
        before = np.concatenate([[0], np.cumsum(self._held_out.starts(ids))])  # known passages that begin before each
        number = np.arange(self._windows_of(len(ids)))
        span = self.chunks * self.patch
        # Whatever the pads in front: they shift a window by less than a chunk, and the last one to the end.
        low = np.minimum(number * span, len(ids) + 1 - span) - self.patch
        high = (number + 1) * span - self._held_out.n + 1
        high[-1] = len(before) - 1
        ends = len(before) - 1
        return np.asarray(before[np.clip(high, 0, ends)] > before[np.clip(low, 0, ends)])


def document_chunks(tokenizer: Any, texts: Iterable[str], patch: int, phase: int = 0) -> Tensor:
    """All chunks ``(n, K)`` of some texts, one document after the other."""
    eos, pad = end_of(tokenizer), pad_of(tokenizer)
    parts = [
        chunk_document(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], patch, eos, pad, phase)
        for text in texts
    ]
    return torch.cat(parts) if parts else torch.empty(0, patch, dtype=torch.long)
