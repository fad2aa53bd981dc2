"""The cache after steps equals that of the same texts read afresh."""

from __future__ import annotations

from random import Random

import pytest
import torch
from caches import past
from decoding_samples import FAMILIES, prompts, random_shape, read_rows, tiny
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds
from torch import Tensor
from transformers import DynamicCache

from quickmerge.speculative import Tree
from quickmerge.speculative.target import Columns, Target, compact, lay_out
from quickmerge.speculative.tree import pack


def afresh(model: object, text: list[int]) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([text]), **past(cache), use_cache=True)  # type: ignore[operator]
    return cache


def assert_holds(target: Target, texts: list[list[int]], pads: list[int]) -> None:
    """Every row holds its text: each token once, with the keys and values of reading the text alone."""
    columns = target.columns
    assert columns.holes == (not bool(columns.valid.all()))
    for row, (text, left) in enumerate(zip(texts, pads, strict=True)):
        where = columns.valid[row].nonzero()[:, 0]
        where = where[columns.place[row, where].argsort()]
        assert columns.place[row, where].tolist() == list(range(left, left + len(text)))
        assert int(columns.length[row]) == left + len(text)
        assert int(columns.offset[row]) == -left
        for mine, wanted in zip(target.cache.layers, afresh(target.model, text).layers, strict=True):
            assert mine.keys.shape[2] == columns.width
            assert torch.allclose(mine.keys[row][:, where], wanted.keys[0], atol=1e-10)
            assert torch.allclose(mine.values[row][:, where], wanted.values[0], atol=1e-10)


def random_path(tree: Tree, rng: Random) -> list[int]:
    path = [0]
    while children := [node for node in range(1, len(tree)) if tree.parent[node] == path[-1]]:
        if rng.random() < 0.3:
            break
        path.append(rng.choice(children))
    return path


@pytest.mark.parametrize("family", FAMILIES)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), steps=st.integers(1, 9), seed=seeds)
@prop(3)
def test_commits_compactions_and_leaving_rows(family: str, lengths: list[int], steps: int, seed: int) -> None:
    rng, inputs = Random(seed), prompts(lengths, seed)
    target = read_rows(tiny(family), inputs)
    texts = [row[keep].tolist() for row, keep in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)]
    pads = [max(lengths) - n for n in lengths]
    for _ in range(steps):
        trees = []
        for _ in texts:
            size = rng.randint(1, 6)
            trees.append(Tree([rng.randrange(97) for _ in range(size)], random_shape(size, rng), [1.0] * size))
        paths = [random_path(tree, rng) if rng.random() < 0.9 else [] for tree in trees]
        with torch.no_grad():
            target.read(pack(trees))
        target.commit(paths)
        for text, tree, path in zip(texts, trees, paths, strict=True):
            text.extend(tree.tokens[node] for node in path)
        assert_holds(target, texts, pads)
        if len(texts) > 1 and rng.random() < 0.2:
            stay = sorted(rng.sample(range(len(texts)), len(texts) - 1))
            target.select(torch.tensor(stay))
            texts, pads = [texts[i] for i in stay], [pads[i] for i in stay]
            assert_holds(target, texts, pads)
    width = max(len(text) + left for text, left in zip(texts, pads, strict=True)) + rng.randint(0, 2)
    target.columns = lay_out(target.cache, target.columns, width)
    assert target.columns.width == width
    for row, left in enumerate(pads):
        assert target.columns.valid[row].tolist() == [left <= j < left + len(texts[row]) for j in range(width)]
    assert_holds(target, texts, pads)


def made_up(valid: list[list[bool]]) -> tuple[DynamicCache, Columns]:
    """A cache whose keys say where they stood."""
    there = torch.tensor(valid)
    rows, n = there.shape
    keys = torch.arange(rows * n, dtype=torch.float32).view(rows, 1, n, 1)
    cache = DynamicCache()
    cache.update(keys, keys + 0.5, 0)
    place = there.long().cumsum(1) - 1
    return cache, Columns(there, place, there.sum(1), torch.zeros(rows, dtype=torch.long), not bool(there.all()))


def test_few_holes_are_left_alone_and_many_are_closed() -> None:
    few = [[True] * 9 + [False] * 2, [True] * 5 + [False] + [True] * 3 + [False] * 2]
    cache, columns = made_up(few)
    assert compact(cache, columns) is columns
    many = [[True, False] * 5, [False, True, False, True, True] + [False] * 5]
    cache, columns = made_up(many)
    after = compact(cache, columns)
    assert after.width == 5
    assert after.holes
    assert cache.layers[0].keys[0, 0, :, 0].tolist() == [0, 2, 4, 6, 8]
    assert cache.layers[0].values[1, 0, :3, 0].tolist() == [11.5, 13.5, 14.5]
    assert after.valid.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert after.place[1, :3].tolist() == [0, 1, 2]


def test_the_text_before_the_trees_is_not_moved() -> None:
    target = read_rows(tiny(), prompts([7]))
    before: list[Tensor] = []
    with torch.no_grad():
        target.read(pack([Tree([1, 2, 3, 4], [0, 0, 0, 2], [1.0] * 4)]))
    before = [layer.keys for layer in target.cache.layers]
    target.commit([[0, 2, 3]])
    for old, layer in zip(before, target.cache.layers, strict=True):
        assert layer.keys.shape[2] == 10
        assert layer.keys.data_ptr() == old.data_ptr()
