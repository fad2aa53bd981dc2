"""MLERP: a mean that is as long as the longest of what went into it."""

from __future__ import annotations

import torch
from torch import Tensor

from quickmerge.tokens.plan import MergePlan

OPERATORS = ("mlerp", "average")
"""How the members of a slot become one: scaled to the longest member's norm, or their mean as it is."""

LEAST_NORM = 1e-12
"""No norm below this is divided by, so that zero vectors have gradients too."""


def mlerp(plan: MergePlan, x: Tensor) -> Tensor:
    """Maximum-norm linear interpolation (arXiv 2312.01026): ``(B, N, D)`` to ``(B, K, D)``.

    ``out = mean / ||mean|| max_k ||x_k||`` over the members of each slot, with the plan's weights in the mean. A slot
    of one is a copy to the bit. Where members cancel out to nothing but rounding, there is no direction to keep, and
    the result is at most as long as the longest.
    """
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, norm = plan.merge(precise), torch.linalg.vector_norm(precise, dim=-1)
    member = plan.slot >= 0
    into = plan.slot.clamp_min(0)
    zeros = norm.new_zeros(plan.size.shape)
    longest = zeros.scatter_reduce(1, into, torch.where(member, norm, 0.0), "amax")
    crowd = zeros.scatter_add(1, into, member.to(zeros.dtype))
    length = torch.maximum(torch.linalg.vector_norm(mean, dim=-1), torch.finfo(norm.dtype).eps * longest)
    # Multiplying by 1 changes nothing, not even the last bit.
    scale = torch.where(crowd > 1, longest / length.clamp_min(LEAST_NORM), 1.0)
    return (mean * scale[..., None]).to(x.dtype)
