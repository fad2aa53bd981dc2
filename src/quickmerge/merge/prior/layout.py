"""A prior that generates: it knows where all slots stand beforehand, and reads and predicts their contents in order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quickmerge.calm.heads.base import check_temperature, normal
from quickmerge.errors import whole_number
from quickmerge.merge.prior.model import BACKWARD, FORWARD, Prior
from quickmerge.merge.prior.network import SlotCache, cells, spans
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.view import TokenView


@dataclass(frozen=True)
class Layout:
    """What is known of slots before their contents are.

    Args:
        place: ``(B, K, width)`` features of where they stand and how many tokens they are of, as they are read.
        aim: ``(B, K, width)`` the same, as it is told before they are predicted.
        position: ``(B, K, axes)`` place in cells of the grid, or in tokens for one axis.
        size: ``(B, K)`` long, original tokens.
        valid: ``(B, K)`` bool, False for padding slots.
    """

    place: Tensor
    aim: Tensor
    position: Tensor
    size: Tensor
    valid: Tensor


def layout_of(prior: Prior, view: TokenView, plan: MergePlan) -> Layout:
    """The layout of a plan.

    Raises:
        QuickmergeError: if the prior does not generate.
        ValueError: if the features are not as wide as the prior was made for, or it is of a grid and there is none.
    """
    prior.restore(prior.mean)  # says so where the prior does not generate
    if view.hidden.shape[-1] != prior.config.features:
        raise ValueError(
            f"hidden must have {prior.config.features} features for this prior, got {view.hidden.shape[-1]}"
        )
    end = torch.where(view.valid, view.position, 0).amax(-1, keepdim=True)
    position, coordinates = plan.position[..., None].to(prior.mean.dtype), None
    if prior.config.axes > 1:
        cell = cells(view, plan)
        assert view.grid is not None  # or there would be no cells
        first = 3 - prior.config.axes
        position = cell[..., first:]
        coordinates = ((cell + 0.5) / torch.tensor(view.grid, device=cell.device))[..., first:]
    place = prior.encoder.place(plan.size, spans(view, plan), end - plan.position + 1, coordinates)
    return Layout(place, prior.where(place), position, plan.size, plan.valid)


def read_slots(
    prior: Prior, slots: Tensor, layout: Layout, direction: int = FORWARD, cache: SlotCache | None = None
) -> Tensor:
    """Read contents in order: ``(B, n, width)``, at each slot what predicts the next one together with its `aim`.

    A slot is read together with where the next one stands, and looks at those before it from there: what is to be
    predicted is like what is beside it, and that need not be what was read last.

    Args:
        prior: one that generates.
        slots: ``(B, n, D)`` contents in the scale of the features: all slots, or with a cache the n after those in it.
        layout: of all slots.
        direction: forward, or backward from the last slot to the first.
        cache: slots read before, forward; it is extended by these.
    """
    x = prior.encoder.content(prior.target(slots))
    place, aim, position, valid = layout.place, layout.aim, layout.position, layout.valid
    if direction == BACKWARD:
        x, place, aim, position, valid = (t.flip(1) for t in (x, place, aim, -position, valid))
    done = 0 if cache is None else len(cache)
    new = slice(done, done + x.shape[1])
    # Nothing comes after the last slot.
    ahead = F.pad(aim[:, 1:], (0, 0, 0, 1))[:, new]
    asking = torch.cat([position[:, 1:], position[:, -1:]], 1)[:, new]
    x = x + place[:, new] + prior.direction.weight[direction] + ahead
    out: Tensor = prior.trunk(x, position[:, new], valid[:, new], cache, asking)
    return out.flip(1) if direction == BACKWARD else out


def copies(prior: Prior, target: Tensor, layout: Layout, wanted: slice, before: Tensor) -> Tensor:
    """What slots would be if they were like those near them that are known: ``(B, Q, D)``, as `Prior.target` scales.

    For the places p of ``wanted`` it is ``sum_j w_j x_j / (w + sum_j w_j)`` with
    ``w_j = exp(-sum_a b_a (p_a - p_ja)^2)``; the b of each axis and w are learned. In video most of what comes has
    been there a frame ago, and a head of a few hundred steps of training has not learned to say it again. Other
    priors copy nothing: zeros ``(1, 1, D)``.

    Args:
        prior: one that generates.
        target: ``(B, J, D)``, the first J slots.
        layout: of all slots.
        wanted: the Q slots that are asked for.
        before: ``(Q, J)`` bool, which are known for which.
    """
    if prior.nearness is None:
        return target.new_zeros(1, 1, target.shape[-1])
    falls, mean = prior.nearness[:-1].exp(), prior.nearness[-1].exp()
    scaled = layout.position.to(falls.dtype) * falls.sqrt()
    near = scaled[:, : target.shape[1]]
    square = (scaled[:, wanted, None] - near[:, None]).square().sum(-1)
    known = before & layout.valid[:, None, : target.shape[1]]
    weight = torch.where(known, (-square).exp(), 0.0)
    return weight @ target / (weight.sum(-1, keepdim=True) + mean)


def slot_loss(
    prior: Prior, state: Tensor, slots: Tensor, layout: Layout, direction: int = FORWARD
) -> tuple[Tensor, Tensor, Tensor]:
    """How well each slot is predicted from those before it (after it, backward).

    Besides the head's score this is the squared error of its mean, ``sum_k n_k ||x_k - m_k||^2 / (V sum_k n_k)`` with
    sizes n and the variance V of contents. The score alone is fair to every feature: of 192 standardised waves of a
    patch the three that make up most of it would be three like others, and be learned last.

    Args:
        prior: one that generates.
        state: ``(B, K, width)`` from `read_slots`.
        slots: ``(B, K, D)`` contents in the scale of the features; they take no gradient.
        layout: of the slots.
        direction: as they were read.

    Returns:
        The score, a mean over slots and features; the error, a share of the variance (0 for a head that has no mean
        of its own); and each slot's own part of their sum, ``(B, K - 1)``, that of slot k + 1 at k (slot k, backward).
    """
    target = prior.target(slots).detach()
    back = direction == BACKWARD
    told, wanted = (slice(1, None), slice(0, -1)) if back else (slice(0, -1), slice(1, None))
    index = torch.arange(target.shape[1], device=target.device)
    before = index[wanted, None] < index if back else index[wanted, None] > index
    context, size = state[:, told] + layout.aim[:, wanted], layout.size[:, wanted]
    target = target[:, wanted] - copies(prior, target, layout, wanted, before)
    seen = layout.valid[:, :-1] & layout.valid[:, 1:]
    # Contents have no gradient, but what is copied of them has: how near is near is learned.
    each = torch.where(seen, prior.head.loss(context, target) / target.shape[-1], 0.0)
    score = each.sum() / seen.sum().clamp_min(1)
    if not prior.head.is_density:
        return score, torch.zeros_like(score), each
    scale = prior.std.square() / prior.std.square().sum()
    square = ((prior.head.mean(context) - target).square() * scale).sum(-1)
    square = torch.where(seen, square * size / (size * seen).sum().clamp_min(1), 0.0)
    return score, square.sum(), each + square


# Using a prior that generates: the mean of every next slot, and new slots drawn one after the other.


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
        temperature: as in `quickmerge.calm.heads.VectorHead.sample`.
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
