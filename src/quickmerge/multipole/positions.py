"""How many tokens each column of a cache stands for, told by what a model hands its attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.models.rotary import Rotary
from quickmerge.multipole.cache import MultipoleLayer
from quickmerge.multipole.clustering import Columns


class Sizes:
    """The sizes of a layer's columns in one forward of the model.

    What the newest token may see is what there is, whatever it was that told the model so: padding, or the slots of a
    merge that has fewer in one row than in another.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._trees: dict[int, Tensor] = {}
        self._first: dict[int, list[int]] = {}

    def behind(self, mask: Tensor, new: int) -> Tensor:
        """What the ``new`` last tokens see of one another, ``(B or 1, new, new)`` bool, by a mask of attention.

        They are no text in a row but a tree of drafts: none of them is the newest, so from now on `of` asks the first
        one what there is in front of them all.
        """
        if id(mask) not in self._trees:
            see = visible(mask[:, 0, :, -new:])
            there = visible(mask[:, 0, 0])
            there = torch.cat([there[:, :-new], torch.ones_like(there[:, -new:])], 1)
            self._seen[id(mask)] = (mask, None if bool(there.all()) else there)
            self._trees[id(mask)] = see
        return self._trees[id(mask)]

    def of(self, mask: Tensor | None, key_size: Tensor | None, key: Tensor) -> Tensor | None:
        """``(B, n)`` float32: tokens that each key stands for, 0 where there is none; None if each stands for itself.

        Args:
            mask: the mask of attention ``(B or 1, 1, q, n)``, bool or what is added to logits; None hides nothing.
            key_size: ``(B, n)`` whole numbers, sizes of slots; None: one each.
            key: ``(B, H, n, D)``.
        """
        valid = None if mask is None else self._valid(mask, key)
        if key_size is None:
            return None if valid is None else valid.float()
        size = key_size.clamp_min(1).float()
        return size if valid is None else torch.where(valid, size, 0.0)

    def first(self, mask: Tensor | None, key: Tensor) -> list[int] | None:
        """The first column of each row that holds a token; None for 0 in all of them."""
        valid = None if mask is None else self._valid(mask, key)
        if valid is None:
            return None
        if id(mask) not in self._first:  # to ask the device means to wait for it, so that is done once
            self._first[id(mask)] = valid.to(torch.uint8).argmax(-1).tolist()
        return self._first[id(mask)]

    def _valid(self, mask: Tensor, key: Tensor) -> Tensor | None:
        # Blocks share their mask. It is kept, so that no other can take its address meanwhile.
        if id(mask) not in self._seen:
            there = visible(mask[:, 0, -1, : key.shape[2]]).expand(len(key), -1)
            self._seen[id(mask)] = (mask, None if bool(there.all()) else there)
        return self._seen[id(mask)][1]


def visible(mask: Tensor) -> Tensor:
    """Where a mask lets attention look, bool: one that is bool itself, or is added to logits."""
    return mask if mask.dtype == torch.bool else mask >= 0


# The space in which the keys of a cache layer are clustered, and a query compared with centroids.
#
# Clustered as the cache holds them, keys that say the same at different places lie apart. In the windowed space
# (arXiv 2506.13059, section 3; the idea is that of A2ATS) keys are clustered as if all stood at position 0, and
# compared with the query as if it stood at one fixed position.


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

    def keys(self, held: MultipoleLayer, read: Tensor | None = None) -> Columns:
        """The keys to cluster; turned when they are asked for, and only those.

        Args:
            held: the layer of the cache.
            read: the keys ``(B, H, n, D)`` that attention reads, where the layer holds something else that they are
                made of. Default: those that it holds.
        """
        rotary, position = self.rotary, held.position
        every: Tensor = held.keys if read is None else read
        if rotary is None or position is None:
            return every

        def columns(rows: Sequence[int], first: Sequence[int], length: int, heads: slice) -> Tensor:
            spans = [(row, slice(at, at + length)) for row, at in zip(rows, first, strict=True)]
            keys = torch.stack([every[row, heads, span] for row, span in spans])
            return rotary.unrotate(keys, torch.stack([position[row, span] for row, span in spans]))

        return columns

    def query(self, held: MultipoleLayer, query: Tensor) -> Tensor | None:
        """Queries ``(B, Hq, q, D)`` of the newest tokens as they are compared with centroids; None: as they are."""
        if self.rotary is None or held.position is None:
            return None
        return self.rotary.move(query, held.position[:, -query.shape[2] :], self.query_position)
