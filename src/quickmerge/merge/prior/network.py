"""A light causal transformer over slots: pre-norm blocks, rotary positions, a cache for step-by-step use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quickmerge.merge.tokens.budget import select
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.view import TokenView

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


# Slots as vectors: members pooled by learnt weights, with where and how large each slot is.


FREQUENCIES = 4
"""Sines and cosines per coordinate of a grid position."""


def group_softmax(logit: Tensor, slot: Tensor, slots: int) -> Tensor:
    """Softmax over the members of each slot: merge weights that sum to one inside every slot.

    Args:
        logit: ``(B, N, H)``, one per token and pooling head.
        slot: ``(B, N)`` long, each token's slot or -1.
        slots: K.

    Returns:
        ``(B, N, H)``, zero for tokens in no slot.
    """
    b, _, h = logit.shape
    member = (slot >= 0)[..., None]
    into = torch.where(slot >= 0, slot, slots)[..., None].expand(-1, -1, h)
    ceiling = logit.new_full((b, slots + 1, h), -torch.inf)
    # The shift changes no weight, so no gradient has to pass through it.
    ceiling = ceiling.scatter_reduce(1, into, logit.detach(), "amax")
    raw = torch.where(member, (logit - ceiling.gather(1, into)).exp(), 0.0)
    total = logit.new_zeros(b, slots + 1, h).scatter_add(1, into, raw)
    weight: Tensor = raw / total.gather(1, into).clamp_min(torch.finfo(logit.dtype).tiny)
    return torch.where(member, weight, 0.0)


def sum_by_slot(value: Tensor, slot: Tensor, slots: int) -> Tensor:
    """Add up each slot's members: ``(B, N, D)`` to ``(B, K, D)``; padding slots are zero."""
    into = torch.where(slot >= 0, slot, slots)[..., None].expand(-1, -1, value.shape[-1])
    out = value.new_zeros(len(value), slots + 1, value.shape[-1]).scatter_add(1, into, value)
    return out[:, :slots]


def cells(view: TokenView, plan: MergePlan) -> Tensor:
    """``(B, K, 3)`` mean place of each slot's members along time, height and width, in cells of ``view.grid``.

    The token at position p stands in the p-th cell; the first is at (0, 0, 0).

    Raises:
        ValueError: if the view has no grid.
    """
    if view.grid is None:
        raise ValueError("grid must be (T, H, W) for a prior of two or three axes, got none")
    place = torch.stack(torch.unravel_index(torch.where(view.valid, view.position, 0), view.grid), -1)
    return plan.merge(place.to(torch.promote_types(view.hidden.dtype, torch.float32)))


def spans(view: TokenView, plan: MergePlan) -> Tensor:
    """``(B, K)`` distance in positions from a slot's first to its last member, plus one; 0 for padding slots."""
    into = torch.where(plan.slot >= 0, plan.slot, plan.slots)
    low = torch.full((len(into), plan.slots + 1), torch.iinfo(torch.long).max, device=into.device)
    first = low.scatter_reduce(1, into, view.position, "amin")[:, : plan.slots]
    last = torch.zeros_like(low).scatter_reduce(1, into, view.position, "amax")[:, : plan.slots]
    return torch.where(plan.valid, last - first + 1, 0)


class SlotEncoder(nn.Module):
    """Slot features: ``u_k = W_a x_k + [sum_{j in G_k} w_hj V_h x_j]_h + geometry(size, span, place)``.

    ``x_k`` is the slot as the plan merges it, and ``w_hj = softmax_{j in G_k}(a_h . x_j)`` are the learned merge
    weights of pooling head h, so that a slot can hold several summaries of its members. Features are normalised
    first: residual streams have a few very large channels.

    Without pooling heads there is only ``W_a x_k`` of features as they are, and geometry: `content` and `place`.

    Args:
        features: D.
        width: of the slot features.
        pool: pooling heads; 0 for none.
        axes: coordinates of a position.
    """

    def __init__(self, features: int, width: int, pool: int, axes: int) -> None:
        super().__init__()
        self.pool, self.axes = pool, axes
        self.norm = nn.RMSNorm(features) if pool else nn.Identity()
        self.anchor = nn.Linear(features, width)
        if pool:
            self.member = nn.Linear(features, width, bias=False)
            self.weight = nn.Linear(features, pool)
        self.geometry = nn.Linear(3 + (2 * FREQUENCIES * axes if axes > 1 else 0), width)
        if pool:
            # The merge begins as the plain mean of a slot's members.
            nn.init.zeros_(self.weight.weight)
            nn.init.zeros_(self.weight.bias)

    def merge(self, x: Tensor, slot: Tensor, slots: int) -> Tensor:
        """The learned merge of normalised members ``x (B, N, D)``: ``(B, K, width)``."""
        weight = group_softmax(self.weight(x), slot, slots)
        value = self.member(x).unflatten(-1, (self.pool, -1))
        return sum_by_slot((value * weight[..., None]).flatten(2), slot, slots)

    def place(self, size: Tensor, span: Tensor, left: Tensor, coordinates: Tensor | None = None) -> Tensor:
        """Geometry features ``(B, K, width)`` of slots.

        Args:
            size, span: ``(B, K)``, in original tokens.
            left: ``(B, K)``, original tokens from the slot to the end of its sequence.
            coordinates: ``(B, K, axes)`` in [0, 1], for grids.
        """
        dtype = self.geometry.weight.dtype
        logs = torch.stack([t.to(dtype).clamp_min(1).log() for t in (size, span, left)], -1)
        if coordinates is not None:
            steps = math.pi * 2.0 ** torch.arange(FREQUENCIES, device=size.device, dtype=dtype)
            angle = (coordinates.to(dtype)[..., None] * steps).flatten(-2)
            logs = torch.cat([logs, angle.sin(), angle.cos()], -1)
        out: Tensor = self.geometry(logs)
        return out

    def content(self, slots: Tensor) -> Tensor:
        """What is read of merged features ``(..., D)``, members apart: ``(..., width)``."""
        out: Tensor = self.anchor(self.norm(slots.to(self.anchor.weight.dtype)))
        return out

    def forward(self, view: TokenView, plan: MergePlan) -> Tensor:
        """``(B, K, width)`` for the tokens and the plan that merged them."""
        dtype = self.anchor.weight.dtype
        x = self.norm(view.hidden.to(dtype))
        merged = self.norm(plan.merge(view.hidden).to(dtype))
        end = torch.where(view.valid, view.position, 0).amax(-1, keepdim=True)
        place = self.place(plan.size, spans(view, plan), end - plan.position + 1)
        out: Tensor = self.anchor(merged) + self.merge(x, plan.slot, plan.slots) + place
        return out


# Choosing tokens so that the choice can be learned: noisy top-k with straight-through gates.


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape and type of ``like``: ``-log(-log u)``."""
    tiny = torch.finfo(like.dtype).tiny
    u = torch.rand_like(like).clamp(tiny, 1 - torch.finfo(like.dtype).eps)
    return -(-u.log()).log()


def soft_top_k(score: Tensor, count: Tensor, free: Tensor, temperature: float) -> Tensor:
    """A smooth stand-in for being among the ``count`` best: ``y_i = sigmoid((s_i - theta) / temperature)``.

    ``theta`` lies halfway between the last score that is chosen and the first that is not, and is held constant in
    the gradient; for temperature to 0, ``y`` becomes the choice itself. (A softmax over the tokens, as in the public
    code of QuickMerge++, sums to one and so picks about one token, not K.)

    Args:
        score: ``(B, N)``.
        count: ``(B,)``, how many of the free tokens are chosen.
        free: ``(B, N)`` bool, the tokens that compete.
        temperature: in units of the score.

    Returns:
        ``(B, N)`` in (0, 1), zero where not free.
    """
    ranked = score.detach().masked_fill(~free, -torch.inf).sort(-1, descending=True).values
    last = (count - 1).clamp(0, score.shape[1] - 1)[:, None]
    rivals = free.sum(-1, keepdim=True)
    first_out = torch.minimum(last + 1, (rivals - 1).clamp_min(0))
    theta = (ranked.gather(1, last) + ranked.gather(1, first_out)) / 2
    theta = torch.where(theta.isfinite(), theta, 0.0)
    return torch.where(free, torch.sigmoid((score - theta) / temperature), 0.0)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """``hard`` in the forward pass, the gradient of ``soft`` in the backward pass."""
    return hard.to(soft.dtype) + soft - soft.detach()


def noisy_select(
    score: Tensor,
    count: Tensor,
    view: TokenView,
    fixed: Tensor,
    temperature: float,
    *,
    spans: Tensor | None = None,
    choose: Callable[[TokenView, Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gumbel-top-k: a draw of ``count`` tokens without replacement, likelier the higher they score.

    Args:
        score: ``(B, N)`` log-odds-like saliency.
        count: ``(B,)`` tokens to keep, the fixed ones among them.
        view: the tokens.
        fixed: ``(B, N)`` bool, tokens that are kept in any case and neither compete nor get a gradient.
        temperature: of the noise and of the gate; 0 for none of either.
        spans: ``(B, N)`` long, the spans of each row counted from 0, whose tokens share one draw of the noise, so that
            those of one score stay together. Default: every token is drawn for itself.
        choose: of the tokens, a score and the count, which are kept. Default: `select`.

    Returns:
        ``(B, N)`` bool, exactly ``count`` tokens a row; and the gate ``(B, N)``, 1 where a token is kept and 0
        elsewhere, whose gradient is that of `soft_top_k`.
    """
    free = view.free & ~fixed
    noisy = score
    if temperature > 0:
        noise = gumbel(score)
        noisy = score + temperature * (noise if spans is None else noise.gather(1, spans))
    wanted = torch.where(fixed, torch.inf, noisy)
    anchor = select(wanted, count, view) if choose is None else choose(view, wanted, count)
    if temperature <= 0:
        return anchor, anchor.to(score.dtype)
    rest = count - (anchor & ~free).sum(-1)
    return anchor, straight_through(anchor, soft_top_k(noisy, rest, free, temperature))


class SaliencyHead(nn.Module):
    """A learned term of the log-saliency from a token's own features; zero at first.

    ``h(x) = w . silu(W x)``, added to the logarithm of the training-free saliency.
    """

    def __init__(self, features: int, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(features)
        self.inner, self.out = nn.Linear(features, width), nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(B, N, D)`` to ``(B, N)``."""
        x = self.norm(hidden.to(self.inner.weight.dtype))
        return self.out(torch.nn.functional.silu(self.inner(x)))[..., 0]  # type: ignore[no-any-return]
