"""A policy over tokens: which are kept, as numbers that a gradient can flow to (DynamicViT, arXiv 2106.02034)."""

from __future__ import annotations

import torch
from torch import Tensor

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
