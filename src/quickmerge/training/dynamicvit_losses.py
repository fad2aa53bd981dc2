"""The losses of DynamicViT (arXiv 2106.02034, eq. 13 to 17), each a scalar in float32 at least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ratio_loss(masks: Sequence[Tensor], keep: float) -> Tensor:
    """How far the shares that are kept are from ``keep``, ``keep^2``...: the mean square over images and stages.

        ``R = (1/S) sum_s mean_b (mean_i D^s_bi - keep^s)^2``

    Args:
        masks: of each stage, ``(B, N)`` of 0 and 1.
        keep: share that each stage should leave of those before it.
    """
    each = [(mask.mean(-1) - keep ** (stage + 1)).square().mean() for stage, mask in enumerate(masks)]
    return torch.stack(each).mean()


def logit_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(teacher || student)`` of the class probabilities, the mean over a batch of logits ``(B, classes)``."""
    told, wanted = (_precise(x).log_softmax(-1) for x in (student, teacher))
    return F.kl_div(told, wanted, reduction="batchmean", log_target=True)


def feature_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the last features ``(B, N, C)`` over the patches of ``mask (B, N)``; 0 if it has none.

    The mask says where to look and takes no gradient.
    """
    kept = mask.detach()[..., None]
    apart = (_precise(student) - _precise(teacher)).square() * kept
    return apart.sum() / (kept.sum() * student.shape[-1]).clamp_min(1)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
