"""Columns of a cache are moved as a slow loop over rows would move them, in layers of every kind."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds
from torch import Tensor
from transformers import DynamicCache

from quickmerge.models import columns
from quickmerge.models.compat import DynamicLayer, DynamicSlidingWindowLayer
from quickmerge.multipole import Multipole, MultipoleLayer, cluster

HEADS, WIDTH = 2, 4


def filled(kind: Any, rows: int, lengths: list[int], seed: int) -> tuple[DynamicCache, list[Tensor]]:
    """A cache of layers of different lengths, and what each of them holds."""
    torch.manual_seed(seed)
    cache, held = DynamicCache(), []
    for length in lengths:
        layer, x = kind(), torch.randn(rows, HEADS, length, WIDTH)
        layer.update(x.clone(), -x)
        cache.layers.append(layer)
        held.append(x)
    cache.layers.append(kind())  # nothing has been read into it
    return cache, held


def same(cache: DynamicCache, wanted: list[Tensor]) -> None:
    for layer, x in zip(cache.layers, wanted, strict=False):
        assert torch.equal(layer.keys, x) and torch.equal(layer.values, -x)
    assert not cache.layers[-1].is_initialized


@pytest.mark.parametrize("kind", [DynamicLayer, MultipoleLayer])
@given(rows=st.integers(1, 3), tail=st.integers(0, 6), count=st.integers(0, 8), seed=seeds, holes=st.booleans())
@prop(20)
def test_the_tail_becomes_what_is_picked_of_it(
    kind: Any, rows: int, tail: int, count: int, seed: int, holes: bool
) -> None:
    rng = Random(seed)
    cache, held = filled(kind, rows, [tail + rng.randrange(5) for _ in range(3)], seed)
    count = count if tail else 0
    index = torch.tensor([[rng.randrange(tail) for _ in range(count)] for _ in range(rows)]).view(rows, count).long()
    there = torch.tensor([[rng.random() < 0.6 for _ in range(count)] for _ in range(rows)]).view(rows, count)
    columns.take_tail(cache, tail, index, there if holes else None)
    wanted = []
    for x in held:
        front = x.shape[2] - tail
        picked = torch.stack([x[row, :, front:][:, index[row]] for row in range(rows)])
        picked = picked * there[:, None, :, None] if holes else picked
        wanted.append(torch.cat([x[:, :, :front], picked], 2))
    same(cache, wanted)


@pytest.mark.parametrize("kind", [DynamicLayer, MultipoleLayer])
@given(by=st.lists(st.integers(-4, 4), min_size=1, max_size=3), seed=seeds)
@prop(20)
def test_rows_slide_and_come_back(kind: Any, by: list[int], seed: int) -> None:
    cache, held = filled(kind, len(by), [9, 6], seed)
    columns.slide(cache, by)
    for layer, x in zip(cache.layers, held, strict=False):
        assert layer.keys.shape == x.shape
        for row, step in enumerate(by):
            kept = slice(step, None) if step >= 0 else slice(None, step)
            was = slice(None, x.shape[2] - step) if step >= 0 else slice(-step, None)
            assert torch.equal(layer.keys[row, :, kept], x[row, :, was])
            assert torch.equal(layer.values[row, :, kept], -x[row, :, was])
    table = torch.arange(len(by) * 9).view(len(by), 9)
    slid = columns.slide_table(table, by, -1)
    for row, step in enumerate(by):
        wanted = [int(table[row, i - step]) if 0 <= i - step < 9 else -1 for i in range(9)]
        assert slid[row].tolist() == wanted


def test_clusters_slide_with_their_columns() -> None:
    layer, settings = MultipoleLayer(), Multipole(ratio=0.25, interval=4, sink=1)
    x = torch.randn(2, HEADS, 20, WIDTH)
    layer.update(x, -x)
    layer.reading = settings
    layer.clusters = cluster(x, -x, None, torch.tensor([1, 1]), torch.tensor([13, 13]), settings)
    layer.note_positions(torch.arange(20).expand(2, -1))
    # Of 19 tokens behind the sink the next one makes another group; of 16 it is the fourth.
    assert layer.clusters is not None and layer.room() == [0, 0]
    columns.slide(_cache(layer), [3, 0])
    assert layer.clusters.start.tolist() == [4, 1] and layer.clusters.end.tolist() == [16, 13]
    assert layer.room() == [3, 0]
    assert layer.position is not None and layer.position[0, 3:].tolist() == list(range(17))
    start = int(layer.clusters.start[0])
    for head in range(HEADS):
        for i in range(len(layer.clusters)):
            first, size = int(layer.clusters.offset[0, head, i]), int(layer.clusters.members[0, head, i])
            own = layer.clusters.order[0, head, first : first + size].long() + start
            if size:
                torch.testing.assert_close(layer.keys[0, head, own].mean(0), layer.clusters.key[0, head, i])


def _cache(*layers: Any) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = list(layers)
    return cache


def test_what_moves_columns_is_told_from_what_does_not() -> None:
    assert columns.keeps_columns(DynamicLayer()) and columns.keeps_columns(MultipoleLayer())
    assert not columns.keeps_columns(DynamicSlidingWindowLayer(sliding_window=4))
    assert columns.is_tight(_cache(DynamicLayer(), MultipoleLayer())) and not columns.is_tight(_cache(DynamicLayer()))
    assert columns.room(_cache(DynamicLayer())) is None is columns.widest(_cache(DynamicLayer()))
    assert columns.seats(_cache(DynamicLayer())) is None is columns.places_read()
    with columns.reading(torch.tensor([[3]])):
        told = columns.places_read()
        assert told is not None and told.tolist() == [[3]]
    assert columns.places_read() is None
