"""The mask of a tree, entry by entry."""

from __future__ import annotations

from random import Random

import pytest
import torch
from decoding_samples import random_shape
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds

from quickmerge.speculative import Tree
from quickmerge.speculative.tree import masks_by_window, pack, tree_mask


@given(
    rows=st.integers(1, 3), columns=st.integers(1, 9), nodes=st.integers(1, 7), window=st.integers(1, 9) | st.none(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), seed=seeds,
)  # fmt: skip
@prop(60)
def test_every_entry_is_what_the_rule_says(
    rows: int, columns: int, nodes: int, window: int | None, dtype: torch.dtype, seed: int
) -> None:
    rng = Random(seed)
    trees = []
    for _ in range(rows):
        size = rng.randint(1, nodes)
        trees.append(Tree([0] * size, random_shape(size, rng), [1.0] * size))
    packed = pack(trees)
    valid = torch.tensor([[rng.random() < 0.7 for _ in range(columns)] for _ in range(rows)])
    place = torch.tensor([rng.sample(range(20), columns) for _ in range(rows)])
    length = torch.tensor([rng.randint(20, 25) for _ in range(rows)])
    mask = tree_mask(valid, place, length, packed, dtype, window)
    wide = packed.tokens.shape[1]
    assert mask.shape == (rows, 1, wide, columns + wide)
    assert mask.dtype == dtype
    for row, tree in enumerate(trees):
        for node in range(len(tree)):
            own = int(length[row]) + tree.depth[node]
            above, at = {node}, node
            while at:
                at = tree.parent[at]
                above.add(at)
            for column in range(columns + wide):
                other = column - columns
                if column < columns:
                    seen, there = bool(valid[row, column]), int(place[row, column])
                else:
                    seen = other in above
                    there = int(length[row]) + (tree.depth[other] if other < len(tree) else 0)
                seen &= window is None or own - there < window
                assert float(mask[row, 0, node, column]) == (0.0 if seen else torch.finfo(dtype).min)


@pytest.mark.parametrize("kind", ["full", "same window", "mixed", "long windows"])
def test_blocks_that_see_equally_far_share_one_mask(kind: str) -> None:
    windows: dict[str, int | None] = {
        "full": {"full_attention": None},
        "same window": {"full_attention": 3},
        "mixed": {"sliding_attention": 3, "full_attention": None},
        "long windows": {"sliding_attention": 9, "full_attention": None},
    }[kind]
    packed = pack([Tree.chain([1, 2, 3])])
    place = torch.arange(5)[None]
    table = (place >= 0, place, torch.tensor([5]), packed, torch.float32)
    found = masks_by_window(windows, *table, longest=8)
    if kind == "mixed":
        assert isinstance(found, dict)
        assert torch.equal(found["full_attention"], tree_mask(*table))
        assert torch.equal(found["sliding_attention"], tree_mask(*table, window=3))
    else:
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, tree_mask(*table, window=3 if kind == "same window" else None))
