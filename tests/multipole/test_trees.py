"""Draft trees read by clusters: a node sees what it would see if its own path were the text."""

from __future__ import annotations

from random import Random

import torch
from attend_samples import random_case
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds
from torch import Tensor

from quickmerge.multipole.attend import attend
from quickmerge.multipole.positions import Sizes


def random_tree(nodes: int, rng: Random) -> list[list[int]]:
    """For each node the way to it, itself included."""
    paths = [[0]]
    for node in range(1, nodes):
        paths.append([*paths[rng.randrange(node)], node])
    return paths


def seen(trees: list[list[list[int]]]) -> Tensor:
    """``(B, T, T)`` bool."""
    see = torch.zeros(len(trees), len(trees[0]), len(trees[0]), dtype=torch.bool)
    for row, paths in enumerate(trees):
        for node, path in enumerate(paths):
            see[row, node, path] = True
    return see


@given(seeds, st.sampled_from((0, 3, 1000)))
@prop(40)
def test_a_node_reads_what_its_path_alone_would(seed: int, budget: int) -> None:
    case, rng = random_case(seed), Random(seed)
    rows, new, n = len(case.query), case.query.shape[2], case.keys.shape[2]
    trees = [random_tree(new, rng) for _ in range(rows)]
    kwargs = {"scaling": case.scaling}
    settings = type(case.settings)(**{**vars(case.settings), "budget": budget})
    found = attend(case.query, case.keys, case.values, case.size, case.clusters, settings, see=seen(trees), **kwargs)
    for row, paths in enumerate(trees):
        for node, path in enumerate(paths):
            columns = [*range(n - new), *(n - new + i for i in path)]
            alone = attend(
                case.query[:, :, node : node + 1], case.keys[:, :, columns], case.values[:, :, columns],
                None if case.size is None else case.size[:, columns], case.clusters, settings, **kwargs,
            )  # fmt: skip
            torch.testing.assert_close(found[row, node], alone[row, 0], rtol=1e-10, atol=1e-10)


def test_a_chain_is_what_nobody_needs_to_say() -> None:
    case = random_case(5)
    new = case.query.shape[2]
    chain = seen([[list(range(node + 1)) for node in range(new)]])
    given_ = (case.query, case.keys, case.values, case.size, case.clusters, case.settings)
    torch.testing.assert_close(attend(*given_, see=chain, scaling=case.scaling), attend(*given_, scaling=case.scaling))


def test_sizes_in_front_of_a_tree_are_told_by_its_root() -> None:
    """The last node is no newest token: it may be padding, and sees no sibling."""
    see = torch.tensor([[[True, False, False], [True, True, False], [False, False, True]]])
    text = torch.tensor([[False, True, True, True]])
    mask = torch.cat([text.expand(3, -1)[None], see], -1)[:, None]
    key = torch.zeros(1, 2, 7, 4)
    for form in (mask, torch.zeros(()).where(mask, torch.finfo(torch.float32).min)):
        sizes = Sizes()
        assert torch.equal(sizes.behind(form, 3), see)
        found = sizes.of(form, None, key)
        assert found is not None and found.tolist() == [[0, 1, 1, 1, 1, 1, 1]] and sizes.first(form, key) == [1]
        grown = sizes.of(form, torch.tensor([[9, 2, 1, 1, 1, 1, 1]]), key)
        assert grown is not None and grown.tolist() == [[0, 2, 1, 1, 1, 1, 1]]
