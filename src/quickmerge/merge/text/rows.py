"""Which tokens of a prompt stay alone, and which of these a budget pays for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.view import TokenView
from quickmerge.models.literals import literal_mask
from quickmerge.models.moved import onto, read

MARKS = 4
"""Special tokens of a row, the last ones, that stay alone: as many as a chat template puts around the last turn."""


@dataclass(frozen=True)
class Protection:
    """``protected (B, N)`` bool, the tokens that stay alone; ``exempt (B, N)``, those of them that come on top.

    ``asked (B, N)``: all that a user asked for, those among them that stay alone anyway. ``literals (B, N)``: those of
    them that are of literals.
    """

    protected: Tensor
    exempt: Tensor
    asked: Tensor
    literals: Tensor


Protect = Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]] | None
"""From ``ids (B, N)`` to a bool mask of what stays alone; or several such functions."""


def protection(
    valid: Tensor,
    ids: Tensor | None,
    special: list[int],
    *,
    sinks: int,
    recent: int,
    protect: Protect = None,
    tokenizer: Any = None,
    asked: Sequence[Any] | None = None,
) -> Protection:
    """The structural tokens, for which a budget pays, and what the user asked for besides, which is exempt.

    Structural are the first ``sinks`` valid tokens of a row, the last ``recent`` ones, and the last `MARKS` special
    ones. Where BOS and EOS are turn marks, as ``<|im_start|>`` and ``<|im_end|>`` are, that is the template around the
    last turn; the marks of earlier turns compete with all other tokens, or a long chat would be kept for its marks.

    Args:
        valid: ``(B, N)`` bool.
        ids: ``(B, N)``, or None where the model was given embeddings.
        special: ids of BOS and EOS.
        sinks: see above.
        recent: see above.
        protect: from ``ids`` to a bool mask ``(B, N)``; or several such functions.
        tokenizer: of the ids, where literals stay alone too; None where they don't.
        asked: what those functions have answered, if they have been asked.

    Raises:
        QuickmergeError: if there are no ids for ``protect``, or it returns anything but such a mask.
    """
    structural = (_rank(valid) <= sinks) | (_rank(valid.flip(-1)).flip(-1) <= recent)
    masks = functions(protect)
    none = torch.zeros_like(valid)
    if ids is None:
        if masks or tokenizer is not None:
            raise QuickmergeError("protect needs input_ids, and the model was called with inputs_embeds")
        return Protection(structural & valid, none, none, none)
    marks = torch.isin(ids, onto(torch.tensor(special, dtype=ids.dtype), ids.device)) & valid
    structural = (structural | (marks & (_rank(marks.flip(-1)).flip(-1) <= MARKS))) & valid
    literals = none if tokenizer is None else literal_mask(ids, valid, tokenizer).to(valid.device)
    wished = literals
    for wanted in [mask(ids) for mask in masks] if asked is None else asked:
        if not isinstance(wanted, Tensor) or wanted.shape != ids.shape or wanted.dtype != torch.bool:
            raise QuickmergeError(f"protect must return a bool mask of shape {tuple(ids.shape)}")
        wished = wished | (wanted.to(valid.device) & valid)
    return Protection(structural | wished, wished & ~structural, wished, literals)


def functions(protect: Protect) -> tuple[Callable[[Tensor], Tensor], ...]:
    """A user's functions from ids to what stays alone, none, one or several."""
    return () if protect is None else (protect,) if callable(protect) else tuple(protect)


def special_tokens(config: object) -> list[int]:
    """Ids of BOS and EOS of a model's config, of which there may be several or none."""
    found: list[int] = []
    for name in ("bos_token_id", "eos_token_id"):
        given = getattr(config, name, None)
        found += [] if given is None else [int(i) for i in given] if isinstance(given, (list, tuple)) else [int(given)]
    return found


def _rank(mask: Tensor) -> Tensor:
    """``(B, N)`` long: how many marked tokens a row has up to each."""
    return mask.long().cumsum(-1)


@dataclass(frozen=True)
class Told:
    """What a prompt is given with, on the host: all of it by one wait for the device, and by none where there is none.

    ``valid (B, N)`` bool; ``ids (B, N)``, ``given`` positions ``(B or 1, N)`` and ``asked (B, N)``, what a user's
    ``protect`` has answered; None where there is none. ``plain``: whether no positions of another kind were given.
    """

    valid: Tensor
    ids: Tensor | None
    given: Tensor | None
    asked: tuple[Any, ...]
    plain: bool = True

    @classmethod
    def of(cls, inputs: Mapping[str, Any], mask: Tensor | None, protect: Protect = None) -> Told:
        """Of a decoder's arguments by name, with its 2-D ``mask``."""
        ids, stands = inputs.get("input_ids"), inputs.get("position_ids")
        asked = [] if ids is None else [mask_of(ids) for mask_of in functions(protect)]
        places = stands if isinstance(stands, Tensor) and stands.ndim == 2 else None
        plain = stands is None or places is not None
        there, tokens, given, *marks = read(mask, ids, places, *(x if isinstance(x, Tensor) else None for x in asked))
        if there is None:
            shape = (inputs["inputs_embeds"] if ids is None else ids).shape[:2]
            there = torch.ones(shape, dtype=torch.bool)
        answers = tuple(own if x is None else x for own, x in zip(asked, marks, strict=True))
        return cls(there.bool(), tokens, given, answers, plain)

    def without(self, last: int) -> Told:
        """The same without so many tokens at the end."""
        if not last:
            return self

        def cut(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(cut, x))
            return x[:, :-last] if isinstance(x, Tensor) and x.ndim == 2 else x

        return Told(*(cut(getattr(self, f.name)) for f in fields(self)))

    def last(self, first: int) -> int | None:
        """The last place of any token from a column on; None where there is none or it isn't known."""
        n = self.valid.shape[1]
        if first == n or not self.plain:
            return None
        return n - 1 if self.given is None or self.given.shape[1] != n else int(self.given[:, first:].max())

    def reach(self, protected: Tensor) -> tuple[int, int] | None:
        """The first and the last place of any token, if merging leaves them: None where those tokens may go."""
        valid, n = self.valid, self.valid.shape[1]
        first, last = valid.long().argmax(-1, keepdim=True), n - 1 - valid.flip(-1).long().argmax(-1, keepdim=True)
        if not self.plain or not bool((protected.gather(1, first) & protected.gather(1, last)).all()):
            return None
        if self.given is None or self.given.shape[1] != n:
            return 0, n - 1  # counted by columns or by tokens, as the model does
        places = self.given.expand(len(valid), -1)
        return int(places.gather(1, first).min()), int(places.gather(1, last).max())


# Prompts of a batch: what they must look like, and planning for some rows while the others stay whole.


PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""Arguments by which a batch says that its rows hold several texts."""


def check_padding(valid: Tensor) -> None:
    """Raise QuickmergeError unless the padding of each row ``valid (B, N)`` is on one side, with tokens beside it."""
    runs = (valid[:, 1:] != valid[:, :-1]).sum(-1)
    both = (runs > 1) | ((runs == 1) & valid[:, 0] & valid[:, -1])
    if bool(both.any()) or not bool(valid.any(-1).all()):
        raise QuickmergeError("attention_mask must pad on one side and leave tokens in every row, got holes")


def check_one_text(inputs: Mapping[str, object], valid: Tensor | None, cached: bool) -> None:
    """Raise QuickmergeError if a row of a prompt holds several texts, which must not be merged with one another.

    Position ids that don't rise within a row tell it. So does any jump where there is neither a mask nor a cache, since
    models take that for the seam of two texts; and the arguments by which padding is done without.

    Args:
        inputs: arguments of the model by name.
        valid: ``(B, N)`` bool, False for padding; None for none.
        cached: whether a cache is given.
    """
    advice = "give each text a row of its own, with padding"
    for name in PACKED:
        if inputs.get(name) is not None:
            raise QuickmergeError(
                f"{name} must be left out inside a quickmerge run, which reads one text a row: {advice}"
            )
    places = inputs.get("position_ids")
    if not isinstance(places, Tensor) or places.ndim != 2 or places.shape[1] < 2:
        return
    steps = places[:, 1:] - places[:, :-1]
    if valid is not None and valid.shape[1] == places.shape[1]:
        steps = torch.where(valid[:, 1:] & valid[:, :-1], steps, 1)
    strict = inputs.get("attention_mask") is None and not cached
    if bool(((steps != 1) if strict else (steps < 1)).any()):
        raise QuickmergeError(
            f"position_ids must rise {'by one ' if strict else ''}from token to token inside a quickmerge run, got "
            f"rows of several texts (position ids that begin anew): {advice}"
        )


@dataclass(frozen=True)
class Planned:
    """A plan for all rows of a batch, and what is added to its slots: ``{block: (B, K, D)}``."""

    plan: MergePlan
    added: dict[int, Tensor]


def plan_rows(
    view: TokenView,
    which: Sequence[int] | None,
    plan: Callable[[TokenView], MergePlan],
    align: Callable[[TokenView, MergePlan], Mapping[int, Tensor]],
) -> Planned:
    """Plan for some rows as if they were alone; every token of the others stays as it is.

    Args:
        view: the batch.
        which: the rows to reduce, one at least; None for all.
        plan: decides for a view.
        align: what is to be added to the slots of such a plan.
    """
    if which is None:
        decided = plan(view)
        return Planned(decided, dict(align(view, decided)))
    device = view.valid.device
    rows = onto(torch.tensor(list(which)), device)
    part = view.each_row(lambda x: x.index_select(0, rows))
    if view.known is not None:
        part = replace(part, known=view.known.rows(which))
    decided = plan(part).counted()
    added = align(part, decided)
    left = view.pads_left
    assert decided.counts is not None
    counts = list(view.valid.sum(-1).tolist() if view.known is None else view.known.valid)
    for row, held in zip(which, decided.counts, strict=True):
        counts[row] = held
    count, width = onto(torch.tensor(counts), device), max(counts)
    index = view.valid.long().cumsum(-1) - 1
    shift = (width - count if left else torch.zeros_like(count))[:, None]
    slot = torch.where(view.valid, index + shift, -1)
    dtype = decided.weight.dtype
    weight = view.valid.to(dtype)
    seat = torch.where(view.valid, slot, width).index_fill(0, rows, width)
    # Where each slot of the part's own plan goes: its rank among the valid ones of its row.
    place = torch.where(decided.valid, decided.valid.long().cumsum(-1) - 1 + shift[rows], width)
    slot[rows] = torch.where(decided.slot >= 0, place.gather(1, decided.slot.clamp_min(0)), -1)
    weight[rows] = decided.weight

    def put(whole: Tensor, own: Tensor) -> Tensor:
        out = whole.new_zeros(len(whole), width + 1).scatter(1, seat, whole)
        out[rows] = whole.new_zeros(len(rows), width + 1).scatter(1, place, own)
        return out[:, :width]

    def spread(x: Tensor) -> Tensor:
        own = x.new_zeros(len(rows), width + 1, x.shape[-1]).scatter(1, place[..., None].expand_as(x), x)
        return x.new_zeros(len(slot), width, x.shape[-1]).index_copy(0, rows, own[:, :width])

    merged = MergePlan(
        slot=slot,
        weight=weight,
        position=put(view.position, decided.position),
        size=put(view.size, decided.size),
        valid=put(view.valid.long(), decided.valid.long()).bool(),
        counts=tuple(counts),
    )
    return Planned(merged, {block: spread(x) for block, x in added.items()})
