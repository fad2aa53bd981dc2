"""A prompt with images that was read: what is left of it, and how what follows it fits on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from quickmerge.merge.text.shortened import ShortPrompt
from quickmerge.merge.tokens.plan import MergePlan


@dataclass
class VisualPrompt(ShortPrompt):
    """What a cache knows of a prompt with images."""

    gone_are: ClassVar[str] = "visual ones that are gone included"


def deepstack(plan: MergePlan, visual: Tensor, features: Sequence[Tensor]) -> dict[str, Any]:
    """Lower features of the tower, ``(all visual tokens, D)`` each, merged by ``plan`` like the tokens themselves."""
    left = plan.carry(visual)
    merged = []
    for each in features:
        whole = each.new_zeros(*visual.shape, each.shape[-1])
        whole[visual] = each
        merged.append(plan.merge(whole)[left])
    return {"visual_pos_masks": left, "deepstack_visual_embeds": merged}
