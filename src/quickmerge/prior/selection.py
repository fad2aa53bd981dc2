"""Choosing tokens so that the choice can be learned: noisy top-k with straight-through gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quickmerge.tokens.budget import select
from quickmerge.tokens.view import TokenView


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
    score: Tensor, count: Tensor, view: TokenView, fixed: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Gumbel-top-k: a draw of ``count`` tokens without replacement, likelier the higher they score.

    Args:
        score: ``(B, N)`` log-odds-like saliency.
        count: ``(B,)`` tokens to keep, the fixed ones among them.
        view: the tokens.
        fixed: ``(B, N)`` bool, tokens that are kept in any case and neither compete nor get a gradient.
        temperature: of the noise and of the gate; 0 for none of either.

    Returns:
        ``(B, N)`` bool, exactly ``count`` tokens a row; and the gate ``(B, N)``, 1 where a token is kept and 0
        elsewhere, whose gradient is that of `soft_top_k`.
    """
    free = view.free & ~fixed
    noisy = score + temperature * gumbel(score) if temperature > 0 else score
    anchor = select(torch.where(fixed, torch.inf, noisy), count, view)
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
