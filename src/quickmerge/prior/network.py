"""A light causal transformer over slots: pre-norm blocks, rotary positions, a cache for step-by-step use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROTARY_BASE = 10_000.0
GRID_BASE = 100.0
"""Of positions along several axes: grids are tens of cells long, not thousands."""


@dataclass
class SlotCache:
    """Keys and values of the slots read so far, one pair per block, each ``(B, heads, K, d)``; and their validity."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    valid: Tensor | None = None

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a function of tensors ``(B, ...)`` to everything that is kept, for beams."""
        self.keys, self.values = [change(k) for k in self.keys], [change(v) for v in self.values]
        self.valid = None if self.valid is None else change(self.valid)

    def __len__(self) -> int:
        return 0 if self.valid is None else self.valid.shape[1]


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary position embedding of ``x (B, heads, K, d)``.

    Pairs are (i, i + d/2). A score of rotated queries and keys depends on the difference of positions only.

    Args:
        x: queries or keys.
        position: ``(B, K)`` in original tokens, or ``(B, K, A)`` in cells along A axes. These share the pairs in equal
            parts, and what cannot be shared is left as it is.
    """
    half = x.shape[-1] // 2
    if position.ndim == 3:
        angle = _axial_angles(position, half)
    else:
        steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
        angle = position.to(torch.float32)[:, None, :, None] * ROTARY_BASE**-steps
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def _axial_angles(position: Tensor, half: int) -> Tensor:
    """``(B, K, A)`` to ``(B, 1, K, half)``: one axis after the other, each from fast to slow, then zeros."""
    each = half // position.shape[-1]
    steps = torch.arange(each, device=position.device, dtype=torch.float32) / max(1, each)
    angle = (position.to(torch.float32)[..., None] * GRID_BASE**-steps).flatten(-2)
    return F.pad(angle, (0, half - angle.shape[-1]))[:, None]


class Block(nn.Module):
    """One pre-norm transformer block: causal self-attention, then a GELU network."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, mlp * width), nn.Linear(mlp * width, width)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        mask: Tensor | None,
        cache: SlotCache | None,
        index: int,
        asking: Tensor | None = None,
    ) -> Tensor:
        """``x (B, K, width)`` to the same shape; ``mask (B, 1, K, past + K)`` bool, None for plain causal order."""
        b, k, width = x.shape
        query, key, value = self.qkv(self.attention_norm(x)).view(b, k, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = rotate(query, position if asking is None else asking), rotate(key, position)
        if cache is not None:
            if index < len(cache.keys):
                key = torch.cat([cache.keys[index], key], 2)
                value = torch.cat([cache.values[index], value], 2)
                cache.keys[index], cache.values[index] = key, value
            else:
                cache.keys.append(key)
                cache.values.append(value)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(read.transpose(1, 2).reshape(b, k, width))
        out: Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return out


class SlotTransformer(nn.Module):
    """``layers`` blocks and a final norm over slots in canonical order; slot k reads slots up to k only.

    Args:
        width: features per slot; a multiple of ``2 * heads``.
        layers: blocks.
        heads: attention heads.
        mlp: inner width of the network in a block, in multiples of ``width``.
    """

    def __init__(self, width: int, layers: int, heads: int, mlp: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, mlp) for _ in range(layers))
        self.norm = nn.RMSNorm(width)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        valid: Tensor,
        cache: SlotCache | None = None,
        asking: Tensor | None = None,
    ) -> Tensor:
        """Read slots.

        Args:
            x: ``(B, K, width)``.
            position: ``(B, K)``, place of each slot in the original sequence, or ``(B, K, A)`` on a grid of A axes.
            valid: ``(B, K)`` bool, False for padding slots, which nobody reads.
            cache: slots read before; it is extended by these.
            asking: positions from which the slots look at the others, if not from their own.

        Returns:
            ``(B, K, width)``; padding slots hold anything finite.
        """
        k, past = x.shape[1], 0 if cache is None else len(cache)
        known = valid if cache is None or cache.valid is None else torch.cat([cache.valid, valid], 1)
        mask: Tensor | None = None
        if past or not bool(known.all()):
            index = torch.arange(past + k, device=x.device)
            own = index[None, past:, None] == index[None, None, :]
            # A padding slot reads itself alone, since a row that reads nothing would be NaN.
            mask = ((index[None, None, :] <= index[None, past:, None]) & known[:, None, :] | own)[:, None]
        for number, block in enumerate(self.blocks):
            x = block(x, position, mask, cache, number, asking)
        if cache is not None:
            cache.valid = known
        out: Tensor = self.norm(x)
        return out
