from __future__ import annotations

import torch

from quickmerge.multipole.positions import Sizes

KEY = torch.zeros(2, 3, 5, 4)
SEEN = torch.tensor([[True, True, True, True, True], [False, False, True, True, True]])


def masks(seen: torch.Tensor) -> list[torch.Tensor]:
    """The same as sdpa and as eager attention are given it, for two queries."""
    causal = torch.tensor([[True, True, True, True, False], [True] * 5])
    both = (seen[:, None] & causal)[:, None]
    return [both, torch.zeros(both.shape).masked_fill(~both, torch.finfo(torch.float32).min)]


def test_what_the_newest_token_sees_is_what_there_is() -> None:
    for mask in masks(SEEN):
        found = Sizes().of(mask, None, KEY)
        assert found.dtype == torch.float32 and torch.equal(found, SEEN.float())


def test_without_padding_there_is_nothing_to_say() -> None:
    assert Sizes().of(None, None, KEY) is None
    for mask in masks(torch.ones_like(SEEN)):
        assert Sizes().of(mask, None, KEY) is None
        assert Sizes().of(mask[:1], None, KEY) is None


def test_slots_count_as_their_tokens_where_there_is_one() -> None:
    size = torch.tensor([[3, 1, 2, 1, 1], [0, 4, 1, 1, 1]])
    assert Sizes().of(None, size, KEY).tolist() == [[3, 1, 2, 1, 1], [1, 4, 1, 1, 1]]
    for mask in masks(SEEN):
        assert Sizes().of(mask, size, KEY).tolist() == [[3, 1, 2, 1, 1], [0, 0, 1, 1, 1]]


def test_a_mask_is_looked_at_once_and_masks_are_not_mixed_up() -> None:
    sizes = Sizes()
    for i in range(50):
        seen = SEEN.clone()
        seen[0, : i % 4] = False
        mask = masks(seen)[i % 2]
        first = sizes.of(mask, None, KEY)
        assert torch.equal(first, seen.float())
        assert torch.equal(sizes.of(mask, None, KEY), first)
        del mask
