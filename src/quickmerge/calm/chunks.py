"""Texts as chunks of K tokens: one way for both stages of training, for evaluation and for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quickmerge.errors import QuickmergeError, whole_number

__all__ = ["chunk_count", "chunk_document", "chunk_prompts", "real_chunks"]


def chunk_count(tokens: int, patch: int, phase: int = 0) -> int:
    """Chunks of a document of so many tokens, its end token and ``phase`` pads in front included."""
    return -(-(phase + tokens + 1) // patch)


def chunk_document(
    ids: Sequence[int] | NDArray[Any] | Tensor, patch: int, eos: int, pad: int, phase: int = 0
) -> Tensor:
    """A document as chunks ``(N, K)``: ``phase`` pads, its tokens, the end token, pads up to a multiple of K.

    Pads in front shift what falls into one chunk. Both stages of training draw them anew each time, so that a prompt
    of any length, which is padded in front as well, looks like what was trained on.

    Args:
        ids: the document's tokens, without an end token.
        patch: K, tokens of a chunk.
        eos: id of the end token.
        pad: id of the pad, which no text uses.
        phase: pads in front, 0 to K - 1.

    Raises:
        ValueError: for a phase out of range, or ids that are no row.
    """
    _check(patch, phase)
    row = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    if row.ndim != 1:
        raise ValueError(f"ids must be a row of token ids, got the shape {tuple(row.shape)}")
    chunks = torch.full((chunk_count(len(row), patch, phase) * patch,), pad)
    chunks[phase : phase + len(row)] = row
    chunks[phase + len(row)] = eos
    return chunks.view(-1, patch)


def chunk_prompts(
    input_ids: Tensor, patch: int, pad: int, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Prompts as chunks: each padded in front to a multiple of K, and whole pad chunks before shorter ones.

    Args:
        input_ids: ``(B, L)`` token ids.
        patch: K, tokens of a chunk.
        pad: id of the pad, which no text uses.
        attention_mask: ``(B, L)``, 0 where a tokenizer padded, on either side and with any id; None: nowhere.

    Returns:
        Ids ``(B, T * K)``, and which chunks hold a token ``(B, T)``: a row's last ones.

    Raises:
        QuickmergeError: for shapes that don't fit, or a prompt without a token.
    """
    patch = whole_number("patch", patch)
    if input_ids.ndim != 2:
        raise QuickmergeError(f"input_ids must be (prompts, tokens), got the shape {tuple(input_ids.shape)}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise QuickmergeError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(mask.shape)}"
        )
    there = mask.bool()
    lengths = there.sum(1)
    if not input_ids.numel() or bool((lengths == 0).any()):
        raise QuickmergeError("each prompt must have at least one token, got one without")
    width = -(-int(lengths.max()) // patch) * patch
    ids = input_ids.new_full((len(input_ids), width), pad)
    # The order of a row's tokens is kept, whichever side its padding was on.
    ids[torch.arange(width, device=ids.device) >= width - lengths[:, None]] = input_ids[there]
    first = (width - lengths) // patch
    return ids, torch.arange(width // patch, device=ids.device) >= first[:, None]


def real_chunks(chunks: Tensor, pad: int) -> Tensor:
    """Which of the chunks ``(..., K)`` hold anything but pads, ``(...)``."""
    return (chunks != pad).any(-1)


def _check(patch: int, phase: int) -> None:
    patch = whole_number("patch", patch)
    if isinstance(phase, bool) or not isinstance(phase, int) or not 0 <= phase < patch:
        raise ValueError(f"phase must be a whole number from 0 to {patch - 1}, got {phase!r}")
