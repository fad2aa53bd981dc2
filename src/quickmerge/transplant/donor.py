"""Donors: a model's vectors, bare vectors, or vectors that are made of text for the tokens of any tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quickmerge.errors import QuickmergeError, number_at_least, whole_number
from quickmerge.models.download import cache_folder
from quickmerge.models.embedded import EMBEDDED, MODELS, SENTENCE_MODELS, TOKENIZERS
from quickmerge.models.folder import check_model_folder
from quickmerge.models.load import find_model, hub_folder
from quickmerge.models.read import read_config, transformers_silenced
from quickmerge.transplant.checkpoint import FLOATS, Entry, find_matrices, open_checkpoint, read_entries

__all__ = [
    "Donor",
    "count_pairs",
    "embeddings_from_text",
    "model_folder",
    "ppmi_vectors",
    "read_donor",
    "unseen",
]


# Where the files of a model lie: in a folder, in the cache of embedded models, or, once fetched, in the hub's.


def model_folder(name: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """The folder that holds a model's files.

    Args:
        name: an embedded name, a model folder, or a hub id.
        progress: whether to show on stderr that something is fetched.

    Raises:
        UnknownModelError: there is no such model, or the hub can't be reached.
        DamagedWeightsError: the folder holds truncated or garbled weights.
        CacheFolderError: the cache folder can't be written.
        FetchError: an embedded model can't be downloaded.
    """
    text = os.fspath(name)
    if text in MODELS or text in SENTENCE_MODELS:
        return EMBEDDED[text].prepare(cache_folder(None), progress=progress)
    found = find_model(text)
    if Path(found).is_dir():
        return Path(found)
    folder = hub_folder(found)
    check_model_folder(folder)
    return folder


# Vectors for the tokens of any tokenizer from nothing but text: a donor space where there is no donor model.
#
# Tokens that keep the same company get similar vectors. With n_ij how often j lies within the window of i,
#
#     PPMI_ij = max(0, log( p_ij / (p_i q_j) )),   p_i = sum_j p_ij,   q_j ~ (sum_i n_ij)^0.75
#     PPMI ~ U S V^T (the largest singular values),   vectors = U S^0.5
#
# Positive pointwise mutual information with a smoothed context distribution, and the square root of the singular
# values: Levy, Goldberg and Dagan 2015.


TOKENS = 1 << 18
"""Tokens counted at a time; each gives two pairs for every place of the window, of 16 bytes."""
CHARACTERS = 1 << 16
"""A longer text is tokenised in parts of about so many, at spaces."""


def embeddings_from_text(
    tokenizer: Any,
    texts: Iterable[str],
    width: int = 256,
    window: int = 5,
    *,
    smoothing: float = 0.75,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Vectors of all tokens of a tokenizer.

    Memory: 16 bytes for each different pair of tokens seen near one another, twice that while pairs are merged, and
    about 8 (width + 16) bytes a token for the decomposition.

    Args:
        tokenizer: a transformers tokenizer.
        texts: the texts; no pair reaches from one into the next. Long ones are tokenised in parts, cut at spaces.
        width: of the vectors.
        window: how far apart two tokens of a pair may be.
        smoothing: exponent of the context distribution.
        seed: of the decomposition.
        progress: called with the tokens counted so far.

    Returns:
        ``(V, width)`` float32, V the largest id + 1. Zeros for tokens that the texts don't contain (see `unseen`);
        give these to a rule that needs no vectors.

    Raises:
        QuickmergeError: if the texts hold no two tokens.
        ValueError: for a setting out of range.
    """
    width = whole_number("width", width)
    window = whole_number("window", window)
    number_at_least("smoothing", smoothing, 0)
    size = max(tokenizer.get_vocab().values()) + 1
    ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for text in texts for part in _parts(text))
    key, count = count_pairs(ids, size, window, progress)
    if not len(key):
        raise QuickmergeError("texts must hold at least two tokens near one another, got none")
    return ppmi_vectors(key, count, size, width, smoothing=smoothing, seed=seed)


def count_pairs(
    documents: Iterable[list[int]], size: int, window: int, progress: Callable[[int], None] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How often two tokens lie at most ``window`` apart, in both orders.

    Returns:
        The pairs ``i * size + j``, rising, and how often each was seen.
    """
    key, count = np.empty(0, np.int64), np.empty(0, np.int64)
    done = 0
    for token, document in _blocks(documents):
        pairs = []
        for apart in range(1, window + 1):
            near = document[apart:] == document[:-apart]
            left, right = token[:-apart][near], token[apart:][near]
            pairs += [left * size + right, right * size + left]
        found, seen = np.unique(np.concatenate(pairs), return_counts=True)
        key, where = np.unique(np.concatenate([key, found]), return_inverse=True)
        count = np.bincount(where, np.concatenate([count, seen]), minlength=len(key)).astype(np.int64)
        done += len(token)
        if progress is not None:
            progress(done)
    return key, count


def ppmi_vectors(
    key: NDArray[np.int64], count: NDArray[np.int64], size: int, width: int, *, smoothing: float = 0.75, seed: int = 0
) -> Tensor:
    """``(size, width)`` float32 vectors from `count_pairs`; columns beyond the rank of the matrix are zeros."""
    i, j = np.divmod(key, size)
    n = count.astype(np.float64)
    token = np.bincount(i, n, minlength=size) / n.sum()
    seen = np.bincount(j, n, minlength=size)
    context = np.where(seen > 0, seen, 1.0) ** smoothing * (seen > 0)
    context = context / context.sum()
    value = np.log(n / n.sum() / (token[i] * context[j]))
    keep = value > 0
    place = torch.from_numpy(np.stack([i[keep], j[keep]]))
    matrix = torch.sparse_coo_tensor(place, torch.from_numpy(value[keep]), (size, size), check_invariants=False)
    rank = min(width, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Some more columns and rounds than are kept: singular values of texts fall slowly.
        u, s, _ = torch.svd_lowrank(matrix.coalesce(), q=min(size, rank + 16), niter=4)
    vectors = torch.zeros(size, width)
    vectors[:, :rank] = (u * s.clamp_min(0).sqrt())[:, :rank].float()
    vectors[torch.from_numpy(token == 0)] = 0.0
    return vectors


def unseen(embeddings: Tensor) -> Tensor:
    """``(U,)`` long: the tokens without a vector."""
    return (~embeddings.any(dim=1)).nonzero().flatten()


def _parts(text: str) -> Iterator[str]:
    """A text in parts, cut before a space: where tokenizers cut anyway."""
    start = 0
    while start < len(text):
        end = text.find(" ", start + CHARACTERS)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end


def _blocks(documents: Iterable[list[int]]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Tokens of many documents, and which document each is of."""
    token: list[NDArray[np.int64]] = []
    held = 0
    for ids in documents:
        token.append(np.asarray(ids, np.int64))
        held += len(ids)
        if held >= TOKENS:
            yield _joined(token)
            token, held = [], 0
    if held:
        yield _joined(token)


def _joined(token: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.concatenate(token), np.repeat(np.arange(len(token)), [len(t) for t in token])


# The donor: vectors for the tokens of the vocabulary that is wanted. Only its matrices are read, no layer of it.


@dataclass(frozen=True)
class Donor:
    """The vectors of a donor, in float32 (float64 where they are saved so)."""

    name: str
    input: Tensor
    """``(V, d)``, a row for every token id."""
    output: Tensor
    """``(V, d')``: its output matrix; the input matrix again where it has no other."""
    kind: str
    """What it is, for the report: "model, tied"..."""

    @property
    def rows(self) -> int:
        """How many tokens it has vectors for."""
        return int(self.input.shape[0])


def read_donor(donor: str | os.PathLike[str], *, progress: bool = True) -> Donor:
    """Read a donor's vectors.

    Args:
        donor: a model (an embedded name, a folder, a hub id), or a ``.safetensors`` file, or a folder of one such file,
            which holds one matrix with a row for every token id.
        progress: whether to show that something is fetched.

    Raises:
        QuickmergeError: it is neither, or its vectors are not plain finite numbers.
        UnknownModelError: there is no such model.
        DamagedWeightsError: its weights are truncated or garbled.
    """
    name = os.fspath(donor)
    if name in TOKENIZERS:
        return _vectors(name, EMBEDDED[name].prepare(cache_folder(None), progress=progress))
    path = Path(name).expanduser()
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return _vectors(name, path)
    folder = model_folder(name, progress=progress)
    checkpoint = open_checkpoint(folder)
    with transformers_silenced():
        config = read_config(str(folder))
    matrices = find_matrices(checkpoint, config, donor=True)
    rows = _numbers(matrices.input, checkpoint.read(matrices.input.name))
    head = matrices.output
    output = rows if head is None else _numbers(head, checkpoint.read(head.name))
    return Donor(name, rows, output, "model, input matrix for both" if head is None else "model, two matrices")


def _vectors(name: str, path: Path) -> Donor:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise QuickmergeError(
            f"donor must be a model, or a .safetensors file or a folder of one such file with a vector for each token, "
            f"got {name!r} with {len(files) if path.is_dir() else 'another kind of file'}"
            + (" such files" if path.is_dir() else "")
        )
    entries = [entry for entry in read_entries(files[0]) if len(entry.shape) == 2]
    if len(entries) != 1:
        raise QuickmergeError(f"donor must hold one matrix of vectors, got {len(entries)} of them in {files[0]}")
    from safetensors import safe_open

    with safe_open(files[0], framework="pt") as file:
        rows = _numbers(entries[0], file.get_tensor(entries[0].name))
    return Donor(name, rows, rows, "vectors")


def _numbers(entry: Entry, tensor: Tensor) -> Tensor:
    import torch

    if entry.dtype not in FLOATS:
        raise QuickmergeError(f"{entry.name} of the donor must be in one of {', '.join(FLOATS)}, got {entry.dtype}")
    rows = tensor if tensor.dtype == torch.float64 else tensor.float()
    finite = torch.isfinite(rows).all(-1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise QuickmergeError(f"{entry.name} of the donor must be finite numbers, got others in row {bad}")
    return rows
