"""A prompt with images that was read: what is left of it, and how what follows it fits on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.merge.text.merged_cache import PromptState
from quickmerge.merge.tokens.plan import MergePlan


@dataclass
class VisualPrompt(PromptState):
    """What a cache knows of a prompt with images. All that is of ``valid``'s width is as the first block read it.

    ``width``: columns as given. ``true_position (..., B)``: the position that the first token behind the prompt would
    have had, and ``next_position`` the one that it gets; None where the model counts. ``masked``: whether a mask was
    given or is needed. ``recount``: whether positions are counted anew, whatever was given.
    """

    width: int = 0
    valid: Tensor = field(default_factory=lambda: torch.zeros(0))
    next_position: Tensor | None = None
    true_position: Tensor | None = None
    masked: bool = False
    recount: bool = False

    @property
    def shortened(self) -> bool:
        """Whether the first block already read less than was given."""
        return 0 in self.segments

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Rows of the cache were picked, moved or repeated."""
        super().each_row(change)
        self.valid = change(self.valid)
        for name in ("next_position", "true_position"):
            held = getattr(self, name)
            if held is not None:
                # Rows lie along the last axis.
                setattr(self, name, change(held.movedim(-1, 0)).movedim(0, -1))

    def follow(
        self, stored: int, new: int, mask: Tensor | None, given: Tensor | None
    ) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Fit ``new`` further tokens a row to the cache, of which the first block's layer holds ``stored`` tokens.

        Args:
            stored: how many that are.
            new: how many are read now.
            mask: of everything read since the prompt, the prompt as it was given; None for no padding.
            given: positions that the caller gave, None where the model is left to count.

        Returns:
            The arguments of the language model to change; which of the new tokens are valid, ``(B, new)``; and the
            columns at which they stand, ``(B, new)``.

        Raises:
            QuickmergeError: if mask or positions are of another text than the one that was read.
        """
        rows, device = len(self.valid), self.valid.device
        since = stored - self.valid.shape[1]
        read = self.width + since + new
        if mask is not None and mask.shape[1] != read:
            raise QuickmergeError(
                f"attention_mask must have a column for each of the {read} tokens read so far, visual ones that are "
                f"gone included, got {mask.shape[1]}"
            )
        behind = torch.ones(rows, since + new, device=device) if mask is None else mask[:, self.width :]
        valid = behind[:, -new:].bool()
        steps = since + torch.arange(new, device=device)
        places = (self.width + steps).expand(rows, -1)
        changed: dict[str, Any] = {}
        if not self.shortened:
            return changed, valid, places
        self.segments[0] = self.segments[0].extended(places, valid, stored)
        if self.masked or mask is not None:
            # The layers tell their length with what is gone, which stands in front.
            gone = behind.new_zeros(rows, self.width - self.valid.shape[1]).long()
            changed["attention_mask"] = torch.cat([gone, self.valid.long(), behind.long()], 1)
        if new > 1 and given is not None and self.true_position is not None:
            self._check(given, self.true_position[..., None] + steps)
        if self.next_position is not None and (self.recount or given is None):
            changed["position_ids"] = self.next_position[..., None] + steps
        return changed, valid, places

    def _check(self, given: Tensor, wanted: Tensor) -> None:
        """Refuse other positions than ``wanted``.

        One token at a time is how text is written; more may be what was read before, cut off at another place. Models
        whose positions count in a grid may be given these alone, once for all of its directions.
        """
        if wanted.ndim == 3 and (given.ndim == 2 or len(given) != len(wanted)):
            wanted = wanted[-1:] if given.ndim == 3 else wanted[-1]
        if given.shape[-1] != wanted.shape[-1] or not bool((given == wanted).all()):
            raise QuickmergeError(
                "position_ids must go on behind the prompt as it was before it was shortened, from "
                f"{wanted[..., 0].tolist()}; a further turn must be given its new ids alone, with an attention_mask "
                "for everything read so far"
            )


def next_positions(positions: Tensor, valid: Tensor) -> Tensor:
    """The position of the first token behind a prompt, ``(..., B)``, of positions ``(..., B or 1, N)``.

    Directions of a grid share one, that behind the farthest; of four lines of positions the first is the text's own.
    """
    positions = positions.expand(*positions.shape[:-2], *valid.shape)
    last = torch.where(valid, positions, -1).amax(-1) + 1
    if last.ndim == 1:
        return last
    text, grid = last[:-3], last[-3:]
    return torch.cat([text, grid.amax(0, keepdim=True).expand_as(grid)])


def deepstack(plan: MergePlan, visual: Tensor, features: Sequence[Tensor]) -> dict[str, Any]:
    """Lower features of the tower, ``(all visual tokens, D)`` each, merged by ``plan`` like the tokens themselves."""
    left = plan.carry(visual)
    merged = []
    for each in features:
        whole = each.new_zeros(*visual.shape, each.shape[-1])
        whole[visual] = each
        merged.append(plan.merge(whole)[left])
    return {"visual_pos_masks": left, "deepstack_visual_embeds": merged}
