"""A cache that grows in place, and keeps the clusters of its keys in step with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from quickmerge.attention.clusters import Clusters
from quickmerge.attention.settings import Multipole
from quickmerge.errors import QuickmergeError
from quickmerge.models.compat import DynamicLayer, cache_name

SPARE = 8
"""A buffer is made larger than what it must hold by a share of 1 / SPARE."""

LEAST = 256
"""And by so many tokens at least."""

__all__ = ["MultipoleCache", "MultipoleLayer"]


class Facts(NamedTuple):
    """What is known of clusters without asking the device.

    For each row the first column that is clustered, one past the last, and how many clusters there are, fine and coarse
    ones; and the memory that they take.
    """

    clusters: Clusters
    coarse: Clusters | None
    start: list[int]
    end: list[int]
    fine: list[int]
    upper: list[int]
    bytes: int


class MultipoleLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer for full attention: every key and value it was ever given, and the clusters made of them.

    ``keys`` and ``values`` ``(B, H, n, D)`` are views of buffers with room to spare. New tokens are written behind the
    last one, so the past is copied only when the room is used up, which it is ever more rarely. Where gradients are
    recorded a copy is made for every update, as in any other layer.

    What changes rows or columns changes the clusters with them: cropping, beams, repeating and picking rows.

    ``clusters``: of the clustered columns; None where there are none yet.
    ``coarse``: the upper one of two levels; None where there is one.
    ``made_with``: the settings that the clusters were made with.
    ``stale``: whether a prompt was read, or clustered tokens were taken back, since the clusters were made.
    ``position (B, n)`` long: the place at which each key was rotated, if anybody noted it.
    """

    keys: Any
    values: Any
    is_whole = True
    """Every token of the sequence has a column of its own here."""

    def __init__(self) -> None:
        super().__init__()
        self.clusters: Clusters | None = None
        self.coarse: Clusters | None = None
        self.made_with: Multipole | None = None
        self.stale = True
        self.position: Tensor | None = None
        self._rooms: list[Tensor | None] = [None, None]
        self._facts: Facts | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys ``(B, H, q, D)`` and values ``(B, H, q, Dv)``; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self._rooms[0] = _append(self.keys, self._rooms[0], key_states)
        self.values, self._rooms[1] = _append(self.values, self._rooms[1], value_states)
        return self.keys, self.values

    def note_positions(self, position: Tensor) -> None:
        """Note the places ``(B or 1, q)`` at which the last ``q`` keys were rotated.

        Raises:
            QuickmergeError: if keys before them came without their places.
        """
        new = position.expand(len(self.keys), -1)
        past = self.get_seq_length() - new.shape[1]
        held = new[:, :0] if self.position is None else self.position
        if held.shape[1] < past:
            raise QuickmergeError(
                f"{cache_name()} was filled where nobody noted positions, which space='windowed' needs: fill it "
                "inside the run, or use space='rotated'"
            )
        self.position = torch.cat([held[:, :past], new], 1)

    def forget_clusters(self) -> None:
        """Drop the clusters; keys and values stay."""
        self.clusters = self.coarse = self.made_with = self._facts = None
        self.stale = True

    @property
    def facts(self) -> Facts | None:
        """See `Facts`; None where nothing is clustered."""
        clusters, coarse, known = self.clusters, self.coarse, self._facts
        if clusters is None:
            return None
        if known is None or known.clusters is not clusters or known.coarse is not coarse:
            # Looked up once, since on a GPU it means waiting.
            start = [int(column) for column in clusters.start.tolist()]
            end = [first + sum(b.length for b in row) for first, row in zip(start, clusters.blocks, strict=True)]
            fine = [sum(b.clusters for b in row) for row in clusters.blocks]
            upper = [] if coarse is None else [sum(b.clusters for b in row) for row in coarse.blocks]
            size = clusters.bytes + (0 if coarse is None else coarse.bytes)
            known = self._facts = Facts(clusters, coarse, start, end, fine, upper, size)
        return known

    def due(self, settings: Multipole) -> int:
        """How many columns there must be before the new tokens for another group to be clustered in some row."""
        facts, step = self.facts, settings.interval
        if facts is None:
            return settings.sink + 2 * step
        # Clusters that were cut may end within a group.
        return (
            min(start + (end - start) // step * step for start, end in zip(facts.start, facts.end, strict=True))
            + 2 * step
        )

    @property
    def bytes(self) -> int:
        """Memory of keys and values, with the room to spare."""
        pairs = zip((self.keys, self.values), self._rooms, strict=True)
        held = (room if _views(view, room) else view for view, room in pairs)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    # What transformers does to a layer ---------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, ``-tokens_to_remove`` of them, with whatever was clustered of them."""
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        left = None if self.clusters is None else self.clusters.crop(length)
        if left is not self.clusters:
            self.clusters, self.coarse, self.stale = left, None, True
        if self.position is not None:
            self.position = self.position[:, :length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        self._pick(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.get_seq_length() > 0:
            rows = torch.arange(len(self.keys), device=self.keys.device)
            self._pick(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows: their numbers, or a mask of all rows."""
        if self.get_seq_length() > 0:
            rows = torch.arange(len(self.keys), device=self.keys.device)
            self._pick(rows[indices.to(rows.device)])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.forget_clusters()
        self.position = None
        self._rooms = [None, None]

    def _pick(self, index: Tensor) -> None:
        length = self.get_seq_length()
        if not length:
            return
        for place, name in enumerate(("keys", "values")):
            held, room = getattr(self, name), self._rooms[place]
            # With its room, so that the next token needs no second copy.
            whole = room if room is not None and _views(held, room) else held
            picked = whole.index_select(0, index.to(whole.device))
            self._rooms[place] = picked if whole is room else None
            setattr(self, name, picked[:, :, :length])
        if self.clusters is not None:
            self.clusters = self.clusters.select_rows(index)
        if self.coarse is not None:
            self.coarse = self.coarse.select_rows(index)
        if self.position is not None:
            self.position = self.position.index_select(0, index.to(self.position.device))


class MultipoleCache(DynamicCache):  # type: ignore[misc]
    """A `transformers.DynamicCache` whose layers of full attention can hold clusters; sliding ones are as they were.

    Inside `quickmerge.multipole` every empty `DynamicCache` becomes such a one. Made by hand it may also be filled
    outside, in ``model(...)`` or ``generate``, where it is a plain cache, and then be read inside a run, or inside
    several with other settings: clusters are kept as long as they were made with the settings that are asked for.

    Args:
        config: the configuration of the model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = MultipoleLayer()


def _views(held: Tensor | None, room: Tensor | None) -> bool:
    """Whether ``held`` is the front part of ``room``."""
    if held is None or room is None or held.ndim != room.ndim:
        return False
    same = held.data_ptr() == room.data_ptr() and held.stride() == room.stride()
    return same and held.shape[:2] == room.shape[:2] and held.shape[2] <= room.shape[2]


def _append(held: Tensor, room: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor | None]:
    """``held`` with ``new`` behind it, and the buffer that both are in; None if there is none."""
    if torch.is_grad_enabled() and (new.requires_grad or held.requires_grad):
        return torch.cat([held, new], -2), None
    past = held.shape[2] if held.ndim == 4 else 0
    need = past + new.shape[2]
    # A tensor that was made in inference mode may not be written to outside.
    closed = room is not None and room.is_inference() and not torch.is_inference_mode_enabled()
    if room is None or closed or room.shape[2] < need or not _views(held, room):
        room = new.new_empty(*new.shape[:2], need + max(need // SPARE, LEAST), new.shape[3])
        if past:
            room[:, :, :past] = held
    room[:, :, past:need] = new
    return room[:, :, :need], room
