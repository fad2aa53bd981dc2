"""A document, cut into context and continuation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError

LEAST = 1000
"""Fewest tokens a document must have to be measured."""


@dataclass(frozen=True)
class Document:
    """``context (1, N)`` and ``target (1, M)`` token ids of one document; ``kind`` groups documents in tables."""

    name: str
    context: Tensor
    target: Tensor
    kind: str | None = None


def split_document(
    tokenizer: Any, text: str, name: str, *, context: int = 1024, target: int = 192, kind: str | None = None
) -> Document:
    """Cut a text into ``context`` tokens and the ``target`` tokens that follow, from its start.

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
    row = torch.tensor([ids[: length + target]])
    return Document(name, row[:, :length], row[:, length:], kind)
