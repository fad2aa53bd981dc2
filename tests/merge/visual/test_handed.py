"""What a language model is handed for each token goes with the token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quickmerge.errors import UnsupportedModelError
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.view import TokenView
from quickmerge.merge.visual.handed import (
    both_ways,
    further_arguments,
    lowest_block,
    shorter_arguments,
    shorter_masks,
)

N, WINDOW = 9, 3
KEPT = torch.tensor([[0, 2, 3, 6, 7, 8], [1, 4, 5, 8, 0, 0]])
VALID = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


def seen(picture: list[int]) -> Tensor:
    """Causal order, but the tokens of a picture see one another: ``(2, 1, N, N)``."""
    marks = torch.zeros(N, dtype=torch.bool)
    marks[picture] = True
    return (torch.ones(N, N).tril().bool() | (marks[:, None] & marks[None]))[None, None].expand(2, 1, N, N)


@pytest.mark.parametrize("additive", [False, True])
def test_what_stays_sees_what_it_saw_and_windows_count_what_stays(additive: bool) -> None:
    full, picture = seen([2, 3, 4, 5, 6]), [2, 3, 4, 5, 6]
    near = (torch.arange(N)[:, None] - torch.arange(N)[None] < WINDOW)[None, None]
    marks = torch.zeros(N, dtype=torch.bool)
    marks[picture] = True
    sliding = (full & near) | (marks[:, None] & marks[None])
    masks: Any = {"full_attention": full, "sliding_attention": sliding}
    low = torch.finfo(torch.float32).min
    if additive:
        masks = {kind: torch.zeros(mask.shape).masked_fill(~mask, low) for kind, mask in masks.items()}
    assert both_ways(masks)
    made = shorter_masks("It", masks, KEPT, VALID, {"full_attention": None, "sliding_attention": WINDOW})
    for kind, mask in made.items():
        assert (mask.dtype == torch.float32) is additive
        mask = mask == 0 if additive else mask
        for row in range(2):
            for i, a in enumerate(KEPT[row].tolist()):
                for j, b in enumerate(KEPT[row].tolist()):
                    wanted = bool(full[0, 0, a, b]) and bool(VALID[row, j])
                    if kind == "sliding_attention":
                        wanted &= i - j < WINDOW or (a in picture and b in picture)
                    if not VALID[row, i]:
                        continue  # padding is read by nobody
                    assert bool(mask[row, 0, i, j]) == (wanted or i == j), (kind, row, i, j)
        assert bool(mask.any(-1).all()), "a line of the softmax is empty"


def test_masks_of_windows_alone_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="It is given masks of windows alone"):
        shorter_masks("It", {"sliding_attention": seen([1, 2])}, KEPT, VALID, {"sliding_attention": WINDOW})


def test_plain_order_is_not_both_ways() -> None:
    assert not both_ways(torch.ones(1, 1, 4, 4).tril().bool())
    assert not both_ways({"full_attention": None})
    # New tokens behind a cache: what they see of one another.
    assert not both_ways(torch.ones(1, 1, 2, 6).tril(4).bool())
    assert both_ways(torch.ones(1, 1, 2, 6).bool())


def test_arguments_go_with_their_tokens() -> None:
    torch.manual_seed(0)
    view = TokenView(torch.randn(2, N, 4, dtype=torch.float64))
    anchor = torch.ones(2, N, dtype=torch.bool)
    anchor[0, [3, 4]] = anchor[1, 6] = False
    leader = torch.full((2, N), -1)
    leader[0, 3] = 2
    plan = MergePlan.from_anchors(view, anchor, leader)
    index = torch.arange(N).expand(2, N)
    seat = torch.zeros(2, plan.slots + 1, dtype=torch.long).scatter(
        1, torch.where(anchor, plan.slot, plan.slots), index
    )[:, : plan.slots]
    visual = (index > 0) & (index < 7)
    low = [torch.randn(int(visual.sum()), 3, dtype=torch.float64) for _ in range(2)]
    inputs = {
        "inputs_embeds": view.hidden, "kinds": index * 10, "each": torch.randn(2, N, 2, 3), "marks": visual,
        "low": low, "flag": True, "nothing": None,
    }  # fmt: skip
    made = shorter_arguments("It", inputs, plan, seat)
    assert set(made) == {"kinds", "each", "marks", "low"}
    there = plan.valid
    assert torch.equal(made["kinds"][there], (seat * 10)[there])
    assert torch.equal(made["each"][there], inputs["each"].gather(1, seat[..., None, None].expand(-1, -1, 2, 3))[there])
    assert int(made["marks"].sum()) == int(visual.sum()) - 3 == len(made["low"][0])
    # The slot of the two that were merged has their mean.
    both = low[0][1:3].mean(0)
    torch.testing.assert_close(made["low"][0][1], both)
    assert further_arguments(inputs) == ["kinds", "each"]
    assert lowest_block(inputs) == 2 and lowest_block({**inputs, "low": {0: low[0], 3: low[1]}}) == 4
    for name, odd in (("low", [low[0][1:]]), ("odd", torch.ones(5, 5))):
        with pytest.raises(UnsupportedModelError, match=f"It hands its language model {name} beside the embeddings"):
            shorter_arguments("It", {**inputs, name: odd}, plan, seat)
