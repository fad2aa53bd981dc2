"""Which columns of a prompt are visual tokens, and of which image or video."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.tokens.plan import MergePlan, anchors_of
from quickmerge.merge.tokens.saliency import AttentionTrace, attention_from, times_value_norm
from quickmerge.merge.tokens.view import Evidence, Known, TokenView
from quickmerge.merge.visual.features import FeatureWatch, Piece, tensors_of
from quickmerge.merge.visual.tower import Grid, Seen
from quickmerge.models.moved import onto
from quickmerge.models.vlm import Vlm

KINDS = ("image", "video")
PIXELS = {"image": ("pixel_values",), "video": ("pixel_values_videos",)}
"""Arguments by which they are given."""


@dataclass
class Image:
    """The visual tokens of one image (of one tile, where a model cuts images up in front of it) or video.

    ``row`` of the batch and ``columns (n,)`` of the prompt as it was given, on the host; ``kind``, ``"image"`` or
    ``"video"``; ``grid`` (T, H, W) of the tokens where they form one. ``plan``, once it was made, a plan of one row
    for the n tokens, and ``view`` what the reducer saw when it first decided.
    """

    row: int
    columns: Tensor
    kind: str
    grid: Grid | None
    seen: Seen | None = None
    plan: MergePlan | None = None
    view: TokenView | None = None
    now: Tensor | None = None
    """``(k,)`` columns of the tokens that are left, in the sequence as it is by now."""

    @property
    def count(self) -> int:
        """How many tokens there were."""
        return len(self.columns)

    @property
    def left(self) -> int:
        """How many are left."""
        return self.count if self.plan is None else self.plan.slots


def read_images(
    vlm: Vlm, inputs: dict[str, Any], features: FeatureWatch, embeds: Tensor, told: Tensor | None = None
) -> list[Image]:
    """Every image and video of a prompt, in the order in which their features fill the placeholders.

    Args:
        vlm: the model.
        inputs: what its base was called with, by name.
        features: knows what the features were made from.
        embeds: ``(B, N, D)``, what the language model is given.
        told: the ids ``(B, N)`` on the host; None has them fetched.

    Raises:
        QuickmergeError: if there are no ids to find placeholders by, or what is given does not fit together.
        UnsupportedModelError: if features don't stand where the placeholders did.
    """
    given = inputs.get("mm_encoder_outputs") or {}
    if isinstance(given, Tensor):
        raise QuickmergeError("mm_encoder_outputs must be a dict inside a quickmerge run, got a tensor")
    images: list[Image] = []
    ids: Any = inputs.get("input_ids") if told is None else told
    ids = None if ids is None else ids.cpu()
    for kind in KINDS:
        output = given.get(kind) or features.outputs.get(kind)
        if output is None:
            if any(value is not None for name, value in inputs.items() if name in PIXELS[kind]):
                raise _elsewhere(vlm, kind, "made none by the method that tells them")
            continue
        if ids is None:
            raise QuickmergeError("input_ids must be given with images inside a quickmerge run, to find them by")
        rows, columns = (ids == vlm.token(kind)).nonzero(as_tuple=True)
        vectors = tensors_of(output)
        pieces = [piece for each in vectors for piece in features.pieces(each)]
        sizes = [piece.tokens for piece in pieces]
        if sum(sizes) != len(rows):
            raise QuickmergeError(
                f"input_ids must hold {sum(sizes)} {kind} placeholders, one for each feature, got {len(rows)}"
            )
        whole = torch.cat([each.flatten(0, -2) for each in vectors]).to(embeds.device, embeds.dtype)
        at = onto(torch.stack([rows, columns]), embeds.device)
        if not _stand_there(vlm, kind, embeds[at[0], at[1]], whole):
            raise _elsewhere(vlm, kind, "are not what stands there in front of its language model")
        for piece, mine, places in zip(pieces, rows.split(sizes), columns.split(sizes), strict=True):
            if piece.runs:
                images.extend(_in_runs(piece, kind, mine, places))
                continue
            if bool((mine != mine[0]).any()):
                raise QuickmergeError(f"input_ids must hold the {kind} placeholders of an image in one row, got two")
            places = places if piece.apart is None else places[~piece.apart.to(places.device)]
            images.append(Image(int(mine[0]), places, kind, piece.grid, piece.seen, now=places))
    return images


@torch.no_grad()
def _stand_there(vlm: Vlm, kind: str, found: Tensor, features: Tensor) -> bool:
    """Whether features ``(n, D)`` are what stands at their placeholders, or what was added to these."""
    if found.shape != features.shape:
        return False
    words, token = vlm.model.get_input_embeddings(), vlm.token(kind)
    if torch.equal(found, features):
        return True
    known = isinstance(token, int) and token < getattr(words, "num_embeddings", 0)
    own = words(torch.tensor([token], device=found.device)) if known else None
    return own is not None and torch.equal(found, own.to(found.dtype) + features)


def _elsewhere(vlm: Vlm, kind: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(vlm.model).__name__} is not supported: the features of its {kind}s must take the place of placeholder "
        f"tokens, and {what}"
    )


def _in_runs(piece: Piece, kind: str, rows: Tensor, columns: Tensor) -> Iterator[Image]:
    """The images in a piece of several: each is of placeholders that stand side by side."""
    seam = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1] + 1)
    ends = [*(seam.nonzero().flatten() + 1).tolist(), len(rows)]
    there = torch.ones_like(rows, dtype=torch.bool) if piece.apart is None else ~piece.apart.to(rows.device)
    number = there.long().cumsum(0) - 1
    for a, b in pairwise([0, *ends]):
        stays, places = there[a:b], columns[a:b]
        seen = None if piece.seen is None else piece.seen.at(number[a:b][stays])
        if bool(stays.any()):
            yield Image(int(rows[a]), places[stays], kind, None, seen, now=places[stays])


def special_ids(vlm: Vlm) -> set[int]:
    """Every id that the model's configurations name: beginnings, ends, padding, placeholders."""
    found: set[int] = set()
    for config in (vlm.config, vlm.decoder.config, vlm.model.generation_config):
        for name, value in (config.to_dict() if config is not None else {}).items():
            if name.endswith(("token_id", "token_index")):
                found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    return found


def instruction(ids: Tensor, valid: Tensor, special: set[int], images: list[Image]) -> list[Tensor]:
    """The columns of each row that hold the user's instruction, as far as a model can tell without its tokenizer.

    Tokens that no configuration names as special: those behind the last image, or all where there are none behind.

    Args:
        ids: ``(B, N)``; placeholders are special.
        valid: ``(B, N)``.
        special: the special ids.
        images: of the prompt.
    """
    plain = valid & ~torch.isin(ids, onto(torch.tensor(sorted(special), dtype=ids.dtype), ids.device))
    last = {image.row: int(image.columns[-1]) for image in images}
    found = []
    for row, there in enumerate(plain):
        columns = there.nonzero().flatten()
        behind = columns[columns > last.get(row, -1)]
        found.append(behind if len(behind) else columns)
    return found


# Deciding for the visual tokens of a batch: a view per image, and one plan for the whole sequence.


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

    Images of the same shape are decided together, a row each, so padding is never seen.

    Args:
        reducer: the method, with the ``keep`` of this place.
        whole: the sequence as it is.
        images: what is to be reduced, by where it is now.
        text: columns of each row's instruction.
        told: what is known of an image beside its hidden states.

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
    views = [(group, _group_view(reducer, whole, group, text, told)) for group in groups.values()]
    _check_told([view for _, view in views])
    made = [(group, view, reducer.plan(view).counted()) for group, view in views]
    return _carried_out(whole, made, reducer)


def _check_told(views: list[TokenView]) -> None:
    """What was measured of images must be numbers: one look for all of them."""
    told = [view.evidence.saliency for view in views if view.evidence.saliency is not None]
    if told and not bool(torch.stack([(x.isfinite() & (x >= 0)).all() for x in told]).all()):
        for view in views:
            view.evidence.check(view.hidden, view.valid, look=True)


def hand_on(whole: TokenView, images: list[Image]) -> Decision | None:
    """Leave one token of every slot that patches were merged to inside the vision tower; dropped ones go.

    The tokens of a slot are copies of one another, so the one that stays is what they are, to the bit.

    Args:
        whole: the sequence as it is.
        images: what was seen of them in the tower.

    Returns:
        None if every token stays.
    """
    made = []
    for image in images:
        leader = None if image.seen is None else image.seen.leader
        if leader is not None:
            view = TokenView(whole.hidden.detach()[image.row : image.row + 1, image.columns])
            leader = leader.to(view.hidden.device)[None]
            leads = leader == torch.arange(image.count, device=leader.device)
            plan = MergePlan.from_anchors(view, leads, torch.where(leads, -1, leader))
            made.append(([image], view, plan))
    return _carried_out(whole, made, None) if made else None


def _carried_out(
    whole: TokenView, made: list[tuple[list[Image], TokenView, MergePlan]], reducer: Reducer | None
) -> Decision | None:
    """What plans for images make of a sequence; without a reducer slots are what stands at their places."""
    if all(_keeps_all(plan, view) for _, view, plan in made):
        return None
    sequence, seat = _together(whole, made)
    hidden = whole.hidden.gather(1, seat[..., None].expand(-1, -1, whole.hidden.shape[-1]))
    hidden = torch.where(sequence.valid[..., None], hidden, 0.0)
    for group, view, plan in made:
        rows, columns = _places(group, hidden.device)
        anchors = anchors_of(plan, view)
        slots = sequence.slot[rows, columns].gather(1, anchors)
        there = plan.valid
        if reducer is not None:
            merged = reducer.combine(view, plan, whole.hidden[rows, columns]).to(hidden.dtype)
            # Where no slot is padding, as for a share of images of one size, a mask would only have to be looked up.
            some = _all(plan) or there
            at = (rows.expand_as(slots), slots)
            hidden = hidden.index_put((at[0][some], at[1][some]), merged[some])
        for i, image in enumerate(group):
            own = _row(plan, i)
            if reducer is not None:
                image.view = view.row(i) if image.view is None else image.view
            image.plan = own if image.plan is None else image.plan.compose(own)
            image.now = slots[i] if _all(plan) else slots[i][there[i]]
    return Decision(sequence, hidden, seat)


def _all(plan: MergePlan) -> Any:
    """What indexes all slots of a plan none of which is padding; None for another."""
    return ... if plan.counts is not None and min(plan.counts) == plan.slots else None


def _group_view(
    reducer: Reducer,
    whole: TokenView,
    group: list[Image],
    text: list[Tensor],
    told: Callable[[Image], Seen | None],
) -> TokenView:
    rows, columns = _places(group, whole.hidden.device)
    hidden = whole.hidden.detach()[rows, columns]
    seen = [told(image) for image in group]

    def stacked(name: str) -> Tensor | None:
        parts = [None if each is None else getattr(each, name) for each in seen]
        return None if any(part is None for part in parts) else torch.stack(parts).to(hidden.device)  # type: ignore[arg-type]

    features = stacked("features")
    question, there = None, None
    if "text" in reducer.needs.visual and all(len(text[image.row]) for image in group):
        at = torch.nn.utils.rnn.pad_sequence([text[image.row] for image in group], True, -1)
        at = onto(at, whole.hidden.device)
        there = at >= 0
        question = whole.hidden.detach()[rows, at.clamp_min(0)]
    count = (columns.shape[1],) * len(group)
    none, length = (0,) * len(group), (group[0].count,) * len(group)
    known = Known(count, none, none, length, (True,) * len(group))
    view = TokenView(
        hidden if features is None else features,
        position=torch.stack([_cells(image, hidden.device) for image in group]),
        size=whole.size[rows, columns],
        length=torch.full((len(group),), group[0].count, device=hidden.device),
        grid=group[0].grid,
        evidence=Evidence(
            text=question,
            text_valid=there,
            saliency=stacked("saliency"),
            key=stacked("key"),
            layer=whole.evidence.layer,
            depth=whole.evidence.depth,
        ),
        known=known,
    )
    return view


def _cells(image: Image, device: torch.device) -> Tensor:
    """Where each of an image's present tokens stands among those that there were."""
    if image.plan is None:
        return torch.arange(image.count, device=device)
    return image.plan.position[0].to(device)


def _keeps_all(plan: MergePlan, view: TokenView) -> bool:
    if plan.counts is not None and view.known is not None:
        return plan.counts == view.known.valid
    return bool((plan.valid.sum(-1) == view.valid.sum(-1)).all())


def _places(group: list[Image], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows ``(G, 1)`` and columns ``(G, n)`` of images with the same number of tokens."""
    columns = torch.stack([onto(image.now, device) for image in group if image.now is not None])
    return onto(torch.tensor([[image.row] for image in group]), device), columns


def _together(whole: TokenView, made: list[tuple[list[Image], TokenView, MergePlan]]) -> tuple[MergePlan, Tensor]:
    """One plan for the sequence from those for its images, and the column at which each slot stands."""
    shape, device = whole.valid.shape, whole.valid.device
    anchor = whole.valid.clone()
    leader = torch.full(shape, -1, dtype=torch.long, device=device)
    share = torch.ones(shape, dtype=torch.promote_types(whole.hidden.dtype, torch.float32), device=device)
    for group, view, plan in made:
        rows, columns = _places(group, device)
        at = anchors_of(plan, view)
        stays = torch.zeros(columns.shape[0], columns.shape[1] + 1, dtype=torch.bool, device=device)
        stays = stays.scatter(1, torch.where(plan.valid, at, columns.shape[1]), True)[:, :-1]
        anchor[rows, columns] = stays
        to = columns.gather(1, at.gather(1, plan.slot.clamp_min(0)))
        leader[rows, columns] = torch.where((plan.slot >= 0) & ~stays, to, -1)
        share[rows, columns] = torch.where(plan.slot >= 0, plan.weight.to(share.dtype), 1.0)
    kept = None if whole.known is None else list(whole.known.valid)
    for group, view, plan in made:
        for image, count in zip(group, plan.counts or (None,) * len(group), strict=True):
            if kept is not None and count is not None:
                kept[image.row] += count - view.hidden.shape[1]
            else:
                kept = None
    plan = MergePlan.from_anchors(whole, anchor, leader, share, kept=kept)
    index = torch.arange(shape[1], device=device).expand(shape)
    seat = torch.zeros(shape[0], plan.slots + 1, dtype=torch.long, device=device)
    seat = seat.scatter(1, torch.where(anchor, plan.slot, plan.slots), index)[:, : plan.slots]
    return plan, seat


def _row(plan: MergePlan, i: int) -> MergePlan:
    """Row ``i`` of a plan as a plan of one row, without the slots that only pad it."""
    slot, first, there = plan.slot[i : i + 1], None, _all(plan)
    if there is None:
        there = plan.valid[i].nonzero().flatten()
        first = there[0]
    return replace(
        plan,
        slot=slot if first is None else torch.where(slot >= 0, slot - first, -1),
        weight=plan.weight[i : i + 1],
        position=plan.position[i : i + 1][:, there],
        size=plan.size[i : i + 1][:, there],
        valid=plan.valid[i : i + 1][:, there],
        seat=None,
        moved=None,
        order=None if plan.order is None else plan.order[i : i + 1],
        counts=None if plan.counts is None else (plan.counts[i],),
    )


# What a reducer is told of visual tokens inside the language model: by the attention of the block below.


def told_inside(
    trace: AttentionTrace | None, view: TokenView, visual: Tensor, asks: frozenset[str]
) -> Callable[[Image], Seen | None]:
    """A function that tells of an image, by the attention of the block below the merge.

    Saliency is what the text behind the image pays to each token, mean over heads and voters; for ``"norm"`` the root
    mean square length of what each adds to their outputs. Keys are means over heads.

    Args:
        trace: of the block below; None where nobody asked.
        view: the sequence in front of the merge.
        visual: ``(B, N)`` bool, its visual tokens.
        asks: what the reducer wants to know.
    """

    @torch.no_grad()
    def told(image: Image) -> Seen | None:
        if trace is None:
            return None
        row, at = slice(image.row, image.row + 1), image.now
        assert at is not None
        at = onto(at, view.hidden.device)
        key = trace.key[row].to(torch.promote_types(trace.key.dtype, torch.float32)).mean(1)[0, at]
        saliency = None
        kind = next(iter(asks & {"attention", "norm"}), None)
        if kind is not None:
            own = AttentionTrace(trace.query[row], trace.key[row], trace.value[row], trace.scaling, trace.window)
            valid, position = view.valid[row], view.position[row]
            voters = _voters(valid[0], visual[row][0], int(at[-1]))
            share = attention_from(own, voters, valid, position, 2 if kind == "norm" else 1)
            if kind == "norm":
                share = times_value_norm(share, own.value)
            saliency = share.mean(1)[0, at]
        return Seen(len(at), image.grid, None, saliency, key if "key" in asks else None)

    return told


def _voters(valid: Tensor, visual: Tensor, last: int) -> Tensor:
    """``(1, w)``: the text tokens of a row behind column ``last``, or its very last token where there are none."""
    there = (valid & ~visual).nonzero().flatten()
    behind = there[there > last]
    return (behind if len(behind) else valid.nonzero().flatten()[-1:])[None]
