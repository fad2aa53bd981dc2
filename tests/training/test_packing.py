"""The mask and the positions of packed items, against loops over pairs."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds
from torch import Tensor

from quickmerge.training.packing import additive, packed_mask, packed_positions


def sequences(batch: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups, image tokens and valid tokens of random rows, with padding anywhere and items of any length."""
    rng = Random(seed)
    group = torch.zeros(batch, tokens, dtype=torch.long)
    image = torch.zeros_like(group, dtype=torch.bool)
    valid = torch.zeros_like(image)
    for row in range(batch):
        prefix, at = rng.randint(1, tokens), 0
        for i in range(tokens):
            if i >= prefix and (at == 0 or rng.random() < 0.4):
                at += 1
            group[row, i] = at
            image[row, i] = i < prefix and rng.random() < 0.5
            valid[row, i] = rng.random() < 0.8
    return group, image, valid


@given(batch=st.integers(1, 3), tokens=st.integers(1, 12), seed=seeds, independent=st.booleans(), both=st.booleans())
@prop(60)
def test_a_pair_is_visible_as_the_formula_says(
    batch: int, tokens: int, seed: int, independent: bool, both: bool
) -> None:
    group, image, valid = sequences(batch, tokens, seed)
    mask = packed_mask(group, image, valid, independent=independent, bidirectional=both)
    assert mask.shape == (batch, 1, tokens, tokens) and mask.dtype == torch.bool
    for b in range(batch):
        g, v, x = group[b].tolist(), image[b].tolist(), valid[b].tolist()
        for i in range(tokens):
            for j in range(tokens):
                sees = j <= i and (g[j] == 0 or g[j] == g[i] or not independent)
                sees = sees or (both and v[i] and v[j])
                assert bool(mask[b, 0, i, j]) == ((sees and x[i] and x[j]) or i == j)


@given(batch=st.integers(1, 3), tokens=st.integers(1, 12), seed=seeds)
@prop(60)
def test_items_start_right_behind_the_prefix(batch: int, tokens: int, seed: int) -> None:
    group, _, valid = sequences(batch, tokens, seed)
    position = packed_positions(group, valid)
    for b in range(batch):
        counted: dict[int, int] = {}
        prefix = sum(1 for g, v in zip(group[b].tolist(), valid[b].tolist(), strict=True) if v and g == 0)
        for i in range(tokens):
            g = int(group[b, i])
            if not valid[b, i]:
                assert int(position[b, i]) == 0
                continue
            assert int(position[b, i]) == counted.get(g, 0) + (prefix if g else 0)
            counted[g] = counted.get(g, 0) + 1


@given(tokens=st.integers(1, 12), seed=seeds, more=st.integers(1, 4))
@prop(30)
def test_padding_changes_nothing(tokens: int, seed: int, more: int) -> None:
    group, image, _ = sequences(2, tokens, seed)
    padded = [torch.cat([x, x[:, :1].expand(-1, more)], 1) for x in (group, image)]
    valid = torch.arange(tokens + more).expand(2, -1) < tokens
    assert torch.equal(packed_mask(*padded, valid)[..., :tokens, :tokens], packed_mask(group, image))
    assert torch.equal(packed_positions(padded[0], valid)[:, :tokens], packed_positions(group))
    # padding is seen by nothing but itself, and sees nothing else: a softmax over its row is still one over something
    assert not bool(packed_mask(*padded, valid)[..., :tokens, tokens:].any())
    assert torch.equal(packed_mask(*padded, valid)[0, 0, tokens:, tokens:], torch.eye(more, dtype=torch.bool))


def test_a_toy_sequence_is_masked_as_the_paper_draws_it() -> None:
    # v v IMG are | a1 a, | b,
    group = torch.tensor([[0, 0, 0, 0, 1, 1, 2]])
    image = torch.tensor([[True, True, False, False, False, False, False]])
    drawn = ["xx.....", "xx.....", "xxx....", "xxxx...", "xxxxx..", "xxxxxx.", "xxxx..x"]
    wanted = torch.tensor([[c == "x" for c in row] for row in drawn])
    assert torch.equal(packed_mask(group, image)[0, 0], wanted)
    assert packed_positions(group).tolist() == [[0, 1, 2, 3, 4, 5, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_additive_hides_entirely_and_adds_nothing_elsewhere(dtype: torch.dtype) -> None:
    mask = torch.tensor([[True, False], [True, True]])
    added = additive(mask, dtype)
    assert added.dtype == dtype and bool((added[mask] == 0).all())
    assert (torch.full((2, 2), 50.0, dtype=dtype) + added).softmax(-1)[0].tolist() == [1.0, 0.0]


def test_shapes_that_do_not_agree_are_told() -> None:
    group = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"group must be \(batch, tokens\), got shape \(3,\)"):
        packed_positions(group[0])
    with pytest.raises(ValueError, match=r"image must have shape \(2, 3\), got \(2, 2\)"):
        packed_mask(group, group[:, :2] > 0)
    with pytest.raises(ValueError, match=r"valid must have shape \(2, 3\), got \(1, 3\)"):
        packed_positions(group, group[:1] > 0)
