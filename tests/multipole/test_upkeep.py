from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from layer_samples import SETTINGS, filled, new
from run_samples import check_clusters
from strategies import generator, prop, seeds

from quickmerge.multipole import Multipole, MultipoleLayer
from quickmerge.multipole.upkeep import refresh


@given(seeds)
@prop(25)
def test_how_many_are_clustered_depends_on_the_length_alone(seed: int) -> None:
    """Tokens one by one, several at once, taken back: sink, groups, and a buffer of one group up to two."""
    rng, draws = Random(seed), generator(seed)
    told = Multipole(
        ratio=0.25, sink=rng.randint(0, 4), interval=rng.randint(1, 6), block=rng.choice((8, 16, 400)),
        update_iterations=rng.randint(0, 3), coarse=rng.choice((None, 0.1)),
    )  # fmt: skip
    pad = [0, rng.randint(0, 9)]
    layer = MultipoleLayer()
    layer.update(*new(2, rng.randint(10, 40), draws))
    for _ in range(12):
        taken = rng.choice((0, 0, 0, 2, 15))
        # No row is padding alone: its sink would lie behind all columns.
        if taken < layer.get_seq_length() - pad[1]:
            layer.crop(-taken)
        q = rng.randint(1, 5)
        layer.update(*new(2, q, draws))
        n = layer.get_seq_length()
        size = (torch.arange(n) >= torch.tensor(pad)[:, None]).float()
        before = layer.clusters
        refresh(layer, q, size, told, layer.keys)
        ends = []
        for first in pad:
            past, start = n - q, first + told.sink
            ends.append(start + max(0, (past - start) // told.interval - 1) * told.interval)
        if all(end == first + told.sink for end, first in zip(ends, pad, strict=True)) and before is None:
            assert layer.clusters is None and layer.coarse is None
            continue
        assert layer.clusters is not None and not layer.stale
        # What was taken back within the buffer is not missed: clusters never shrink by themselves.
        held = [0, 0] if before is None else before.end.tolist()
        assert layer.clusters.end.tolist() == [max(a, b) for a, b in zip(ends, held, strict=True)]
        assert (
            layer.facts.start == [first + told.sink for first in pad] and layer.facts.end == layer.clusters.end.tolist()
        )
        check_clusters(layer)
        assert (layer.coarse is None) == (told.coarse is None)
        if told.coarse is not None:
            assert torch.equal(layer.coarse.count.sum(-1), layer.clusters.count.sum(-1))
    if layer.clusters is not None:
        check_clusters(layer)


@pytest.mark.parametrize(
    "change",
    [
        {"budget": 3},
        {"select": "top_p"},
        {"replacement": False},
        {"query_position": 9},
        {"update": False},
        {"first": 1},
    ],
)
def test_settings_of_reading_keep_the_clusters(change: dict[str, Any]) -> None:
    layer = filled(60)
    before = layer.clusters
    refresh(layer, 1, None, replace(SETTINGS, **change), layer.keys)
    assert layer.clusters is before


@pytest.mark.parametrize(
    "change",
    [{"ratio": 0.5}, {"sink": 3}, {"interval": 5}, {"block": 8}, {"iterations": 1}, {"seed": 1}, {"variance": True}],
)
def test_settings_of_clustering_make_them_anew(change: dict[str, Any]) -> None:
    layer = filled(60)
    before = layer.clusters
    refresh(layer, 1, None, replace(SETTINGS, **change), layer.keys)
    assert layer.clusters is not before and (layer.clusters.spread is None) == ("variance" not in change)
    check_clusters(layer)


def test_coarse_clusters_are_made_and_dropped_as_asked() -> None:
    layer = filled(60)
    fine = layer.clusters.labels
    refresh(layer, 1, None, replace(SETTINGS, coarse=0.1), layer.keys)
    assert layer.coarse is not None and torch.equal(layer.clusters.labels, fine)
    refresh(layer, 1, None, SETTINGS, layer.keys)
    assert layer.coarse is None


def test_a_row_that_is_shorter_than_the_sink_waits() -> None:
    layer = MultipoleLayer()
    draws = generator(0)
    layer.update(*new(2, 40, draws))
    size = torch.ones(2, 40)
    size[1, :39] = 0
    refresh(layer, 1, size, SETTINGS, layer.keys)
    assert layer.clusters.end.tolist()[0] == 34 and layer.clusters.members[1].sum() == 0
    layer.update(*new(2, 20, draws))
    refresh(layer, 1, torch.cat([size, torch.ones(2, 20)], 1), SETTINGS, layer.keys)
    # Its first token stands in column 39, the sink ends at 41, and 18 more have come.
    assert layer.clusters.end.tolist() == [54, 53] and int(layer.clusters.members[1].sum()) == 12 * 2
    check_clusters(layer)


def test_the_keys_of_closed_blocks_are_not_asked_for_again() -> None:
    asked: list[int] = []
    layer = MultipoleLayer()
    draws = generator(0)
    layer.update(*new(1, 100, draws))

    def keys(rows: Any, first: Any, length: int, heads: slice) -> torch.Tensor:
        asked.extend(first)
        return torch.stack([layer.keys[row, heads, at : at + length] for row, at in zip(rows, first, strict=True)])

    refresh(layer, 1, None, SETTINGS, keys)
    closed = layer.facts.start[0] + layer.clusters.blocks[0][-1].first
    assert min(asked) == 2 and len(layer.clusters.blocks[0]) > 3
    asked.clear()
    layer.update(*new(1, 4, draws))
    refresh(layer, 4, None, SETTINGS, keys)
    layer.update(*new(1, 4, draws))
    refresh(layer, 4, None, SETTINGS, keys)
    assert asked and min(asked) >= closed
