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
    in front of it and ``overlap`` tokens that stand before it, by which the model finds the place. ``s_j`` is the
    largest attention that entry j receives from the second reading of its chunk, and from any query head of its key
    head; attention is over the entries of the chunk in the first and the second reading. What is left serves any
    question. The second reading costs more than the first, since all of that stands in front of it, and the cache is
    whole until then.

    Args:
        chunk: tokens that are read at a time; 0 for all of them.
        overlap: tokens in front of a chunk that are read with it.
    """

    chunk: int = 256
    overlap: int = 16
    heads: str = "adaptive"
    floor: float = 0.0
    name: ClassVar[str] = "kvzip"
    source: ClassVar[str] = "arXiv 2505.23416"
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "chunk", whole_number("chunk", self.chunk, 0))
        object.__setattr__(self, "overlap", whole_number("overlap", self.overlap, 0))

    def check(self, tokens: int, room: int | None) -> None:
        """Raise QuickmergeError if there are no positions for the second reading."""
        again = min(tokens, (self.chunk or tokens) + self.overlap)
        if room is not None and tokens + again > room:
            raise QuickmergeError(
                f"cache must be another method than kvzip for {tokens} tokens in a model of {room} positions: it reads "
                f"{again} tokens at a time behind the prompt"
            )

    def flops(self, shape: Heads, tokens: Sequence[float]) -> float:
        """The second reading, with the first in front of it, and the products of each chunk with itself."""
        spent = 0.0
        for n in tokens:
            chunk = min(n, self.chunk or n)
            again = n * (1 + (min(self.overlap, n - chunk) / chunk if chunk else 0))
            # Behind the first reading, and of the scores: queries times keys of the chunk, twice.
            spent += 4 * again * n + 2 * again * 1.5 * chunk
        return shape.prefill_flops(tokens) + spent * shape.heads * shape.head_dim

    def scores(self, view: CacheView) -> Tensor:
        """Of a chunk: queries ``(B, H, q, d)`` are of its second reading, behind ``n - q`` entries of the first.

        Returns:
            ``(B, G, n - q)``.
        """
        q, n = view.query.shape[2], view.key.shape[2]
        out = torch.zeros(*view.key.shape[:2], n - q, dtype=torch.float32, device=view.key.device)
        for rows in view.blocks():
            probs, _ = view.probabilities(rows)
            out = torch.maximum(out, probs[..., : n - q].amax((2, 3)).to(out.dtype))
        return out
