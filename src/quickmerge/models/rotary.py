"""Taking the rotary embedding off queries and keys again, and putting another one on."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.compat import rotation

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
    def of(cls, base: Any, attention: nn.Module, layer: int, *, wanted: str) -> Rotary:
        """The rotation in one block of a decoder, tried out on a few random numbers.

        Args:
            base: the decoder that holds ``rotary_emb``, such as ``model.model`` of a Llama.
            attention: the attention module of the block.
            layer: the block's index.
            wanted: what the user is told to do instead where that can't be, as in "space must be 'rotated'".

        Raises:
            UnsupportedModelError: if the angles change with the length of the sequence, there is no rotary embedding
                where one is looked for, or it turns other channels than these.
        """
        name = type(base).__name__
        if not getattr(attention, "use_rope", True):
            return cls(None)
        module = getattr(base, "rotary_emb", None)
        if not isinstance(module, nn.Module):
            raise UnsupportedModelError(f"{wanted} for {name}, which has no rotary embedding")
        layer_type = None
        if "layer_type" in inspect.signature(module.forward).parameters:
            types = getattr(base.config, "layer_types", None)
            layer_type = None if types is None else types[layer]
        kind = getattr(module, "rope_type", "default")
        kind = kind.get(layer_type, "default") if isinstance(kind, dict) else kind
        if kind in MOVING:
            raise UnsupportedModelError(
                f"{wanted} for {name}, whose rotary embedding of type {kind!r} changes with the length"
            )
        rotary = cls(module, layer_type)
        if not rotary._undoes(base.config, attention):
            raise UnsupportedModelError(
                f"{wanted} for {name}, whose rotary embedding turns channels in an order of its own"
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

    def mean_turn(self, position: Tensor, width: int) -> Tensor:
        """The mean of the rotations at ``position (B, n)``, as matrices ``(B, D, D)`` for columns of D channels."""
        eye = torch.eye(width, dtype=torch.float32, device=position.device)
        if self.module is None:
            return eye.expand(len(position), -1, -1)
        cos, sin = (angle.mean(1) for angle in self._angles(position, position.device))
        half = cos.shape[-1] // 2
        turn = eye.repeat(len(position), 1, 1)
        one, two = torch.arange(half, device=eye.device), torch.arange(half, 2 * half, device=eye.device)
        turn[:, one, one] = turn[:, two, two] = cos[:, :half]
        turn[:, one, two], turn[:, two, one] = -sin[:, :half], sin[:, :half]
        return turn

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
