"""KVzip: what is needed to write the prompt down again; for prompts that are read before anyone asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.merge.cache.evictor import Evictor, Heads
from quickmerge.merge.cache.view import CacheView


@dataclass(frozen=True)
class KVzip(Evictor):
    """Keep what the model needs to say the prompt again (arXiv 2505.23416).

    The prompt is read a second time behind itself, ``chunk`` tokens at a time, each chunk with all of the first reading
    in front of it. ``s_j`` is the largest attention that entry j receives from any of these queries, and from any query
    head of its key head; attention is over the first reading and the chunk itself. Reading costs about two prefills and
    the cache is whole until then; what is left serves any question.

    Args:
        chunk: tokens that are read at a time; 0 for all of them.
        every: of how many queries of the second reading one is looked at.
    """

    chunk: int = 2048
    every: int = 1
    heads: str = "adaptive"
    name: ClassVar[str] = "kvzip"
    source: ClassVar[str] = "arXiv 2505.23416"
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "chunk", whole_number("chunk", self.chunk, 0))
        object.__setattr__(self, "every", whole_number("every", self.every))

    def check(self, tokens: int, room: int | None) -> None:
        """Raise QuickmergeError if there are no positions for the second reading."""
        again = min(tokens, self.chunk or tokens)
        if room is not None and tokens + again > room:
            raise QuickmergeError(
                f"cache must be another method than kvzip for {tokens} tokens in a model of {room} positions: it reads "
                f"{again} tokens at a time behind the prompt"
            )

    def flops(self, shape: Heads, tokens: Sequence[float]) -> float:
        """The second reading, with the first in front of it, and its attention once more for the scores."""
        again = sum(n * n + (n * n if not self.chunk else n * min(n, self.chunk)) / 2 for n in tokens)
        behind = 4 * sum(n * n for n in tokens) + 2 * again / self.every
        return shape.prefill_flops(tokens) + behind * shape.heads * shape.head_dim

    def scores(self, view: CacheView) -> Tensor:
        """Of a second reading: queries ``(B, H, q, d)`` are its last tokens, behind ``n - q`` entries of the first.

        Returns:
            ``(B, G, n - q)``.
        """
        q, n = view.query.shape[2], view.key.shape[2]
        out = torch.zeros(*view.key.shape[:2], n - q, dtype=torch.float32, device=view.key.device)
        for rows in view.blocks(every=self.every):
            probs, _ = view.probabilities(rows)
            out = torch.maximum(out, probs[..., : n - q].amax((2, 3)).to(out.dtype))
        return out
