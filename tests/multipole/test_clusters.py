"""Clusters from given labels, and what can be done with them."""

from __future__ import annotations

import torch
from cluster_laws import check, same
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds, up_to
from torch import Tensor

from quickmerge.multipole.clusters import Block, Clusters, join, summarise


def labelled(
    batch: int, heads: int, clusters: int, seed: int, sized: bool, dtype: torch.dtype
) -> tuple[Clusters, Tensor, Tensor, Tensor | None]:
    draws = generator(seed)
    length = torch.randint(0, 30, (batch,), generator=draws)
    length[int(torch.randint(batch, (1,), generator=draws))] += 1
    start = torch.randint(0, 6, (batch,), generator=draws)
    total, widest = int((start + length).max()) + 3, int(length.max())
    keys = torch.randn(batch, heads, total, 5, generator=draws).to(dtype)
    values = torch.randn(batch, heads, total, 3, generator=draws).to(dtype)
    labels = torch.randint(clusters, (batch, heads, widest), generator=draws)
    labels = torch.where(torch.arange(widest) < length[:, None, None], labels, -1)
    size = torch.randint(0, 4, (batch, total), generator=draws) if sized else None
    if size is not None:  # what counts for nothing may hold anything
        keys = torch.where(size[:, None, :, None] > 0, keys, torch.inf)
        values = torch.where(size[:, None, :, None] > 0, values, torch.nan)
    return Clusters.from_labels(keys, values, labels, start, clusters, size, spread=True), keys, values, size


@prop(40)
@given(
    batch=up_to(3), heads=up_to(3), clusters=up_to(8), seed=seeds, sized=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_everything_follows_from_the_labels(
    batch: int, heads: int, clusters: int, seed: int, sized: bool, dtype: torch.dtype
) -> None:
    got, keys, values, size = labelled(batch, heads, clusters, seed, sized, dtype)
    check(got, keys, values, size)


@prop(20)
@given(batch=up_to(3), seed=seeds, sized=st.booleans())
def test_rows_can_be_picked_and_repeated(batch: int, seed: int, sized: bool) -> None:
    got, keys, values, size = labelled(batch, 2, 4, seed, sized, torch.float32)
    index = torch.randint(batch, (5,), generator=generator(seed))
    picked = got.select_rows(index)
    check(picked, keys[index], values[index], None if size is None else size[index]) if picked.width else None
    for place, row in enumerate(index.tolist()):
        one = got.select_rows(torch.tensor([row]))
        for name in ("labels", "key", "value", "members", "count", "order", "offset", "spread"):
            assert torch.equal(getattr(picked, name)[place], getattr(got, name)[row])
        assert picked.blocks[place] == got.blocks[row] == one.blocks[0]
    assert picked.bytes * batch == got.bytes * 5


def blocks_of(lengths: list[int], per_block: int) -> list[Block]:
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [Block(first, n, i * per_block, per_block) for i, (first, n) in enumerate(zip(firsts, lengths, strict=True))]


def several_blocks(lengths: list[list[int]], start: list[int], seed: int) -> tuple[Clusters, Tensor, Tensor]:
    draws = generator(seed)
    total = max(first + sum(own) for first, own in zip(start, lengths, strict=True))
    keys, values = (torch.randn(len(lengths), 2, total, d, generator=draws) for d in (4, 3))
    blocks, pieces = [blocks_of(own, 3) for own in lengths], []
    for row, own in enumerate(blocks):
        for block in own:
            here = slice(start[row] + block.first, start[row] + block.first + block.length)
            labels = torch.randint(3, (1, 2, block.length), generator=draws)
            k, v = keys[row, None, :, here], values[row, None, :, here]
            pieces.append((row, block, summarise(k, v, None, labels, 3, spread=True)))
    return join(torch.tensor(start), blocks, pieces), keys, values


def test_blocks_are_put_side_by_side_and_rows_filled_up() -> None:
    got, keys, values = several_blocks([[7, 5, 9], [4], []], [0, 3, 2], 0)
    check(got, keys, values, None)
    assert len(got) == 9 and got.width == 21 and got.end.tolist() == [21, 7, 2]


def test_cropping_keeps_whole_blocks() -> None:
    got, keys, values = several_blocks([[7, 5, 9], [4]], [0, 3], 1)
    assert got.crop(21) is got and got.crop(50) is got
    for columns, left in ((20, [[7, 5], [4]]), (12, [[7, 5], [4]]), (11, [[7], [4]]), (7, [[7], [4]]), (6, None)):
        cut = got.crop(columns)
        if left is None:
            assert cut is None
            continue
        assert cut is not None
        check(cut, keys[:, :, :columns], values[:, :, :columns], None)
        assert [[b.length for b in row] for row in cut.blocks] == left
        want, _, _ = several_blocks([[7, 5, 9], [4]], [0, 3], 1)
        for row in range(2):
            n, c = int(cut.end[row] - cut.start[row]), sum(b.clusters for b in cut.blocks[row])
            assert torch.equal(cut.labels[row, :, :n], want.labels[row, :, :n])
            assert torch.equal(cut.key[row, :, :c], want.key[row, :, :c])
    one = got.crop(6)
    assert one is None
    same(got, several_blocks([[7, 5, 9], [4]], [0, 3], 1)[0])  # and what was cropped is as it was


def test_a_row_that_loses_everything_stands_beside_others() -> None:
    got, keys, values = several_blocks([[7, 5], [4]], [0, 6], 2)
    cut = got.crop(9)
    assert cut is not None and cut.end.tolist() == [7, 6] and cut.blocks[1] == []
    check(cut, keys, values, None)
    assert (cut.labels[1] == -1).all() and (cut.count[1] == 0).all() and (cut.members[1] == 0).all()


def test_identical_members_have_themselves_as_centroid() -> None:
    """To the last bit, also in half precision and with any sizes."""
    draws = generator(0)
    for dtype in (torch.float32, torch.bfloat16):
        label = torch.randint(6, (1, 2, 70), generator=draws)
        kinds = (torch.randn(2, 6, 4, generator=draws) * 3).to(dtype)
        keys = kinds.gather(1, label[0, :, :, None].expand(-1, -1, 4))[None]
        size = torch.randint(1, 5, (1, 70), generator=draws)
        got = Clusters.from_labels(keys, keys, label, torch.tensor([0]), 6, size, spread=True)
        torch.testing.assert_close(got.key[0], kinds, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
        assert got.spread is not None and got.spread.max() < 1e-10


def test_no_gradient_is_kept() -> None:
    keys = torch.randn(1, 1, 8, 3, requires_grad=True)
    got = Clusters.from_labels(keys, keys, torch.zeros(1, 1, 8).long(), torch.tensor([0]), 1)
    assert not got.key.requires_grad and not got.value.requires_grad
