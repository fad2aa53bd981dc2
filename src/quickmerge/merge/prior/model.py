"""The prior: reads merged slots in order, predicts the next one, and corrects them for the model above."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from quickmerge.calm.heads import VectorHead, make_head
from quickmerge.errors import QuickmergeError
from quickmerge.files import write_bytes
from quickmerge.merge.prior.config import PriorConfig
from quickmerge.merge.prior.network import SaliencyHead, SlotEncoder, SlotTransformer, spans
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.view import TokenView
from quickmerge.models.kinds import KINDS
from quickmerge.models.part import CONFIG, WEIGHTS, open_part, save_part
from quickmerge.models.share import HubMixin, HubOptions, fetched

COLLAPSED = 0.05
"""A sequence is called collapsed when its slots spread less than this share of what they should."""


class CollapseError(QuickmergeError):
    """The slots of a sequence have become nearly the same, so predicting them means nothing any more."""


def next_slot_loss(head: VectorHead, context: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The head's score of each slot given what was read before it, per feature.

    ``target`` is detached: with a gradient through the targets a constant sequence would be a perfect score.

    Args:
        head: what predicts.
        context: ``(B, K, width)``, row k made from slots before k only.
        target: ``(B, K, D)``, the slots.
        valid: ``(B, K)`` bool, which of them count.

    Returns:
        The mean over the slots that count, and each slot's own ``(B, K)``, zero where it does not count.
    """
    score = head.loss(context, target.detach()) / target.shape[-1]
    score = torch.where(valid, score, 0.0)
    return score.sum() / valid.sum().clamp_min(1), score


def spread(x: Tensor, valid: Tensor) -> Tensor:
    """How far the slots of each sequence lie from their mean: ``(B,)``, root mean square length."""
    there = valid[..., None].to(x.dtype)
    count = there.sum(1).clamp_min(1)
    centre = (x * there).sum(1) / count
    square = ((x - centre[:, None]) * there).square().sum((1, 2)) / count[:, 0]
    # Below rounding nothing is spread; the small term keeps the root's gradient finite there.
    return (square + torch.finfo(torch.float32).tiny).sqrt()


def relative_spread(x: Tensor, reference: Tensor, valid: Tensor, reference_valid: Tensor) -> Tensor:
    """Mean over the batch of the spread of ``x (B, K, D)`` over that of ``reference (B, N, D)``: 0 when collapsed."""
    return (spread(x, valid) / spread(reference, reference_valid).clamp_min(1e-12)).mean()


def collapse_penalty(share: Tensor, least: float = 0.5) -> Tensor:
    """``relu(least - share)^2``: nothing while slots spread by at least ``least`` of what the tokens do."""
    return torch.relu(least - share).square()


def check_collapse(share: Tensor | float, what: str) -> None:
    """Raise CollapseError, naming what collapsed, if the relative spread is below `COLLAPSED` (or not a number)."""
    value = float(share)
    if not value >= COLLAPSED:
        raise CollapseError(
            f"{what} has collapsed: its slots spread {value:.2g} times as far as the tokens they were merged from, "
            f"at least {COLLAPSED:g} is needed"
        )


# What stands above the losses: the prior itself.


FORWARD, BACKWARD = 0, 1
NEARNESS = (0.25, 4.0, 4.0, 0.02)
"""Where training begins: a cell aside costs what four frames do. The best of sixteen pairs on ten training clips."""


class Prior(HubMixin, nn.Module):
    """A light autoregressive model over merged slots (QuickMerge++, arXiv 2508.13204).

    A causal transformer reads the slots in order of position. What it has read up to slot k serves two ends: a
    correction of slot k in front of some blocks of the language model (`align`), and the distribution of slot k+1
    (`next_loss`; `quickmerge.merge.prior.layout` has its mean and draws from it, for priors that generate). The paper's
    network, losses and training are not public in any detail; these are ours.

    Args:
        config: its shape.
    """

    hub_kind = KINDS["prior"]
    mean: Tensor
    std: Tensor

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SlotEncoder(config.features, config.width, config.pool, config.axes)
        self.direction = nn.Embedding(2, config.width)
        self.trunk = SlotTransformer(config.width, config.layers, config.heads)
        self.where = nn.Linear(config.width, config.width, bias=False)
        self.head = make_head(config.head, config.width, config.features, **config.head_settings)
        self.corrections = nn.ModuleDict({str(d): nn.Linear(config.width, config.features) for d in config.depths})
        for layer in self.corrections.values():
            # At first nothing is corrected, so training starts from the model without a prior.
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.saliency = SaliencyHead(config.features) if config.saliency else None
        # Logarithms: how fast nearness falls along each axis, and the weight of the mean; see `layout.copies`.
        self.nearness = nn.Parameter(torch.tensor(NEARNESS).log()) if config.copies else None
        self.register_buffer("mean", torch.zeros(config.features))
        self.register_buffer("std", torch.ones(config.features))

    # What is predicted ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, slots: Tensor) -> None:
        """Set the mean and deviation of features from a sample ``(S, D)`` of slots, so that targets have scale one."""
        x = self._scaled(slots)
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0).clamp_min(1e-4))

    def target(self, slots: Tensor) -> Tensor:
        """Slots ``(..., D)`` as the head predicts them: brought to length one per feature, then standardised.

        A prior that generates leaves them their length, or its contents would be known but for a factor.
        """
        return (self._scaled(slots) - self.mean) / self.std

    def restore(self, target: Tensor) -> Tensor:
        """The inverse of `target` in a prior that generates: ``(..., D)`` in the scale of the features.

        Raises:
            QuickmergeError: if the prior does not generate, so that the lengths of contents are lost.
        """
        if not self.config.generates:
            raise QuickmergeError("prior must be one that generates (pool 0), got one that reads the members of slots")
        return target * self.std + self.mean

    def _scaled(self, slots: Tensor) -> Tensor:
        x = slots.to(self.mean.dtype)
        return x if self.config.generates else unit(x)

    # What is read -----------------------------------------------------------------------------------------------

    def encode(self, view: TokenView, plan: MergePlan) -> Tensor:
        """Slot features ``(B, K, width)`` before the transformer.

        Raises:
            ValueError: if the features are not as wide as the prior was made for.
            QuickmergeError: if the prior generates and so reads no members; it has `quickmerge.merge.prior.slots`.
        """
        if self.config.generates:
            raise QuickmergeError("prior must be one that reads the members of slots, got one that generates (pool 0)")
        if view.hidden.shape[-1] != self.config.features:
            raise ValueError(
                f"hidden must have {self.config.features} features for this prior, got {view.hidden.shape[-1]}"
            )
        out: Tensor = self.encoder(view, plan)
        return out

    def read(self, encoded: Tensor, position: Tensor, valid: Tensor, direction: int = FORWARD) -> Tensor:
        """``(B, K, width)``: at slot k, what is known once slots up to k are read (or from k on, backward)."""
        x = encoded + self.direction.weight[direction]
        if direction == BACKWARD:
            x, position, valid = x.flip(1), -position.flip(1), valid.flip(1)
        out: Tensor = self.trunk(x, position, valid)
        return out.flip(1) if direction == BACKWARD else out

    # The two jobs -----------------------------------------------------------------------------------------------

    def align(self, view: TokenView, plan: MergePlan) -> dict[int, Tensor]:
        """Corrections of the slots, by the block in front of which each is added: ``{block: (B, K, D)}``."""
        if not self.corrections:
            return {}
        return self.correct(self.read(self.encode(view, plan), plan.position, plan.valid), view.hidden)

    def correct(self, state: Tensor, like: Tensor) -> dict[int, Tensor]:
        """Corrections from what was read, ``state (B, K, width)``, in the type of ``like``."""
        return {int(depth): layer(state).to(like.dtype) for depth, layer in self.corrections.items()}

    def next_loss(
        self, encoded: Tensor, state: Tensor, view: TokenView, plan: MergePlan, direction: int = FORWARD
    ) -> tuple[Tensor, Tensor]:
        """Score of each slot given those before it (after it, backward); see `next_slot_loss`.

        Where the predicted slot stands and how many tokens it is of are given; only its content is predicted. The
        first slot of a row has nothing before it and does not count.
        """
        end = torch.where(view.valid, view.position, 0).amax(-1, keepdim=True)
        place = self.where(self.encoder.place(plan.size, spans(view, plan), end - plan.position + 1))
        slots = self.target(plan.merge(view.hidden))
        if direction == BACKWARD:
            context, target, seen = state[:, 1:], slots[:, :-1], plan.valid[:, :-1] & plan.valid[:, 1:]
            place = place[:, :-1]
        else:
            context, target, seen = state[:, :-1], slots[:, 1:], plan.valid[:, :-1] & plan.valid[:, 1:]
            place = place[:, 1:]
        mean, each = next_slot_loss(self.head, context + place, target, seen)
        return mean, each

    # Files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write model.safetensors and config.json into ``folder``, both or neither; other files stay.

        Args:
            folder: where to; made if need be.
            dtype: of the stored weights, for example ``torch.float16`` for half the size; default as they are.

        Raises:
            QuickmergeError: if the disk is full or not writable; what was there before is still there.
        """
        state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in self.state_dict().items()}
        save_part(folder, json.loads(self.config.to_json()), state, write_bytes)

    @classmethod
    def from_pretrained(cls, folder: Path | str, **hub: Unpack[HubOptions]) -> Prior:
        """Load a prior, in float32 and for inference.

        Args:
            folder: with config.json and model.safetensors, or an id of the hub such as ``"owner/name"``.
            **hub: how it is taken from there, see `quickmerge.models.share.HubOptions`.

        Raises:
            QuickmergeError: if the folder holds no prior, or its weights are damaged or do not fit its config; or the
                hub has no such prior.
        """
        folder = fetched(folder, cls.hub_kind, **hub)
        part = open_part("prior", folder, f"prior must be a folder with {CONFIG} and {WEIGHTS}")
        config = PriorConfig.from_data(part.config, part.folder / CONFIG)
        return part.fill(lambda: cls(config))

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())


def unit(x: Tensor) -> Tensor:
    """Scale each vector ``(..., D)`` to a root mean square of one."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
