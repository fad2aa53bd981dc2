"""Clustering a little at a time: when the work is done changes nothing but that."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from math import ceil
from random import Random
from typing import Any

import pytest
import torch
from caches import held, past
from cluster_laws import same
from hosts_zoo import pad, tokens
from hypothesis import given
from hypothesis import strategies as st
from layer_samples import new
from run_samples import SMALL, check_clusters, model_of
from strategies import generator, prop, seeds

import quickmerge as qm
from quickmerge.multipole import Multipole, MultipoleLayer
from quickmerge.multipole.ahead import units_due
from quickmerge.multipole.upkeep import prepare, refresh


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 130))
@prop(60)
def test_everything_is_found_in_time_and_never_much_at_once(layers: int, units: int, interval: int) -> None:
    found = [[units_due(done, interval, units, place, layers) for place in range(layers)] for done in range(interval)]
    assert found[-1] == [units] * layers
    at_once = [sum(found[0]), *(sum(b) - sum(a) for a, b in pairwise(found))]
    assert min(at_once) >= 0 and max(at_once) <= ceil(layers * units / interval)


@given(seeds)
@prop(12)
def test_clusters_are_the_same_whenever_they_were_found(seed: int) -> None:
    """Prompts in pieces, tokens one by one and several at once, taken back, picked, moved and copied, in any order."""
    rng, draws = Random(seed), generator(seed)
    told = Multipole(
        ratio=0.25, sink=rng.randint(0, 4), interval=rng.randint(1, 7), block=rng.choice((8, 16, 400)),
        update_iterations=rng.randint(0, 3), coarse=rng.choice((None, 0.1)),
    )  # fmt: skip
    late, early = MultipoleLayer(), MultipoleLayer()
    layers = rng.randint(1, 4)
    early.place = (rng.randrange(layers), layers)
    pads, filled = [0, rng.randint(0, 9)], 0

    def size_of(n: int) -> Any:
        return (torch.arange(n) >= torch.tensor(pads)[:, None]).float()

    for _ in range(25):
        event = rng.choice(("token",) * 8 + ("few", "prompt", "crop", "beams", "slide", "copy"))
        n = late.get_seq_length()
        if event == "prompt" or n == 0:
            keys, values = new(len(pads), rng.randint(12, 30) if n == 0 else rng.randint(1, 20), draws)
            for layer in (late, early):
                layer.update(keys, values)
                layer.stale = True
            prepare(early, keys.shape[2], size_of(early.get_seq_length()), told, early.keys)
            assert early.clusters is late.clusters is None or early.clusters.end.tolist() == late.clusters.end.tolist()
        elif event in ("token", "few"):
            keys, values = new(len(pads), 1 if event == "token" else rng.randint(2, 9), draws)
            for layer, ahead in ((late, False), (early, True)):
                layer.update(keys, values)
                size = size_of(layer.get_seq_length())
                refresh(layer, keys.shape[2], size, replace(told, ahead=ahead), layer.keys)
            assert (late.clusters is None) == (early.clusters is None)
            if late.clusters is not None:
                same(*sorted((early.clusters, late.clusters), key=lambda each: each.width))
            if late.coarse is not None:
                same(*sorted((early.coarse, late.coarse), key=lambda each: each.width))
            filled = late.get_seq_length()
        elif event == "crop" and n - 20 > max(pads):
            taken = rng.choice((1, 2, 5, 18))
            late.crop(-taken), early.crop(-taken)
        elif event == "beams":
            index = torch.randint(len(pads), (len(pads),), generator=draws)
            late.reorder_cache(index), early.reorder_cache(index)
            pads = [pads[i] for i in index.tolist()]
        elif event == "slide" and early.clusters is not None and n == filled:
            by = [rng.randint(0, 2) for _ in pads]
            # What moves over the end is lost, so a token or two stand in its place before it is.
            for layer in (late, early):
                layer.update(*(x.new_zeros(len(pads), x.shape[1], 2, x.shape[3]) for x in (layer.keys, layer.values)))
                layer.slide(by)
                layer.crop(-2 + max(by))
            pads = [a + b for a, b in zip(pads, by, strict=True)]
        elif event == "copy":
            early = copy.deepcopy(early)
    if early.clusters is not None:
        check_clusters(early)
        assert early.ahead.worked > 0


def test_what_was_found_is_what_is_taken() -> None:
    """Nothing is clustered at the token that needs it, be it the first one or that of a group; and nothing twice."""
    told = Multipole(ratio=0.25, sink=2, interval=8, block=400)
    layer, draws = MultipoleLayer(), generator(0)
    asked: list[tuple[int, int, int, int]] = []

    def keys(rows: Any, first: Any, length: int, heads: slice) -> torch.Tensor:
        asked.extend((row, at, length, heads.start) for row, at in zip(rows, first, strict=True))
        return torch.stack([layer.keys[row, heads, at : at + length] for row, at in zip(rows, first, strict=True)])

    layer.update(*new(1, 60, draws))
    prepare(layer, 60, None, told, keys)
    assert layer.clusters is None and layer.ahead.take() > 0
    joined = 0
    for _ in range(60):
        layer.update(*new(1, 1, draws))
        before, made = layer.clusters, layer.ahead.made
        refresh(layer, 1, None, told, keys)
        if layer.clusters is not before:
            joined += 1
            assert made is not None and layer.clusters is made.clusters
        # A head of a block at a time, and for this layer alone each in its turn.
        assert layer.ahead.take() <= 1
    assert joined == 8 and len(asked) == len(set(asked))


def test_columns_that_were_taken_back_are_looked_at_again() -> None:
    told = Multipole(ratio=0.25, sink=0, interval=4, block=400)
    layers = [MultipoleLayer(), MultipoleLayer()]
    draws = generator(1)
    first, other = new(1, 24, draws), new(1, 30, draws)
    for layer, ahead in zip(layers, (True, False), strict=True):
        layer.update(*first)
        if ahead:
            prepare(layer, 24, None, told, layer.keys)
        layer.crop(-14)
        for i in range(30):
            layer.update(*(x[:, :, i : i + 1] for x in other))
            refresh(layer, 1, None, replace(told, ahead=ahead), layer.keys)
    same(layers[0].clusters, layers[1].clusters)


@pytest.mark.parametrize("settings", [{}, {"space": "windowed", "coarse": 0.1}, {"update": False}])
def test_a_model_writes_the_same_and_is_never_held_up(settings: dict[str, Any]) -> None:
    """A padded batch: what is clustered for one token are a few heads of a row, however many layers there are."""
    model = model_of(num_hidden_layers=6)
    ids, mask, _ = pad([tokens(1, n, n)[0] for n in (60, 37)], "left")
    kwargs = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 26, "pad_token_id": 0}
    told = {**SMALL, **settings}
    found, stats = [], []
    for ahead in (False, True):
        with qm.multipole(model, **told, ahead=ahead) as run:
            found.append(model.generate(ids, **kwargs, output_logits=True, return_dict_in_generate=True))
        stats.append(run.summary())
    assert torch.equal(torch.stack(found[0].logits), torch.stack(found[1].logits))
    late, early = stats
    assert late.most_at_once >= 6 and late.prompt_seconds == 0
    assert early.prompt_seconds > 0 and early.rows_read == late.rows_read and early.updates == late.updates
    # Two heads of six layers over eight tokens, twice that where two blocks are made of one; half of it for each row.
    assert early.most_at_once <= (ceil(6 * 4 / 8) / 2 if settings.get("update", True) else 0)


def test_a_prompt_in_pieces_is_clustered_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    ids = tokens(1, 97)
    wanted = []
    for sizes, ahead in (((96, 1), False), ((96, 1), True), ((40, 40, 16, 1), True), ((90, 6, 1), True)):
        with qm.multipole(model, **SMALL | {"queries": 4}, ahead=ahead), torch.no_grad():
            cache, parts = qm.MultipoleCache(model.config), ids.split(list(sizes), 1)
            for part in parts:
                logits = model(part, **past(cache)).logits
        wanted.append(logits)
        assert cache.layers[0].clusters is not None
    for other in wanted[1:]:
        torch.testing.assert_close(other, wanted[0], rtol=0, atol=1e-10)


def test_what_is_trained_on_is_not_clustered() -> None:
    model = model_of()
    with qm.multipole(model, **SMALL) as run:
        out = model(tokens(1, 60))
        assert run.summary().prompt_seconds == 0
        out.logits.sum().backward()
        with torch.no_grad():
            assert held(model(tokens(1, 60))).layers[0].ahead.made is not None
