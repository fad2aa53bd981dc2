"""The space in which the keys of a cache layer are clustered, and a query compared with centroids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quickmerge.attention.cache import MultipoleLayer
from quickmerge.attention.clustering import Columns
from quickmerge.attention.rotary import Rotary
from quickmerge.errors import QuickmergeError

__all__ = ["Space"]


class Space:
    """How one block's keys and queries are seen: as they are, or with their rotation changed (``space="windowed"``).

    Args:
        rotary: the block's rotation; None: keys and queries as they are.
        query_position: where the query stands then, with all keys at 0.
    """

    def __init__(self, rotary: Rotary | None, query_position: int) -> None:
        self.rotary, self.query_position = rotary, query_position

    def note(self, held: MultipoleLayer, position: Any) -> None:
        """Note at which places ``(B or 1, q)`` the newest keys were rotated, if that is needed."""
        if self.rotary is None:
            return
        if not isinstance(position, Tensor) or position.ndim != 2:
            raise QuickmergeError("position_ids must be given to attention as (rows, tokens) for space='windowed'")
        held.note_positions(position)

    def keys(self, held: MultipoleLayer) -> Columns:
        """The keys to cluster; turned when they are asked for, and only those."""
        rotary, position = self.rotary, held.position
        if rotary is None or position is None:
            as_held: Tensor = held.keys
            return as_held

        def columns(rows: Sequence[int], first: Sequence[int], length: int) -> Tensor:
            spans = [(row, slice(at, at + length)) for row, at in zip(rows, first, strict=True)]
            keys = torch.stack([held.keys[row, :, span] for row, span in spans])
            return rotary.unrotate(keys, torch.stack([position[row, span] for row, span in spans]))

        return columns

    def query(self, held: MultipoleLayer, query: Tensor) -> Tensor | None:
        """Queries ``(B, Hq, q, D)`` of the newest tokens as they are compared with centroids; None: as they are."""
        if self.rotary is None or held.position is None:
            return None
        return self.rotary.move(query, held.position[:, -query.shape[2] :], self.query_position)
