"""A segment: the blocks between one merge and the next, with the slots they see and how they may attend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from quickmerge.hosts.attention import decoder_mask
from quickmerge.hosts.structure import Decoder
from quickmerge.tokens.plan import MergePlan


@dataclass
class Segment:
    """What the blocks above one merge read: slots first, then whatever came after the prompt.

    ``position (B, K + t)``, ``valid (B, K + t)`` and ``size (B, K + t)`` are tables over the entries of these
    blocks' cache; ``source (B, K)`` is the prompt column whose rotary angle each slot takes.
    """

    plan: MergePlan
    source: Tensor
    position: Tensor
    valid: Tensor
    size: Tensor
    padded: bool
    masks: dict[int | None, Any] = field(default_factory=dict)

    @classmethod
    def from_plan(cls, plan: MergePlan, position_ids: Tensor, prompt_valid: Tensor) -> Segment:
        """Start a segment at a merge; ``position_ids (B, N)`` and ``prompt_valid (B, N)`` are the whole prompt's."""
        columns = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
        # Which prompt column stands at a position; padding is written to a place that no slot asks for.
        top = int(position_ids.max()) + 1
        table = torch.zeros(len(position_ids), top + 1, dtype=torch.long, device=position_ids.device)
        table.scatter_(1, torch.where(prompt_valid, position_ids, top), columns)
        return cls(
            plan=plan,
            source=table.gather(1, plan.position),
            position=plan.position,
            valid=plan.valid,
            size=plan.size,
            padded=not bool(plan.valid.all()),
        )

    def extend(self, position_ids: Tensor, valid: Tensor, stored: int) -> None:
        """Append ``t`` new tokens after the first ``stored`` entries (fewer than before if a cache was cropped)."""
        self.position = torch.cat([self.position[:, :stored], position_ids], 1)
        self.valid = torch.cat([self.valid[:, :stored], valid], 1)
        self.size = torch.cat([self.size[:, :stored], torch.ones_like(position_ids)], 1)
        self.padded = self.padded or not bool(valid.all())

    def mask(self, decoder: Decoder, layer: int, hidden: Tensor, cache: Cache | None) -> Any:
        """The attention mask of a block for ``hidden (B, q, D)``, built by the model's own mask builder.

        Plain causal order over the cache's entries; a sliding window is measured in original positions, since
        entries are fewer than positions above a merge.
        """
        window = decoder.windows[layer]
        if window not in self.masks:
            q = hidden.shape[1]
            past = cache.get_seq_length(layer) if cache is not None else 0
            kv, offset = cache.get_mask_sizes(q, layer) if cache is not None else (q, 0)
            function, exotic = None, False
            if window is not None:
                place = self.position
                span = torch.where(self.valid, place, place.amax()).amin()
                exotic = int(place.max() - span) >= window
                if exotic:

                    def function(b: Any, h: Any, i: Any, j: Any) -> Any:
                        return (j <= i) & (place[b, i] - place[b, j] < window)

            self.masks[window] = decoder_mask(
                decoder,
                rows=len(hidden),
                queries=q,
                keys=kv,
                query_offset=past,
                key_offset=offset,
                sees=function,
                valid=self.valid if self.padded else None,
                skip=not exotic,
                dtype=hidden.dtype,
                device=hidden.device,
            )
        return self.masks[window]
