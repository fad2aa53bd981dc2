"""From what length clusters pay, and rows that are too short for them."""

from __future__ import annotations

from dataclasses import replace

import torch
from hosts_zoo import generate, pad, tokens
from hypothesis import given
from hypothesis import strategies as st
from layer_samples import SETTINGS, new
from run_samples import SMALL, model_of
from strategies import generator, prop

import quickmerge as qm
from quickmerge.multipole import Multipole, MultipoleLayer
from quickmerge.multipole.cost import pays_from, rows_read
from quickmerge.multipole.upkeep import refresh


@given(st.integers(1, 16), st.sampled_from((16, 64, 128)), st.sampled_from((2, 4)), st.integers(0, 1024))
@prop(60)
def test_clusters_pay_where_they_save_more_than_they_cost(heads: int, width: int, size: int, budget: int) -> None:
    told = Multipole(budget=budget)
    found = pays_from(told, heads, width, size)
    if found is None:
        return
    # There they read less, at any length beyond still less, and a bigger block pays no later.
    assert rows_read(told, found) < found
    more = pays_from(told, 2 * heads, width, size)
    assert more is not None and more <= found
    assert pays_from(replace(told, min_tokens=found + 5), heads, width, size) == found + 5


def test_a_tiny_block_never_pays() -> None:
    assert pays_from(Multipole(), 1, 2, 2) is None


def test_every_row_is_clustered_when_it_has_its_tokens() -> None:
    told = replace(SETTINGS, min_tokens=30)
    for ahead in (False, True):
        layer, draws = MultipoleLayer(), generator(0)
        layer.update(*new(2, 25, draws))
        for n in range(26, 70):
            layer.update(*new(2, 1, draws))
            size = (torch.arange(n) >= torch.tensor([0, 17])[:, None]).float()
            refresh(layer, 1, size, replace(told, ahead=ahead), layer.keys)
            ends = [] if layer.clusters is None else (layer.clusters.end - layer.clusters.start).tolist()
            wanted = [0 if n - 1 - pad < 30 else ((n - 1 - pad - 2) // 4 - 1) * 4 for pad in (0, 17)]
            assert (ends or [0, 0]) == wanted


def test_a_row_that_is_too_short_is_the_models_own_and_the_summary_says_so() -> None:
    model = model_of()
    ids, mask, _ = pad([tokens(1, n, n)[0] for n in (60, 37)], "left")
    wanted = generate(model, ids, 6, attention_mask=mask)
    with qm.multipole(model, **SMALL, min_tokens=90) as run:
        found = generate(model, ids, 6, attention_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, wanted.logits, strict=True))
    assert "fewer than min_tokens=90, all of them read exactly" in str(run.summary())
    assert run.summary().rows_read == run.summary().rows_dense
    with qm.multipole(model, **SMALL, min_tokens=50) as run:
        generate(model, ids, 6, attention_mask=mask)
    assert run.summary().clustered > 0 and run.summary().rows_read < run.summary().rows_dense
