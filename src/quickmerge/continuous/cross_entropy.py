"""Cross-entropy over a large vocabulary: exact, a block of logits at a time, or from sampled words."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from quickmerge.errors import whole_number

__all__ = ["Negatives", "linear_cross_entropy", "sampled_cross_entropy"]

LOGITS = 1 << 24
"""Logits that are held at once: 64 MiB in float32."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, logits: int = LOGITS) -> tuple[Tensor, Tensor]:
    """``log sum_v exp(h . w_v) - h . w_y`` in nats for each row, and whether y is the first of the largest logits.

    Where not all logits may be held at once they are computed block by block, and once more for the gradient.

    Args:
        hidden: ``(n, d)``.
        weight: ``(V, d)``.
        labels: ``(n,)`` long.
        logits: how many may be held.

    Returns:
        ``(n,)`` in float32 at least, and ``(n,)`` bool.
    """
    rows = max(1, logits // len(weight))
    if len(hidden) <= rows:
        return _block(hidden, weight, labels)
    parts = [
        checkpoint(_block, h, weight, y, use_reentrant=False, preserve_rng_state=False)
        for h, y in zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True)
    ]
    return torch.cat([loss for loss, _ in parts]), torch.cat([hit for _, hit in parts])


def _block(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="none"), logits.detach().argmax(-1) == labels


class Negatives:
    """Words to hold against the right ones, drawn with replacement: half by how frequent they are, half evenly.

    Args:
        counts: ``(V,)``, how often each word is in the training text. What counts is the power 3/4 of it, as in
            arXiv 1310.4546.
        draws: words that are drawn at once.

    Raises:
        ValueError: for counts that are no frequencies, or draws below 1.
    """

    def __init__(self, counts: Tensor, draws: int) -> None:
        draws = whole_number("draws", draws)
        if counts.ndim != 1 or not len(counts) or bool((counts < 0).any()) or not bool(counts.sum() > 0):
            raise ValueError(f"counts must be a row of frequencies, got the shape {tuple(counts.shape)}")
        share = counts.double() ** 0.75
        self.draws = draws
        self.probability = 0.5 * share / share.sum() + 0.5 / len(counts)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Words ``(draws,)``, and the logarithms of their probabilities, from the global generator of the CPU."""
        words = torch.multinomial(self.probability, self.draws, replacement=True)
        return words, self.probability[words].log().float()


def sampled_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, negatives: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy with the sum over the vocabulary estimated from a few words, for each row.

    ``log Z - h . w_y`` with ``Z = exp(h . w_y) + 1/N sum_j [c_j != y] exp(h . w_(c_j)) / q(c_j)``. The mean of Z over
    draws of the words c from q is the true sum; its logarithm is below the true one on average, the less so the more
    words there are.

    Args:
        hidden: ``(n, d)``.
        weight: ``(V, d)``.
        labels: ``(n,)`` long.
        negatives: words ``(N,)`` and the logarithms of their probabilities ``(N,)``, the same for all rows.

    Returns:
        ``(n,)`` nats.
    """
    words, log_q = (part.to(hidden.device) for part in negatives)
    right = (hidden * weight[labels]).sum(-1).float()
    others = F.linear(hidden, weight[words]).float() - log_q - torch.tensor(float(len(words))).log()
    others = others.masked_fill(words == labels[:, None], -torch.inf)
    return torch.cat([right[:, None], others], 1).logsumexp(1) - right
