"""How many tokens every block of a vision transformer takes out: constant, falling, rising, or listed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quickmerge.errors import whole_number


@dataclass(frozen=True)
class Removal:
    """Take ``r`` tokens out in every block (ToMe, arXiv 2210.09461).

    With an ``inflection`` c the numbers go in a straight line from ``r (1 - c)`` in the first block to
    ``r (1 + c)`` in the last: 0 is constant, -1 falls from ``2 r`` to 0, 1 rises from 0 to ``2 r``. Numbers are
    rounded so that the running total is the nearest whole number to the line's, and no token is lost to rounding.

    Args:
        r: tokens per block, or one number for each block; blocks that a list does not reach take none out.
        inflection: in [-1, 1]; 0 where ``r`` is a list.

    Raises:
        ValueError: for a number out of range, or an inflection of a list.
    """

    r: int | tuple[int, ...]
    inflection: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.r, Sequence):
            object.__setattr__(self, "r", tuple(whole_number("r", each, 0) for each in self.r))
            if self.inflection:
                raise ValueError(f"inflection must be 0 where r is a list, got {self.inflection!r}")
        else:
            object.__setattr__(self, "r", whole_number("r", self.r, 0))
        if not (isinstance(self.inflection, (int, float)) and -1 <= self.inflection <= 1):
            raise ValueError(f"inflection must be a number in [-1, 1], got {self.inflection!r}")

    def wanted(self, depth: int) -> list[int]:
        """How many tokens each of ``depth`` blocks is asked to take out.

        Raises:
            ValueError: if a list has more numbers than there are blocks.
        """
        if isinstance(self.r, tuple):
            if len(self.r) > depth:
                raise ValueError(f"r must hold at most {depth} numbers, one for each block, got {len(self.r)}")
            return [*self.r, *[0] * (depth - len(self.r))]
        slope = 2 * self.r * self.inflection / (depth - 1) if depth > 1 else 0.0
        start = self.r * (1 - self.inflection) if depth > 1 else float(self.r)
        return _whole_steps([start + slope * block for block in range(depth)])

    def counts(self, tokens: int, prefix: int, depth: int) -> list[int]:
        """How many of ``tokens`` are left after each block. No block takes more than half of those behind the prefix.

        Args:
            tokens: how many enter the first block, those of the prefix included.
            prefix: tokens at the start that are never taken out.
            depth: how many blocks there are.
        """
        left, out = tokens, []
        for r in self.wanted(depth):
            left -= max(0, min(r, (left - prefix) // 2))
            out.append(left)
        return out


def removal_for(keep: float, tokens: int, prefix: int, depth: int) -> Removal:
    """The constant removal whose blocks together read the share ``keep`` of the tokens, as nearly as can be.

    Of ``n_l`` tokens left after block l, ``sum_l n_l = keep * tokens * depth``, so that a method costs what another
    one costs that keeps the share ``keep`` throughout, but for what attention saves beyond the line. Blocks take out
    the whole numbers nearest to a real one, so the sum is met to a token for each block.

    Raises:
        ValueError: if ``keep`` is not in (0, 1], or is less than is left when every block takes out half.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a number in (0, 1], got {keep!r}")

    def total(r: float) -> int:
        return sum(_even(r, depth).counts(tokens, prefix, depth))

    low, high, wanted = 0.0, float(tokens), keep * tokens * depth
    if total(high) > wanted + depth:
        least = total(high) / (tokens * depth)
        raise ValueError(f"keep must be at least {math.ceil(1000 * least) / 1000:g} for {tokens} tokens, got {keep:g}")
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) > wanted else (low, middle)
    return min(
        (_even(low, depth), _even(high, depth)), key=lambda x: abs(sum(x.counts(tokens, prefix, depth)) - wanted)
    )


def _even(r: float, depth: int) -> Removal:
    return Removal(tuple(_whole_steps([r] * depth)))


def _whole_steps(line: list[float]) -> list[int]:
    """Whole numbers whose running total is the nearest to that of ``line``; halves go up."""
    out, total, given = [], 0.0, 0
    for each in line:
        total += each
        step = math.floor(total + 0.5 + 1e-9) - given
        out.append(step)
        given += step
    return out


# A policy over tokens: which are kept, as numbers that a gradient can flow to (DynamicViT, arXiv 2106.02034).


EPS = 1e-6
"""What the masked softmax adds to its denominator."""


def gumbel_keep(log_probs: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw for each token whether it is kept; straight-through Gumbel-softmax (arXiv 1611.01144).

    With Gumbel noise ``g`` and ``y = softmax((log_probs + g) / temperature)``, a token is kept where channel 0 is the
    larger one, which happens with probability ``exp(log_probs[..., 0])``. The gradient is that of ``y[..., 0]``.

    Args:
        log_probs: ``(..., 2)`` log-probabilities, channel 0 is to keep.
        temperature: above 0; lower is nearer to the hard choice, with a steeper gradient.
        generator: where the noise is drawn from, on the device of ``log_probs``; default: torch's global generator.

    Returns:
        ``(...)`` of exactly 0 and 1, in the type of ``log_probs``.
    """
    # A draw may be rounded to zero, the more often the fewer bits the type has, and has no logarithm then.
    drawn = torch.empty_like(log_probs).exponential_(generator=generator).clamp_min(torch.finfo(log_probs.dtype).tiny)
    noise = drawn.log().neg()
    soft = ((log_probs + noise) / temperature).softmax(-1)[..., 0]
    hard = (soft > 0.5).to(soft.dtype)
    # In this order the value is the hard one to the bit: what is added to it is zero.
    return hard + (soft - soft.detach())


def masked_softmax(scores: Tensor, policy: Tensor, eps: float = EPS) -> Tensor:
    """Attention weights in which a key counts as much as its policy says (DynamicViT, eq. 11 and 12).

        ``e_ij = exp(a_ij - max_k a_ik) G_ij``, ``A_ij = (e_ij + eps / T) / (sum_k e_ik + eps)``

    with ``G_ij = P_j``, and ``G_ii = 1`` so that the row of a dropped token stays defined. The mask multiplies, and so
    passes a gradient to the policy, which one that adds minus infinity would not.

    Args:
        scores: ``(B, H, T, T)``, row is query.
        policy: ``(B, T)`` in [0, 1], 1 is kept.
        eps: see above.

    Returns:
        ``(B, H, T, T)``, in float32 at least; rows sum to one.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    a = scores.to(dtype)
    e = (a - a.detach().amax(-1, keepdim=True)).exp() * gate(policy).to(dtype)
    return (e + eps / e.shape[-1]) / (e.sum(-1, keepdim=True) + eps)


def gate(policy: Tensor) -> Tensor:
    """``G (B, 1, T, T)`` of `masked_softmax`: the policy of the key, and 1 on the diagonal."""
    own = torch.eye(policy.shape[-1], dtype=policy.dtype, device=policy.device)
    return policy[:, None, None, :] * (1 - own) + own


def key_bias(policy: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, 1, T, T)``, what is added to scores to the same end where no gradient is wanted: 0 or minus infinity."""
    seen = gate(policy) > 0
    return torch.zeros(seen.shape, dtype=dtype, device=policy.device).masked_fill_(~seen, -torch.inf)


def kept_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the kept tokens, ``x (B, N, D)`` by ``mask (B, N)`` to ``(B, 1, D)``; zero where none is kept."""
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)


def fill_dropped(x: Tensor, mask: Tensor) -> Tensor:
    """Put the mean of the kept tokens in the place of the others: the mean over all is then that over the kept."""
    weight = mask.to(x.dtype)[..., None]
    return x * weight + (1 - weight) * kept_mean(x, mask)
