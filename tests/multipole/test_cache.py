from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
import torch
from caches import past
from hosts_zoo import build
from hypothesis import given
from layer_samples import D, filled, new
from run_samples import check_clusters
from strategies import generator, prop, seeds
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quickmerge.errors import QuickmergeError
from quickmerge.multipole import Multipole, MultipoleCache, MultipoleLayer
from quickmerge.multipole.upkeep import refresh


@given(seeds)
@prop(60)
def test_whatever_is_done_to_it_it_holds_what_a_dynamic_layer_holds(seed: int) -> None:
    """Appending in every mode of autograd, cropping, beams, repeating, picking, resetting and copying in any order."""
    rng, draws = Random(seed), generator(seed)
    dtype = rng.choice((torch.float32, torch.float64, torch.bfloat16))
    plain: Any = DynamicLayer()
    layer: Any = MultipoleLayer()
    rows = rng.randint(1, 3)
    for _ in range(14):
        length = plain.get_seq_length()
        action = rng.choice(("append",) * 6 + ("crop", "beams", "repeat", "pick", "mask", "copy", "reset"))
        if action == "append":
            if length == 0:
                rows = rng.randint(1, 3)
            keys, values = new(rows, rng.choice((1, 1, 2, 7, 300)), draws, dtype)
            mode = rng.choice((torch.inference_mode, torch.no_grad, torch.enable_grad))
            keys.requires_grad_(rng.random() < 0.2)
            with mode():
                wanted = plain.update(keys, values)
                found = layer.update(keys, values)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        elif action == "crop" and length:
            taken = rng.randint(0, min(length - 1, 9))
            plain.crop(-taken)
            layer.crop(-taken)
        elif action == "beams":
            index = torch.tensor([rng.randrange(rows) for _ in range(rows)])
            plain.reorder_cache(index)
            layer.reorder_cache(index)
        elif action == "repeat" and length and rows < 3:
            plain.batch_repeat_interleave(2)
            layer.batch_repeat_interleave(2)
            rows *= 2
        elif action in ("pick", "mask") and length:
            index = torch.tensor(sorted(rng.sample(range(rows), rng.randint(1, rows))))
            chosen = index if action == "pick" else torch.zeros(rows, dtype=torch.bool).index_fill(0, index, True)
            plain.batch_select_indices(chosen)
            layer.batch_select_indices(chosen)
            rows = len(index)
        elif action == "copy" and not (length and (plain.keys.requires_grad or plain.values.requires_grad)):
            plain, layer = copy.deepcopy(plain), copy.deepcopy(layer)
        elif action == "reset":
            plain.reset()
            layer.reset()
        assert layer.get_seq_length() == plain.get_seq_length()
        assert layer.get_mask_sizes(3) == plain.get_mask_sizes(3)
        if plain.get_seq_length():
            assert torch.equal(layer.keys, plain.keys) and torch.equal(layer.values, plain.values)
            assert layer.keys.dtype == plain.keys.dtype


def test_the_past_is_not_copied_for_a_new_token() -> None:
    layer = MultipoleLayer()
    draws = generator(0)
    layer.update(*new(2, 1000, draws))
    places, copies = set(), 0
    for _ in range(2000):
        layer.update(*new(2, 1, draws))
        copies += layer.keys.data_ptr() not in places
        places.add(layer.keys.data_ptr())
        assert layer.keys.shape[2] * 1.3 > layer.keys.stride(1) / D - 300
    assert layer.get_seq_length() == 3000
    # 256, and later an eighth of what there is, at a time.
    assert copies <= 9
    before = layer.keys
    layer.crop(-3)
    assert layer.keys.data_ptr() == before.data_ptr()
    layer.update(*new(2, 1, draws))
    assert layer.keys.data_ptr() == before.data_ptr()
    layer.reorder_cache(torch.tensor([1, 0]))
    place = layer.keys.data_ptr()
    layer.update(*new(2, 1, draws))
    assert layer.keys.data_ptr() == place
    assert layer.bytes >= layer.keys.numel() * 4 + layer.values.numel() * 4


def test_two_copies_go_their_own_ways() -> None:
    layer = filled(40)
    other = copy.deepcopy(layer)
    draws = generator(1)
    layer.update(*new(2, 2, draws))
    other.update(*new(2, 2, draws))
    assert torch.equal(layer.keys[:, :, :40], other.keys[:, :, :40])
    assert not torch.equal(layer.keys[:, :, 40:], other.keys[:, :, 40:])
    check_clusters(layer)
    check_clusters(other)


def test_clusters_follow_their_rows() -> None:
    layer = filled(60, rows=3)
    check_clusters(layer)
    labels = layer.clusters.labels
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(layer.clusters.labels, labels[[2, 2, 0]])
    check_clusters(layer)
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.clusters.labels, labels[[2, 2, 2, 2, 0, 0]])
    check_clusters(layer)
    layer.batch_select_indices(torch.tensor([5, 1]))
    assert torch.equal(layer.clusters.labels, labels[[0, 2]])
    check_clusters(layer)
    layer.reset()
    assert layer.clusters is None and layer.get_seq_length() == 0


def test_cropping_keeps_the_blocks_before_and_what_it_does_not_touch() -> None:
    layer = filled(60)
    before, first = layer.clusters, layer.facts
    assert first.end == [58 - 4 - (58 - 2) % 4] * 2
    layer.stale = False
    layer.crop(-3)
    assert layer.clusters is before and layer.facts is first and not layer.stale
    layer.crop(-30)
    assert layer.get_seq_length() == 27
    # One block of 16 lies before column 27; the next one began there and is open again.
    assert [[b.length for b in row] for row in layer.clusters.blocks] == [[16], [16]] and layer.stale
    check_clusters(layer)
    layer.crop(-20)
    assert layer.clusters is None and layer.stale


def test_coarse_clusters_go_with_the_fine_ones() -> None:
    settings = Multipole(ratio=0.5, coarse=0.2, sink=2, interval=4, block=16)
    layer = filled(60, rows=2, settings=settings)
    key = layer.coarse.key
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.coarse.key, key[[1, 1]]) and layer.facts.upper == [3 + 3 + 4] * 2
    layer.crop(-30)
    assert layer.coarse is None
    refresh(layer, 1, None, settings, layer.keys)
    assert layer.coarse is not None and layer.coarse.count.sum(-1).unique().tolist() == [layer.clusters.width]


def test_positions_are_cut_and_picked_with_the_keys() -> None:
    layer = MultipoleLayer()
    draws = generator(0)
    layer.update(*new(2, 5, draws))
    layer.note_positions(torch.tensor([[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]))
    layer.update(*new(2, 2, draws))
    layer.note_positions(torch.tensor([[7, 8]]))
    layer.crop(-1)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.position.tolist() == [[0, 1, 2, 3, 4, 7], [0, 0, 1, 2, 3, 7]]
    layer.reset()
    layer.update(*new(2, 3, draws))
    with pytest.raises(QuickmergeError, match="nobody noted positions, which space='windowed' needs"):
        layer.update(*new(2, 1, draws))
        layer.note_positions(torch.tensor([[3]]))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_a_cache_has_our_layers_where_attention_is_full(family: str) -> None:
    config = build(family).config
    ours, theirs = MultipoleCache(config), DynamicCache(config=config)
    for own, other in zip(ours.layers, theirs.layers, strict=True):
        assert type(own) is (MultipoleLayer if type(other) is DynamicLayer else DynamicSlidingWindowLayer)
    assert ours.is_croppable and not ours.is_compileable and ours.is_sliding == theirs.is_sliding


def test_outside_a_run_it_is_a_plain_cache() -> None:
    from hosts_zoo import generate, tokens

    model = build("llama", dtype=torch.float64)
    ids = tokens(2, 30)
    wanted = generate(model, ids, 12)
    found = generate(model, ids, 12, **past(MultipoleCache(model.config)))
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
