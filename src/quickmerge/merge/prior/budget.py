"""The learned budget: a chunk after surprising text is cut more finely, one after expected text more coarsely."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.merge.prior.model import Prior
from quickmerge.merge.prior.network import SlotCache
from quickmerge.merge.reducers.base import moved
from quickmerge.merge.tokens.budget import clamp_count, round_half_up
from quickmerge.merge.tokens.plan import MergePlan, next_anchor
from quickmerge.merge.tokens.view import TokenView


def surprise(prior: Prior, view: TokenView, group: int, memory: SlotCache) -> Tensor:
    """Mean score of a chunk's slots given all slots before them, in nats per feature for a density head: ``(B,)``.

    The chunk is cut into slots of ``group`` neighbouring tokens, each their mean, so that its surprise does not
    depend on a budget.

    Args:
        prior: the prior.
        view: the tokens of the chunk alone.
        group: tokens per slot.
        memory: slots of the chunks before, extended by these.
    """
    index = torch.arange(view.valid.shape[1], device=view.hidden.device)
    anchor = (index % group == group - 1).expand_as(view.valid) & view.valid
    plan = MergePlan.from_anchors(view, anchor, next_anchor(view, anchor))
    with torch.no_grad():
        encoded = prior.encode(view, plan)
        state = prior.read(encoded, plan.position, plan.valid, cache=memory)
        _, each = prior.next_loss(encoded, state, view, plan)
    return each.mean(-1)


@dataclass(frozen=True)
class Surprise:
    """``K = keep N exp(gamma z - gamma^2 / 2)`` with z how much more surprising than usual the chunk before was.

    z is standardised over chunks of training text, and for normal z the factor's mean is one: on average ``keep``
    of the tokens stay, and surprising passages get more of them. For ``block_causal`` mode. The paper (arXiv
    2508.13204) names an entropy budget and a prior without saying how they meet; this is ours.

    Args:
        prior: a trained prior whose usual surprise is known, see `calibrate_surprise`.
        keep: mean share of the tokens that is kept.
        gamma: how strongly surprise counts; 0 keeps a fixed share.
        low: least share, as a multiple of ``keep``.
        high: largest share, as a multiple of ``keep``.
    """

    prior: Prior = field(repr=False)
    keep: float = 0.4
    gamma: float = 0.5
    low: float = 0.25
    high: float = 4.0

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not (isinstance(self.keep, (int, float)) and 0 < self.keep <= 1):
            raise ValueError(f"keep must be a number in (0, 1], got {self.keep!r}")
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)) or not math.isfinite(self.gamma):
            raise ValueError(f"gamma must be a finite number, got {self.gamma!r}")
        if not 0 < self.low <= 1 <= self.high:
            raise ValueError(f"low and high must satisfy 0 < low <= 1 <= high, got {self.low!r} and {self.high!r}")
        if "surprise" not in self.prior.config.trained_for:
            raise QuickmergeError("prior must know its usual surprise: call calibrate_surprise first, got one without")

    def on(self, device: torch.device) -> Surprise:
        """With the prior on ``device``; itself where it is there already."""
        prior = moved(self.prior, device)
        return self if prior is self.prior else replace(self, prior=prior)

    @property
    def usual(self) -> dict[str, Any]:
        """Mean, deviation and group size that surprise is standardised with."""
        found: dict[str, Any] = self.prior.config.trained_for["surprise"]
        return found

    @property
    def layer(self) -> int:
        """The block in front of which the prior reads."""
        return int(self.prior.config.trained_for["layers"][0])

    def read(self, view: TokenView, memory: SlotCache | None) -> tuple[Tensor, SlotCache]:
        """Read one chunk: z ``(B,)``, and the memory for the next one."""
        memory = SlotCache() if memory is None else memory
        raw = surprise(self.prior, view, self.usual["group"], memory)
        return (raw.double() - self.usual["mean"]) / self.usual["deviation"], memory

    def count(self, view: TokenView, saliency: Tensor | None) -> Tensor:  # noqa: D102
        length = view.counted_length.double()
        wanted = self.keep * length
        if view.evidence.surprise is not None:
            factor = (self.gamma * view.evidence.surprise.double() - self.gamma**2 / 2).exp()
            wanted = wanted * factor.clamp(self.low, self.high)
        return clamp_count(round_half_up(torch.minimum(wanted, length)), view)


def calibrate_surprise(
    prior: Prior, hidden: Iterable[Tensor], *, chunk: int = 128, group: int = 4
) -> dict[str, float | int]:
    """Measure the usual surprise of chunks and note it in the prior's config.

    Args:
        prior: a trained prior with a density head.
        hidden: hidden states ``(1, N, D)`` of texts, as they enter the block of the first merge.
        chunk: tokens per chunk.
        group: tokens per slot, at most ``chunk / 2``.

    Returns:
        Mean and deviation over all chunks, and ``group``; also written to ``prior.config.trained_for["surprise"]``.

    Raises:
        QuickmergeError: if there are fewer than two chunks.
    """
    group = whole_number("group", group)
    chunk = whole_number("chunk", chunk, 2 * group)
    found: list[Tensor] = []
    for states in hidden:
        memory = SlotCache()
        for start in range(0, states.shape[1] - chunk + 1, chunk):
            position = torch.arange(start, start + chunk, device=states.device)[None]
            view = TokenView(hidden=states[:, start : start + chunk], position=position)
            found.append(surprise(prior, view, group, memory))
    if len(found) < 2:
        raise QuickmergeError(f"hidden must hold at least two chunks of {chunk} tokens, got {len(found)}")
    values = torch.cat(found).double()
    usual = {"mean": float(values.mean()), "deviation": float(values.std().clamp_min(1e-9)), "group": group}
    prior.config.trained_for["surprise"] = usual
    return usual
