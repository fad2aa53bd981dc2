"""How deep a tree may be: no deeper than the text that is left, nor than what the model reads alike at one time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Room"]


class Room:
    """The depth that is left for the trees of a batch.

    Behind the last position of the model's context nothing is drafted; what ``generate`` does there happens token by
    token. The same holds at a length from which on a model turns its rotary embedding otherwise (``longrope``, and
    ``dynamic`` beyond the context): nodes on both sides of it can't be read in one pass.

    Args:
        config: of the language model.
    """

    def __init__(self, config: Any) -> None:
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.bounds: list[int] = []
        rope = getattr(config, "rope_parameters", None) or {}
        for some in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
            if some.get("rope_type") == "longrope":
                self.bounds.append(some["original_max_position_embeddings"])

    def depths(self, positions: Sequence[int], left: Sequence[int]) -> list[int]:
        """Steps that the tree of each row may go down from its root.

        Args:
            positions: of the roots.
            left: how many more tokens each row may get; a node at depth d leads to token d + 1.
        """
        top = max(positions)
        out = []
        for position, more in zip(positions, left, strict=True):
            depth = more - 1
            if self.context is not None:
                depth = min(depth, self.context - 1 - position)
            # The longest row decides for all of them how the embedding is turned.
            for bound in self.bounds:
                if top < bound:
                    depth = min(depth, bound - 1 - top)
            out.append(max(0, depth))
        return out
