"""Deciding for the visual tokens of a batch: a view per picture, and one plan for the whole sequence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from quickmerge.hosts.tower_tokens import Seen
from quickmerge.hosts.visual import Image
from quickmerge.reducers.base import Reducer
from quickmerge.tokens.plan import MergePlan, anchors_of
from quickmerge.tokens.view import TokenView


@dataclass(frozen=True)
class Decision:
    """What was decided for a sequence: its plan, and its slots' hidden states.

    ``seat (B, K)``: the column at which each slot stands; of a padding slot, 0.
    """

    plan: MergePlan
    hidden: Tensor
    seat: Tensor


def decide(
    reducer: Reducer,
    whole: TokenView,
    images: list[Image],
    text: list[Tensor],
    told: Callable[[Image], Seen | None],
) -> Decision | None:
    """Reduce the visual tokens of a sequence; every other token stays alone.

    Pictures of the same shape are decided together, a row each, so padding is never seen.

    Args:
        reducer: the method, with the ``keep`` of this place.
        whole: the sequence as it is.
        images: what is to be reduced, by where it is now.
        text: columns of each row's instruction.
        told: what is known of a picture beside its hidden states.

    Returns:
        None if every token stays.
    """
    if not images:
        return None
    groups: dict[object, list[Image]] = defaultdict(list)
    for image in images:
        assert image.now is not None
        # What stands elsewhere than at first, after an earlier merge, has places of its own in the grid.
        groups[(len(image.now), image.count, image.grid)].append(image)
    made = [(group, *_plan(reducer, whole, group, text, told)) for group in groups.values()]
    if all(_keeps_all(plan, view) for _, view, plan in made):
        return None
    sequence, seat = _together(whole, made)
    hidden = whole.hidden.gather(1, seat[..., None].expand(-1, -1, whole.hidden.shape[-1]))
    hidden = torch.where(sequence.valid[..., None], hidden, 0.0)
    for group, view, plan in made:
        rows, columns = _places(group)
        merged = reducer.combine(view, plan, whole.hidden[rows, columns]).to(hidden.dtype)
        anchors = anchors_of(plan, view)
        slots = sequence.slot[rows, columns].gather(1, anchors)
        there = plan.valid
        hidden = hidden.index_put((rows.expand_as(slots)[there], slots[there]), merged[there])
        for i, image in enumerate(group):
            own = _row(plan, i)
            image.view = view_of(view, i) if image.view is None else image.view
            image.plan = own if image.plan is None else image.plan.compose(own)
            image.now = slots[i][there[i]]
    return Decision(sequence, hidden, seat)


def _plan(
    reducer: Reducer,
    whole: TokenView,
    group: list[Image],
    text: list[Tensor],
    told: Callable[[Image], Seen | None],
) -> tuple[TokenView, MergePlan]:
    rows, columns = _places(group)
    hidden = whole.hidden.detach()[rows, columns]
    seen = [told(image) for image in group]

    def stacked(name: str) -> Tensor | None:
        parts = [None if each is None else getattr(each, name) for each in seen]
        return None if any(part is None for part in parts) else torch.stack(parts).to(hidden.device)  # type: ignore[arg-type]

    features = stacked("features")
    question, there = None, None
    if "text" in reducer.asks and all(len(text[image.row]) for image in group):
        at = torch.nn.utils.rnn.pad_sequence([text[image.row] for image in group], True, -1)
        there = at >= 0
        question = whole.hidden.detach()[rows, at.clamp_min(0)]
    view = TokenView(
        hidden if features is None else features,
        position=torch.stack([_cells(image) for image in group]).to(hidden.device),
        size=whole.size[rows, columns],
        length=torch.full((len(group),), group[0].count, device=hidden.device),
        grid=group[0].grid,
        text=question,
        text_valid=there,
        saliency=stacked("saliency"),
        key=stacked("key"),
        layer=whole.layer,
        depth=whole.depth,
    )
    return view, reducer.plan(view)


def _cells(image: Image) -> Tensor:
    """Where each of a picture's present tokens stands among those that there were."""
    if image.plan is None:
        return torch.arange(image.count)
    return image.plan.position[0].cpu()


def _keeps_all(plan: MergePlan, view: TokenView) -> bool:
    return bool((plan.valid.sum(-1) == view.valid.sum(-1)).all())


def _places(group: list[Image]) -> tuple[Tensor, Tensor]:
    """Rows ``(G, 1)`` and columns ``(G, n)`` of pictures with the same number of tokens."""
    columns = torch.stack([image.now for image in group])  # type: ignore[misc]
    return torch.tensor([[image.row] for image in group], device=columns.device), columns


def _together(whole: TokenView, made: list[tuple[list[Image], TokenView, MergePlan]]) -> tuple[MergePlan, Tensor]:
    """One plan for the sequence from those for its pictures, and the column at which each slot stands."""
    shape, device = whole.valid.shape, whole.valid.device
    anchor = whole.valid.clone()
    leader = torch.full(shape, -1, dtype=torch.long, device=device)
    share = torch.ones(shape, dtype=torch.float32, device=device)
    for group, view, plan in made:
        rows, columns = _places(group)
        at = anchors_of(plan, view)
        stays = torch.zeros(columns.shape[0], columns.shape[1] + 1, dtype=torch.bool, device=device)
        stays = stays.scatter(1, torch.where(plan.valid, at, columns.shape[1]), True)[:, :-1]
        anchor[rows, columns] = stays
        to = columns.gather(1, at.gather(1, plan.slot.clamp_min(0)))
        leader[rows, columns] = torch.where((plan.slot >= 0) & ~stays, to, -1)
        share[rows, columns] = torch.where(plan.slot >= 0, plan.weight.float(), 1.0)
    plan = MergePlan.from_anchors(whole, anchor, leader, share)
    index = torch.arange(shape[1], device=device).expand(shape)
    seat = torch.zeros(shape[0], plan.slots + 1, dtype=torch.long, device=device)
    seat = seat.scatter(1, torch.where(anchor, plan.slot, plan.slots), index)[:, : plan.slots]
    return plan, seat


def _row(plan: MergePlan, i: int) -> MergePlan:
    """Row ``i`` of a plan as a plan of one row, without the slots that only pad it."""
    there = plan.valid[i].nonzero().flatten()
    slot = plan.slot[i : i + 1]
    return replace(
        plan,
        slot=torch.where(slot >= 0, slot - there[0], -1),
        weight=plan.weight[i : i + 1],
        position=plan.position[i : i + 1, there],
        size=plan.size[i : i + 1, there],
        valid=plan.valid[i : i + 1, there],
        seat=None,
        moved=None,
        order=None if plan.order is None else plan.order[i : i + 1],
    )


def view_of(view: TokenView, i: int) -> TokenView:
    """Row ``i`` of a view, as a view of one row."""
    names = [f.name for f in fields(view) if isinstance(getattr(view, f.name), Tensor)]
    rows: dict[str, Any] = {name: getattr(view, name)[i : i + 1] for name in names}
    return replace(view, **rows)
