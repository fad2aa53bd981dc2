"""How many tokens each column of a cache stands for, told by what a model hands its attention."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.models.compat import rotation
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


# Taking the rotary embedding off cached keys, and standing a query at one distance from all of them.
#
# Clustered as the cache holds them, keys that say the same at different places lie apart. In the windowed space
# (arXiv 2506.13059, section 3; the idea is that of A2ATS) keys are clustered as if all stood at position 0, and
# compared with the query as if it stood at one fixed position.


MOVING = ("dynamic", "longrope")
"""Kinds of rotary embedding whose angles depend on how long the sequence has become."""

PROBE = (0, 1, 7, 100)
"""Positions at which a model's own rotation is undone before it is trusted."""


@dataclass(frozen=True)
class Rotary:
    """The rotation of one block's queries and keys, by the model's own module.

    With angles ``p f`` at position p, channels j and j + R/2 of the first R are turned by ``p f_j`` and multiplied by
    the embedding's attention scaling (that of YaRN). Only the turning is undone, so a key without rotation is a key at
    position 0.

    ``module``: gives cosine and sine of positions; None in a block that has no rotary embedding.
    ``layer_type``: what the module needs to know where blocks of different types have different angles.
    """

    module: nn.Module | None
    layer_type: str | None = None

    @classmethod
    def of(cls, base: Any, attention: nn.Module, layer: int) -> Rotary:
        """The rotation in one block of a decoder, tried out on a few random numbers.

        Args:
            base: the decoder that holds ``rotary_emb``, such as ``model.model`` of a Llama.
            attention: the attention module of the block.
            layer: the block's index.

        Raises:
            UnsupportedModelError: if the angles change with the length of the sequence, there is no rotary embedding
                where one is looked for, or it turns other channels than these.
        """
        name = type(base).__name__
        if not getattr(attention, "use_rope", True):
            return cls(None)
        module = getattr(base, "rotary_emb", None)
        if not isinstance(module, nn.Module):
            raise UnsupportedModelError(f"space must be 'rotated' for {name}, which has no rotary embedding")
        layer_type = None
        if "layer_type" in inspect.signature(module.forward).parameters:
            types = getattr(base.config, "layer_types", None)
            layer_type = None if types is None else types[layer]
        kind = getattr(module, "rope_type", "default")
        kind = kind.get(layer_type, "default") if isinstance(kind, dict) else kind
        if kind in MOVING:
            raise UnsupportedModelError(
                f"space must be 'rotated' for {name}, whose rotary embedding of type {kind!r} changes with the length"
            )
        rotary = cls(module, layer_type)
        if not rotary._undoes(base.config, attention):
            raise UnsupportedModelError(
                f"space must be 'rotated' for {name}, whose rotary embedding turns channels in an order of its own"
            )
        return rotary

    def unrotate(self, keys: Tensor, position: Tensor) -> Tensor:
        """Keys ``(B, H, n, D)`` that were rotated at ``position (B or 1, n)``, as they are at position 0."""
        return self._turn(keys, position, -1)

    def move(self, query: Tensor, position: Tensor, to: int) -> Tensor:
        """Queries ``(B, Hq, q, D)`` that were rotated at ``position (B or 1, q)``, as they are at position ``to``.

        Turned back and forth rather than by the difference: in float32 the angles of far positions are rounded, and
        these roundings cancel only against themselves.
        """
        return self._turn(self._turn(query, position, -1), torch.full_like(position, to), 1)

    def _turn(self, x: Tensor, position: Tensor, sign: int) -> Tensor:
        """Turn ``x (B, h, n, D)`` by the angles of ``position``, forwards or back; computed in float32 at least."""
        if self.module is None:
            return x
        cos, sin = self._angles(position, x.device)
        half = cos.shape[-1] // 2
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        cos, sin = (a[:, None, :, :half].to(precise.dtype) for a in (cos, sign * sin))
        one, two = precise[..., :half], precise[..., half : 2 * half]
        return torch.cat([one * cos - two * sin, two * cos + one * sin, precise[..., 2 * half :]], -1).to(x.dtype)

    def _angles(self, position: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``(B or 1, n, R)`` in float32, without the attention scaling."""
        assert self.module is not None
        like = torch.empty(1, dtype=torch.float32, device=device)
        types = {} if self.layer_type is None else {"layer_type": self.layer_type}
        cos, sin = self.module(like, position, **types)
        scaling = (cos.square() + sin.square()).sqrt()
        return cos / scaling, sin / scaling

    @torch.no_grad()
    def _undoes(self, config: Any, attention: nn.Module) -> bool:
        """Whether `unrotate` takes off what the model puts on."""
        apply = rotation(attention)
        if apply is None or self.module is None:
            return False
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        place = torch.tensor([PROBE], device=next(self.module.buffers()).device)
        x = torch.randn(1, 1, len(PROBE), width, generator=torch.Generator().manual_seed(0)).to(place.device)
        types = {} if self.layer_type is None else {"layer_type": self.layer_type}
        cos, sin = self.module(x, place, **types)
        turned = apply(x, x, cos, sin)[1]
        if turned.shape != x.shape:
            return False
        # At position 0 there is nothing but the attention scaling, which the channels beyond the first R don't have.
        bare = torch.cat([x[..., : cos.shape[-1]] * cos[0, 0].abs().max(), x[..., cos.shape[-1] :]], -1)
        return torch.allclose(self.unrotate(turned, place), bare, rtol=1e-4, atol=1e-4)


# The space in which the keys of a cache layer are clustered, and a query compared with centroids.


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
