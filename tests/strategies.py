"""Random views, plans and settings for the property tests, and the small helpers that compare plans.

Hypothesis draws sizes and a seed, everything else comes from the seed. So failures shrink to small sizes, every
example is reproducible, and no two examples are alike: many small draws would mostly repeat one another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeVar

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from quickmerge.merge.tokens import AttentionTrace, Count, Entropy, Evidence, Mass, MergePlan, Ratio, TokenView
from quickmerge.merge.tokens.budget import Budget

FLOATS = (torch.float32, torch.float64, torch.bfloat16)
HUGE = 1e30  # what padded places hold: squares of it overflow float32


def prop(examples: int) -> Callable[[Any], Any]:
    """Settings of a property test: the same examples on every run, however slow the machine; few in `make quick`."""
    return settings(
        max_examples=min(examples, 4) if os.environ.get("QUICKMERGE_QUICK") else examples,
        deadline=None,
        derandomize=True,
        database=None,
    )


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


seeds = st.integers(0, 2**31 - 1)


def up_to(most: int) -> st.SearchStrategy[int]:
    """1 to ``most``, larger ones more often than hypothesis would on its own."""
    return st.integers(1, most) | st.integers((most + 1) // 2, most)


def numbers(shape: tuple[int, ...], kind: str, rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Features ``(..., N, D)``: ``normal``; ``tied``, small whole numbers; ``zeros``; ``twins``, repeated tokens."""
    if kind == "zeros":
        return torch.zeros(shape, dtype=dtype)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    if kind == "tied":
        x = x.round().clamp(-1, 1)
    if kind == "twins":
        x = x.index_select(-2, torch.randint(shape[-2], (shape[-2],), generator=rng) // 2)
    return x.to(dtype)


KINDS = ("normal", "tied", "twins", "zeros")


def valid_mask(batch: int, tokens: int, padding: str, rng: Random) -> Tensor:
    """``(B, N)`` bool with a contiguous run in every row: on the right, on the left, or anywhere (``mixed``)."""
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    for row in mask:
        length = tokens if padding == "none" else max(rng.randint(1, tokens), rng.randint(1, tokens))
        spare = tokens - length
        first = {"left": spare, "right": 0}.get(padding, rng.randint(0, spare))
        row[first : first + length] = True
    return mask


def valid_masks(batch: int, tokens: int, padding: str = "mixed") -> st.SearchStrategy[Tensor]:
    return seeds.map(lambda seed: valid_mask(batch, tokens, padding, Random(seed)))


def attention_trace(batch: int, tokens: int, kind: str, dtype: torch.dtype, rng: Random) -> AttentionTrace:
    """Grouped-query attention of odd widths, with or without a sliding window."""
    groups, share = rng.randint(1, 2), rng.randint(1, 3)
    width, values = rng.choice((1, 3, 4, 7)), rng.choice((1, 2, 5))
    draws = generator(rng.getrandbits(31))
    return AttentionTrace(
        query=numbers((batch, groups * share, tokens, width), kind, draws, dtype),
        key=numbers((batch, groups, tokens, width), kind, draws, dtype),
        value=numbers((batch, groups, tokens, values), kind, draws, dtype),
        scaling=rng.choice((width**-0.5, 1.0, 0.3)),
        window=rng.choice((None, rng.randint(1, tokens + 1))),
    )


@st.composite
def views(
    draw: st.DrawFn,
    attention: int = 0,
    max_batch: int = 3,
    max_tokens: int = 40,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    kinds: tuple[str, ...] = KINDS,
    paddings: tuple[str, ...] = ("mixed", "left", "right", "none"),
    merged: bool | None = None,
    protect: tuple[str, ...] = ("none", "ends", "some", "all"),
    garbage: bool = True,
    exempt: bool = False,
) -> TokenView:
    """A batch of tokens, fresh or left over from an earlier merge, with nonsense in every padded place.

    Args:
        draw: given by hypothesis.
        attention: how many traces the view carries.
        max_batch, max_tokens: largest sizes.
        dtypes, kinds, paddings, protect: what to choose from, the earlier ones more often.
        merged: whether tokens already stand for several; None chooses.
        garbage: whether padded places hold huge numbers and random flags.
        exempt: whether some of the protected tokens are exempt from budgets, more often than not.
    """
    batch, tokens = draw(up_to(max_batch)), draw(up_to(max_tokens))
    rng = Random(draw(seeds))
    draws = generator(rng.getrandbits(31))
    dtype, kind, padding, how = (favour(options, rng) for options in (dtypes, kinds, paddings, protect))
    valid = valid_mask(batch, tokens, padding, rng)
    hidden = numbers((batch, tokens, rng.choice((1, 3, 4, 7))), kind, draws, dtype)
    rank = valid.long().cumsum(-1) - 1

    guarded = torch.zeros_like(valid)
    if how == "ends":
        guarded = (rank < rng.randint(0, 3)) | (rank >= rank[:, -1:] + 1 - rng.randint(0, 3))
    elif how == "some":
        guarded = torch.rand(valid.shape, generator=draws) < 0.3
    elif how == "all":
        guarded = torch.ones_like(valid)

    position, size, length = rank.clamp_min(0), valid.long(), valid.sum(-1)
    if rng.random() < 0.4 if merged is None else merged:
        size = torch.randint(1, 5, valid.shape, generator=draws) * valid
        dropped = torch.randint(0, 3, valid.shape, generator=draws) * valid
        position = ((size + dropped).cumsum(-1) - 1).clamp_min(0)
        length = (size + dropped).sum(-1)
    view = TokenView(
        hidden=hidden,
        valid=valid,
        protected=guarded & valid,
        position=position,
        size=size,
        length=length,
        exempt=guarded & valid & (torch.rand(valid.shape, generator=draws) < rng.choice((0.0, 0.5, 0.8, 1.0)))
        if exempt
        else None,
        evidence=Evidence(attention=tuple(attention_trace(batch, tokens, kind, dtype, rng) for _ in range(attention))),
    )
    return litter(view, draws) if garbage else view


T = TypeVar("T")


def favour(options: Sequence[T], rng: Random) -> T:
    """One of the options, the earlier ones more often."""
    return rng.choices(options, weights=range(len(options), 0, -1))[0]


def litter(view: TokenView, rng: torch.Generator) -> TokenView:
    """The same view with nonsense in every padded place."""
    pad = ~view.valid

    def junk(x: Tensor, mask: Tensor) -> Tensor:
        noise = (torch.randn(x.shape, generator=rng, dtype=torch.float64) * HUGE).to(x.dtype)
        return torch.where(mask, noise, x)

    heads = pad[:, None, :, None]
    shape = view.valid.shape
    return replace(
        view,
        hidden=junk(view.hidden, pad[..., None]),
        protected=torch.where(pad, torch.rand(shape, generator=rng) < 0.5, view.protected),
        exempt=None if view.exempt is None else torch.where(pad, torch.rand(shape, generator=rng) < 0.5, view.exempt),
        position=torch.where(pad, torch.randint(0, 200, shape, generator=rng), view.position),
        size=torch.where(pad, torch.randint(0, 9, shape, generator=rng), view.size),
        evidence=replace(
            view.evidence,
            attention=tuple(
                replace(t, query=junk(t.query, heads), key=junk(t.key, heads), value=junk(t.value, heads))
                for t in view.evidence.attention
            ),
        ),
    )


def take(view: TokenView, rows: slice, tokens: slice) -> TokenView:
    """Some rows and some columns of a view; what is cut off must be padding."""
    return TokenView(
        hidden=view.hidden[rows, tokens],
        valid=view.valid[rows, tokens],
        protected=view.protected[rows, tokens],
        position=view.position[rows, tokens],
        size=view.size[rows, tokens],
        length=view.length[rows],
        exempt=None if view.exempt is None else view.exempt[rows, tokens],
        latest=view.latest,
        evidence=Evidence(
            attention=tuple(
                replace(t, query=t.query[rows, :, tokens], key=t.key[rows, :, tokens], value=t.value[rows, :, tokens])
                for t in view.evidence.attention
            )
        ),
    )


def alone(view: TokenView, row: int) -> TokenView:
    """One row without its padding."""
    where = view.valid[row].nonzero().flatten()
    return take(view, slice(row, row + 1), slice(int(where[0]), int(where[-1]) + 1))


def without_exempt(view: TokenView, row: int) -> TokenView:
    """One row as it would be if the tokens that are exempt had never been there."""
    where = view.counted[row].nonzero().flatten()
    return TokenView(
        hidden=view.hidden[row, where][None],
        protected=view.protected[row, where][None],
        position=view.position[row, where][None],
        size=view.size[row, where][None],
        length=view.counted_length[row : row + 1],
        evidence=Evidence(
            attention=tuple(
                replace(
                    t,
                    query=t.query[row, :, where][None],
                    key=t.key[row, :, where][None],
                    value=t.value[row, :, where][None],
                )
                for t in view.evidence.attention
            )
        ),
    )


def padded(view: TokenView, left: int, right: int, seed: int) -> TokenView:
    """The view with columns of nonsense added on either side."""

    def wide(x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        parts = [x.new_zeros([*shape[:dim], extra, *shape[dim + 1 :]]) for extra in (left, right)]
        return torch.cat([parts[0], x, parts[1]], dim)

    bigger = TokenView(
        hidden=wide(view.hidden, 1),
        valid=wide(view.valid, 1),
        protected=wide(view.protected, 1),
        exempt=None if view.exempt is None else wide(view.exempt, 1),
        latest=view.latest,
        position=wide(view.position, 1),
        size=wide(view.size, 1),
        length=view.length,
        evidence=Evidence(
            attention=tuple(
                replace(t, query=wide(t.query, 2), key=wide(t.key, 2), value=wide(t.value, 2))
                for t in view.evidence.attention
            )
        ),
    )
    return litter(bigger, generator(seed))


def random_plan(view: TokenView, rng: Random, drops: bool) -> MergePlan:
    draws = generator(rng.getrandbits(31))
    density = rng.choice((0.0, 0.2, 0.5, 0.9, 1.0))
    anchor = (torch.rand(view.valid.shape, generator=draws) < density) & view.valid
    first = view.valid.long().argmax(-1, keepdim=True)
    anchor |= torch.zeros_like(anchor).scatter(1, first, True)  # at least one slot in every row
    leader = torch.full(view.valid.shape, -1)
    for row, takes in enumerate(anchor & view.free):
        options = takes.nonzero().flatten()
        if len(options):
            leader[row] = options[torch.randint(len(options), (anchor.shape[1],), generator=draws)]
    if drops:
        leader[torch.rand(anchor.shape, generator=draws) < 0.2] = -1
    share = torch.rand(anchor.shape, generator=draws) + 0.05 if rng.random() < 0.7 else None
    return MergePlan.from_anchors(view, anchor, leader, share)


def plans(view: TokenView, drops: bool = True) -> st.SearchStrategy[MergePlan]:
    """A random lawful plan: any tokens kept, any others merged into any free kept token or dropped."""
    return seeds.map(lambda seed: random_plan(view, Random(seed), drops))


def after(view: TokenView, plan: MergePlan) -> TokenView:
    """The slots of a plan as the tokens of the next one."""
    return TokenView(
        hidden=plan.merge(view.hidden),
        valid=plan.valid,
        protected=plan.carry(view.protected),
        exempt=None if view.exempt is None else plan.carry(view.exempt),
        position=plan.position,
        size=plan.size,
        length=view.length,
    )


shares = st.floats(0.01, 1.0) | st.just(1.0)
counts = st.integers(1, 20) | st.integers(1, 45)
plain_budgets: st.SearchStrategy[float | Budget] = shares | shares.map(Ratio) | counts.map(Count)
saliency_budgets: st.SearchStrategy[float | Budget] = st.one_of(
    st.builds(Entropy, scale=st.floats(0.1, 3), low=st.floats(0.01, 0.3), high=st.floats(0.3, 1)),
    shares.map(Mass),
)


@dataclass(frozen=True)
class Row:
    """What a plan does to one row, told without its padding and alignment."""

    slot: list[int]
    weight: Tensor
    position: list[int]
    size: list[int]


def told(plan: MergePlan, view: TokenView, row: int) -> Row:
    """A row of a plan with slots counted from its first valid one."""
    there, used = view.valid[row], plan.valid[row]
    rank = used.long().cumsum(0) - 1
    slot = plan.slot[row][there]
    return Row(
        slot=torch.where(slot >= 0, rank[slot.clamp_min(0)], -1).tolist(),
        weight=plan.weight[row][there],
        position=plan.position[row][used].tolist(),
        size=plan.size[row][used].tolist(),
    )


def assert_same_row(got: Row, want: Row) -> None:
    assert got.slot == want.slot
    assert got.position == want.position
    assert got.size == want.size
    torch.testing.assert_close(got.weight, want.weight, rtol=1e-5, atol=1e-6)


def assert_same_plan(got: MergePlan, want: MergePlan) -> None:
    for name in ("slot", "weight", "position", "size", "valid"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def tolerance(dtype: torch.dtype) -> float:
    """A few units in the last place; never finer than the float32 in which a plan holds its shares."""
    return 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
