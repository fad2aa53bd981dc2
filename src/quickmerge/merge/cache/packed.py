"""Keys and values of heads that hold different numbers of entries, stored without anything in between.

Attention wants one tensor for all heads, in which those that hold fewer are filled up. Kept like that, a cache in which
one head holds much takes as much memory for all of them. So a layer stores entries of all heads one behind the other,
and the full tensor is made for the moment in which its block runs, as caches that grow by concatenation do anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PAYS = 0.95
"""Entries are stored so where they are at most this share of what they would take filled up."""


@dataclass(frozen=True)
class Packed:
    """Keys, or values, of a layer: ``flat (M, d)`` of its first ``count`` columns, ``tail (B, G, t, d)`` behind them.

    ``at (M,)`` int32: where each entry stands, in ``(B, G, count)`` one behind the other.
    """

    flat: Tensor
    at: Tensor
    count: int
    tail: Tensor

    @classmethod
    def of(cls, x: Tensor, at: Tensor) -> Packed:
        """Of keys or values ``x (B, G, n, d)``, with what stands ``at (M,)``."""
        flat = x.reshape(-1, x.shape[-1]).index_select(0, at.to(x.device))
        return cls(flat, at, x.shape[2], x[:, :, x.shape[2] :].clone())

    @property
    def bytes(self) -> int:
        """Memory, that of ``at`` left out, which keys and values share."""
        return sum(x.numel() * x.element_size() for x in (self.flat, self.tail))

    def full(self) -> Tensor:
        """``(B, G, count + t, d)``, zero where there is nothing."""
        b, g, _, d = self.tail.shape
        front = self.flat.new_zeros(b * g * self.count, d).index_copy_(
            0, self.at.to(self.flat.device).long(), self.flat
        )
        return torch.cat([front.view(b, g, self.count, d), self.tail], 2)

    def grown(self, new: Tensor) -> Packed:
        """With columns ``(B, G, q, d)`` behind."""
        return replace(self, tail=torch.cat([self.tail, new], 2))


class Held:
    """``keys`` or ``values`` of a cache layer that may hold them packed; whoever asks is given the full tensor."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: Any, owner: type) -> Any:
        if layer is None:
            return self
        packed = layer.__dict__.get("packed") or {}
        return packed[self._name].full() if self._name in packed else layer.__dict__.get(self._name)

    def __set__(self, layer: Any, value: Any) -> None:
        layer.__dict__.get("packed", {}).pop(self._name, None)
        layer.__dict__[self._name] = value


def pack(layer: Any, total: int | None = None) -> None:
    """Store a layer's keys and values packed, if its heads hold so different numbers of entries that it pays.

    ``layer`` has ``keys`` and ``values`` as `Held`, and the tables of its ``heads``; ``total`` is how many entries all
    of these hold, None has it looked up.
    """
    valid = layer.heads.valid
    if valid is None or layer.is_sliding or layer.keys is None:
        return
    keys, values = layer.keys, layer.values
    flat = valid.expand(*keys.shape[:2], -1).flatten()
    if total is None or flat.device.type == "cpu":
        at = flat.nonzero().flatten().to(torch.int32)
    else:  # to sort takes longer, but what is found is of a known number
        at = (~flat).to(torch.uint8).argsort(stable=True)[:total].to(torch.int32)
    if len(at) > PAYS * keys.shape[0] * keys.shape[1] * keys.shape[2]:
        unpack(layer)
        return
    layer.packed = {"keys": Packed.of(keys, at), "values": Packed.of(values, at)}
    layer.__dict__["keys"] = layer.__dict__["values"] = None


def unpack(layer: Any) -> None:
    """Store a layer's keys and values as full tensors."""
    if getattr(layer, "packed", None):
        layer.keys, layer.values = layer.keys, layer.values
        layer.packed = {}


def shape_of(layer: Any) -> tuple[int, int, int]:
    """``(B, G, n)`` of what a layer holds, however it is stored."""
    packed: dict[str, Packed] = getattr(layer, "packed", None) or {}
    if not packed:
        return tuple(layer.keys.shape[:3])
    b, g, t, _ = packed["keys"].tail.shape
    return b, g, packed["keys"].count + t


def column_bytes(layer: Any) -> int:
    """Memory that one more column takes in a layer, with a key and a value a head; 0 for a layer that holds nothing."""
    packed: dict[str, Packed] = getattr(layer, "packed", None) or {}
    held = [each.tail for each in packed.values()] or [x for x in (layer.keys, layer.values) if x is not None]
    return sum(x.shape[0] * x.shape[1] * x.shape[-1] * x.element_size() for x in held if x.ndim == 4)


def packed_bytes(layer: Any) -> int:
    """Memory of what a layer stores packed; 0 if it doesn't."""
    packed: dict[str, Packed] = getattr(layer, "packed", None) or {}
    return sum(each.bytes for each in packed.values()) + sum(4 * len(each.at) for each in list(packed.values())[:1])
