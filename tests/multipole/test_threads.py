"""Threads that share one run of multipole attention, with a cache each."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from caches import held
from hosts_zoo import generate, tokens
from run_samples import SMALL, clustered, model_of, read
from torch import Tensor
from transformers import DynamicCache

import quickmerge as qm

THREADS, ROUNDS = 3, 3


@pytest.mark.parametrize("more", [{}, {"space": "windowed"}], ids=["rotated", "windowed"])
@torch.no_grad()
def test_threads_do_not_read_one_another_s_caches(more: dict[str, Any]) -> None:
    model = model_of(num_hidden_layers=2)
    texts = [tokens(1 + i % 2, 50 + 5 * i, i) for i in range(THREADS)]

    def work(i: int) -> list[Tensor]:
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            prompt = read(model, texts[i][:, :40], cache, 40)
            after = read(model, texts[i][:, 40:], cache, 1 + i)
            written = generate(model, texts[i], 3)
        return [prompt, after, written.sequences, *written.logits]

    found: dict[int, list[list[Tensor]]] = {i: [] for i in range(THREADS)}
    failed: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def loop(i: int) -> None:
        try:
            start.wait()
            for _ in range(ROUNDS):
                found[i].append(work(i))
                str(run.summary())
        except BaseException as error:
            failed.append(error)

    with qm.multipole(model, **SMALL | more) as run:
        wanted = [work(i) for i in range(THREADS)]
        threads = [threading.Thread(target=loop, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed, failed
    for i, rounds in found.items():
        assert len(rounds) == ROUNDS
        for result in rounds:
            assert all(torch.equal(a, b) for a, b in zip(result, wanted[i], strict=True)), i
    assert run.summary().decode_steps > 0


@torch.no_grad()
def test_copies_of_a_cache_go_their_own_ways_and_outside_it_is_a_plain_one() -> None:
    model = model_of()
    ids, one, two = tokens(2, 90), tokens(2, 20, 1), tokens(2, 20, 2)
    cache = qm.MultipoleCache(model.config)
    with qm.multipole(model, **SMALL):
        read(model, ids, cache, 60)
        assert len(clustered(cache)) == 4
        twin = copy.deepcopy(cache)
        ways = read(model, one, cache), read(model, two, twin)
        fresh = copy.deepcopy(held(model(ids)))
        assert not clustered(fresh)
    with qm.multipole(model, **SMALL):
        for more, wanted in ((one, ways[0]), (two, ways[1])):
            again = qm.MultipoleCache(model.config)
            read(model, ids, again, 60)
            torch.testing.assert_close(read(model, more, again), wanted, rtol=0, atol=1e-10)
    after = tokens(2, 3, 5)
    plain = model(torch.cat([ids, one, after], 1)).logits[:, -3:]
    near = read(model, after, cache)
    assert near.isfinite().all() and near.shape == plain.shape
    whole = qm.MultipoleCache(model.config)
    read(model, torch.cat([ids, one], 1), whole, 200)
    torch.testing.assert_close(read(model, after, whole), plain, rtol=0, atol=1e-10)
