"""Draft trees, the best of them, and how a batch of them is laid out."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest
import torch
from decoding_samples import random_shape
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds

from quickmerge.speculative import Tree, best_first
from quickmerge.speculative.tree import Children, pack


def distribution(rng: Random, width: int) -> tuple[list[int], list[float]]:
    weights = sorted((rng.random() for _ in range(width)), reverse=True)
    total = sum(weights) + rng.random()
    return rng.sample(range(50), width), [w / total for w in weights]


def every_node(ranked: dict[tuple[int, ...], Children], depth: int) -> dict[tuple[int, ...], float]:
    """Path probability of every node below the root, named by its ranks."""
    out: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(depth):
        for path in list(out):
            for rank, chance in enumerate(ranked.get(path, ((), ()))[1]):
                out[(*path, rank)] = out[path] * chance
    del out[()]
    return out


@given(shape=st.sampled_from([(1, 4), (2, 3), (3, 2)]), nodes=st.integers(1, 6), parallel=st.booleans(), seed=seeds)
@prop(60)
def test_the_best_tree_is_the_best_of_all_connected_ones(
    shape: tuple[int, int], nodes: int, parallel: bool, seed: int
) -> None:
    (width, depth), rng = shape, Random(seed)
    levels = [distribution(rng, width) for _ in range(depth)]
    ranked: dict[tuple[int, ...], Children] = {}
    paths: list[tuple[int, ...]] = [()]
    for level in range(depth):
        for path in paths:
            ranked[path] = levels[level] if parallel else distribution(rng, width)
        paths = [(*path, rank) for path in paths for rank in range(width)]
    tree = best_first(77, lambda path: ranked.get(path, ([], [])), nodes)
    every = every_node(ranked, depth)
    best = max(
        sum(every[path] for path in some)
        for some in combinations(every, min(nodes - 1, len(every)))
        if all(path[:-1] in some or len(path) == 1 for path in some)
    )
    assert len(tree) == min(nodes, len(every) + 1)
    assert sum(tree.prob) - 1 == pytest.approx(best)
    # Every node is the child of its parent, with its probability.
    names: list[tuple[int, ...]] = [()]
    for node in range(1, len(tree)):
        above = names[tree.parent[node]]
        tokens, chances = ranked[above]
        rank = tokens.index(tree.tokens[node])
        names.append((*above, rank))
        assert tree.prob[node] == pytest.approx(tree.prob[tree.parent[node]] * chances[rank])
    assert len(set(names)) == len(names)
    assert tree.tokens[0] == 77
    assert tree.depth == [len(name) for name in names]
    assert tree.prob == sorted(tree.prob, reverse=True)


@given(nodes=st.integers(1, 20), left=st.integers(1, 20), seed=seeds)
@prop(40)
def test_the_first_nodes_are_the_best_tree_of_so_many(nodes: int, left: int, seed: int) -> None:
    rng = Random(seed)
    heads = [distribution(rng, 4) for _ in range(4)]

    def ranked(path: tuple[int, ...]) -> Children:
        return heads[len(path)] if len(path) < 4 else ([], [])

    tree, smaller = best_first(0, ranked, max(nodes, left)), best_first(0, ranked, min(nodes, left))
    assert tree.best(min(nodes, left)) == smaller
    assert len(smaller) == min(nodes, left)


@given(nodes=st.integers(1, 20), left=st.integers(0, 20), depth=st.integers(0, 6), seed=seeds)
@prop(60)
def test_parts_of_a_tree_are_connected_and_the_best(nodes: int, left: int, depth: int, seed: int) -> None:
    rng = Random(seed)
    parent = random_shape(nodes, rng)
    prob = [1.0]
    for above in parent[1:]:
        prob.append(prob[above] * rng.choice([0.3, 0.5, 1.0]))
    tree = Tree(list(range(nodes)), parent, prob)
    some = tree.best(left)
    assert len(some) == min(max(1, left), nodes)
    assert sum(some.prob) == pytest.approx(sum(sorted(prob, reverse=True)[: len(some)]))
    shallow = tree.cut(depth)
    assert shallow.tokens == [node for node in range(nodes) if tree.depth[node] <= depth]
    for part in (some, shallow):
        for node, token in enumerate(part.tokens):  # tokens name the nodes they were
            assert part.tokens[part.parent[node]] == tree.parent[token]
            assert (part.prob[node], part.depth[node]) == (tree.prob[token], tree.depth[token])


def test_a_chain_is_a_tree() -> None:
    tree = Tree.chain([4, 5, 6], [1.0, 0.5, 0.2])
    assert (tree.parent, tree.depth, tree.prob) == ([0, 0, 1], [0, 1, 2], [1.0, 0.5, 0.2])
    assert tree.children() == [{5: 1}, {6: 2}, {}]
    assert tree == best_first(4, lambda path: [([5], [0.5]), ([6], [0.4]), ([], [])][len(path)], 9)


def test_the_walk_goes_to_the_earlier_of_two_equal_siblings_and_along_extra_pairs() -> None:
    tree = Tree([0, 1, 1, 2, 3], [0, 0, 0, 0, 1], [1.0, 0.5, 0.4, 0.3, 0.2], extra=((2, 4), (3, 4)))
    assert tree.children() == [{1: 1, 2: 3}, {3: 4}, {3: 4}, {3: 4}, {}]
    assert tree.best(4).extra == ()
    assert Tree([0, 9, 1], [0, 0, 0], [1, 0.1, 0.2], extra=((0, 2), (1, 2))).best(2).extra == ((0, 1),)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=seeds)
@prop(40)
def test_a_node_sees_itself_and_its_ancestors(sizes: list[int], seed: int) -> None:
    rng = Random(seed)
    trees = [Tree([rng.randrange(9) for _ in range(size)], random_shape(size, rng), [1.0] * size) for size in sizes]
    packed = pack(trees)
    wide = max(sizes)
    assert packed.see.shape == (len(sizes), wide, wide)
    for row, tree in enumerate(trees):
        assert packed.tokens[row].tolist() == tree.tokens + [0] * (wide - len(tree))
        assert packed.depth[row].tolist() == tree.depth + [0] * (wide - len(tree))
        assert packed.parent[row].tolist() == tree.parent + [0] * (wide - len(tree))
        assert packed.valid[row].tolist() == [node < len(tree) for node in range(wide)]
        for node in range(wide):
            seen, at = {node}, node
            while node < len(tree) and at:
                at = tree.parent[at]
                seen.add(at)
            assert set(packed.see[row, node].nonzero()[:, 0].tolist()) == seen
    assert packed.see.dtype == torch.bool


def test_extra_pairs_are_seen() -> None:
    plain, more = (Tree([0, 1, 2], [0, 0, 0], [1.0] * 3, extra=extra) for extra in ((), ((1, 2),)))
    found = (pack([more]).see ^ pack([plain]).see)[0].nonzero().tolist()
    assert found == [[1, 2]]


def test_what_is_no_tree_is_told() -> None:
    for arguments, message in [
        (([], [], []), "equally many, at least 1"),
        (([1, 2], [0], [1.0, 1.0]), "got 2, 1 and 2"),
        (([1], [1], [1.0]), r"parent\[0\] must be 0"),
        (([1, 2], [0, 1], [1.0, 1.0]), r"parent\[1\] must be a node before it, got 1"),
        (([1, 2, 3], [0, 0, 1], [1.0, 0.5, 0.6]), r"prob\[2\] must be at most 0.5, its parent's, got 0.6"),
        (([1, 2], [0, 0], [1.0, float("nan")]), r"prob\[1\] must be at most"),
        (([1, 2], [0, 0], [1.0, 1.0], ((0, 2),)), "extra must name nodes below 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            Tree(*arguments)
    with pytest.raises(ValueError, match="nodes must be a whole number of at least 1, got 0"):
        best_first(0, lambda path: ([], []), 0)
    with pytest.raises(ValueError, match=r"falling order, got 0\.2, 0\.3"):
        best_first(0, lambda path: ([1, 2], [0.2, 0.3]), 9)
