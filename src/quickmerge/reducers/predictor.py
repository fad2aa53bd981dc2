"""The network of DynamicViT that says which patches stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quickmerge.errors import whole_number
from quickmerge.tokens.policy import kept_mean


class Predictor(nn.Module):
    """Says of each patch, from itself and from the mean of those that are left, whether it should stay.

    ``Z = GELU(W_1 LN(X))``; each patch gets the first half of its own features and the second half of the mean over
    the kept ones (arXiv 2106.02034, eq. 1 to 4), and three linear layers make two log-probabilities of them.

    Args:
        width: features of a token, a multiple of 4.

    Raises:
        ValueError: for another width.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        width = whole_number("width", width, 4)
        if width % 4:
            raise ValueError(f"width must be a multiple of 4, got {width}")
        self.width = width
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, width)
        self.decide = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(),
            nn.Linear(width // 2, width // 4), nn.GELU(),
            nn.Linear(width // 4, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities ``(B, N, 2)`` in float32 at least, channel 0 to keep.

        Args:
            x: ``(B, N, width)`` patches, no class token.
            mask: ``(B, N)``, 1 for those that are left. Where none is, the mean is zero.
        """
        z = nn.functional.gelu(self.project(self.norm(x.to(self.project.weight.dtype))))
        half = self.width // 2
        around = kept_mean(z[..., half:], mask).expand(-1, x.shape[1], -1)
        out = self.decide(torch.cat([z[..., :half], around], -1))
        told: Tensor = out.to(torch.promote_types(out.dtype, torch.float32)).log_softmax(-1)
        return told
