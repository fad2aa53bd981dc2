"""Using a prior that generates: the mean of every next slot, and new slots drawn one after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quickmerge.errors import whole_number
from quickmerge.heads.base import check_temperature, normal
from quickmerge.prior.layout import copies, layout_of, read_slots
from quickmerge.prior.model import Prior
from quickmerge.prior.network import SlotCache
from quickmerge.tokens.plan import MergePlan
from quickmerge.tokens.view import TokenView


@torch.no_grad()
def predict(prior: Prior, view: TokenView, plan: MergePlan) -> Tensor:
    """The mean of each slot given the true slots before it and the layout: where each stands and of how many tokens.

    The first slot of a row has nothing before it: for it stands the mean that the prior was calibrated with.

    Args:
        prior: one that generates.
        view: the tokens.
        plan: how they are merged.

    Returns:
        ``(B, K, D)`` in the scale of the features; zero for padding slots. `MergePlan.unmerge` copies it to tokens.

    Raises:
        QuickmergeError: if the prior does not generate.
        ValueError: if the tokens do not fit the prior.
    """
    layout = layout_of(prior, view, plan)
    slots = plan.merge(view.hidden)
    state = read_slots(prior, slots, layout)
    before = torch.ones(plan.slots, plan.slots, dtype=torch.bool, device=slots.device).tril(-1)[1:]
    copied = copies(prior, prior.target(slots), layout, slice(1, None), before)
    mean = prior.restore(copied + prior.head.mean(state[:, :-1] + layout.aim[:, 1:]))
    follows = plan.valid[:, 1:] & plan.valid[:, :-1]
    average = prior.mean.to(mean.dtype)
    later = torch.where(follows[..., None], mean, average)
    out = torch.cat([average.expand(len(later), 1, -1), later], 1)
    return torch.where(plan.valid[..., None], out, 0.0)


@torch.no_grad()
def sample(
    prior: Prior,
    view: TokenView,
    plan: MergePlan,
    start: int = 0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """New contents for the slots of a layout from the ``start``-th on, each drawn given all slots before it.

    Only the first ``start`` slots of a row are read; of the others, where they stand and of how many tokens they are.
    A first slot that is to be drawn comes from a normal distribution with the mean and deviation that the prior was
    calibrated with.

    Args:
        prior: one that generates.
        view: the tokens; those of drawn slots may hold anything.
        plan: how they are merged.
        start: slots of each row that are given, at least 0; a row with fewer is given whole.
        temperature: as in `quickmerge.heads.VectorHead.sample`.
        generator: where the noise comes from; None for the global generator.

    Returns:
        ``(B, K, D)`` in the scale of the features, given slots as they are; zero for padding slots.

    Raises:
        QuickmergeError: if the prior does not generate.
        ValueError: if the tokens do not fit the prior, or a number is out of range.
    """
    start = whole_number("start", start, 0)
    check_temperature(temperature)
    layout = layout_of(prior, view, plan)
    given = plan.valid & (plan.valid.long().cumsum(-1) <= start)
    slots = torch.where(given[..., None], plan.merge(view.hidden).to(prior.mean.dtype), 0.0)
    cache, state = SlotCache(), slots.new_zeros(len(slots), prior.config.width)
    # What is given in every row is read at once.
    known = int((given | ~plan.valid).long().cumprod(-1).sum(-1).min())
    for k in range(known, plan.slots):
        if k:
            state = read_slots(prior, slots[:, len(cache) : k], layout, cache=cache)[:, -1]
        target = prior.head.sample(state + layout.aim[:, k], temperature=temperature, generator=generator)
        if k:
            every = torch.ones(1, k, dtype=torch.bool, device=slots.device)
            target = target + copies(prior, prior.target(slots[:, :k]), layout, slice(k, k + 1), every)[:, 0]
        follows = plan.valid[:, k] & plan.valid[:, k - 1] if k else torch.zeros_like(plan.valid[:, 0])
        if not bool(follows.all()):
            noise = math.sqrt(temperature) * normal(target.shape, target.dtype, target.device, generator)
            target = torch.where(follows[:, None], target, noise)
        slots[:, k] = torch.where(given[:, k, None], slots[:, k], prior.restore(target).to(slots.dtype))
    return torch.where(plan.valid[..., None], slots, 0.0)
