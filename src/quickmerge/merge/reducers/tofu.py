"""MLERP: a mean that is as long as the longest of what went into it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.errors import whole_number
from quickmerge.merge.reducers.base import Needs, Reducer
from quickmerge.merge.reducers.tome import match_down, mean_key
from quickmerge.merge.tokens.budget import how_many, known_count
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.view import TokenView

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


# ToFu: prune in the lower blocks, where merging distorts, and merge in the upper ones, keeping the norm.


@dataclass(frozen=True)
class ToFu(Reducer):
    """Token Fusion (arXiv 2312.01026): ToMe's matching, after which the lower blocks prune and the upper ones merge.

    A block's feed-forward part may map the mean of two tokens far from both outputs; low blocks do, high ones are
    nearly linear (`quickmerge.merge.bench.linearity.functional_linearity` measures it). So in blocks below ``switch``
    the matched tokens vanish, and from there on they merge by MLERP: the mean of a slot's members, scaled to the
    longest member's norm, ``out = mean / ||mean|| max_k ||x_k||``. Tokens that were pruned do not count in any size.

    The paper leaves some choices open. Here blocks l < ``switch`` prune, the mean is plain and not by size unless
    ``weighted`` says so, sizes grow only where tokens merge, and all prefix tokens are protected.

    Args:
        keep: share of the tokens kept, or a budget.
        switch: the first block that merges; None for half the depth, as in the paper. 0 merges in all blocks.
        operator: ``"mlerp"``, or ``"average"`` for the mean as it is (ToFu-AVG).
        weighted: take the mean by size, as ToMe does.
        proportional: attention above the merge adds log(size) to the scores of a slot.
    """

    switch: int | None = None
    operator: str = "mlerp"
    weighted: bool = False
    proportional: bool = field(default=True, kw_only=True)  # type: ignore[misc]
    name: ClassVar[str] = "tofu"
    source: ClassVar[str] = "arXiv 2312.01026"
    places: ClassVar[tuple[str, ...]] = ("vision",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.switch is not None:
            object.__setattr__(self, "switch", whole_number("switch", self.switch, 0))
        if self.operator not in OPERATORS:
            raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, got {self.operator!r}")
        if not isinstance(self.weighted, bool):
            raise ValueError(f"weighted must be True or False, got {self.weighted!r}")

    @property
    def needs(self) -> Needs:  # noqa: D102
        return Needs(1, visual=frozenset({"key"}))

    def prunes(self, view: TokenView) -> bool:
        """True in blocks below the switch.

        Raises:
            ValueError: if the view does not say in which block it is, or ``switch`` is None and it does not say how
                many there are.
        """
        if view.evidence.layer is None:
            raise ValueError("layer must be the number of the view's block for tofu, got None")
        if self.switch is not None:
            return view.evidence.layer < self.switch
        if view.evidence.depth is None:
            raise ValueError("depth must be the model's number of blocks for tofu without a switch, got None")
        return view.evidence.layer < view.evidence.depth // 2

    def plan(self, view: TokenView) -> MergePlan:  # noqa: D102
        drop, metric = self.prunes(view), mean_key(view, self.name)
        share = view.size if self.weighted else torch.ones_like(view.size)
        kept = known_count(self.budget, view)
        return match_down(view, metric, how_many(self.budget, view), drop=drop, share=share, kept=kept)

    def combine(self, view: TokenView, plan: MergePlan, x: Tensor) -> Tensor:
        """The mean of each slot's members, by MLERP scaled to the norm of the longest; one member is a copy."""
        if self.operator == "average" or self.prunes(view):
            return plan.merge(x)
        return mlerp(plan, x)
