"""How costs grow: exponents are those of powers, prompts are the text's, and a turn finds what is there."""

from __future__ import annotations

from copy import deepcopy
from random import Random

import curve_tables
import curves
import pytest
import torch
from decoding_samples import tiny
from hypothesis import given
from strategies import prop, seeds


@prop(30)
@given(seeds)
def test_the_exponent_of_a_power(seed: int) -> None:
    rng = Random(seed)
    power, scale = rng.uniform(-1, 3), rng.uniform(0.01, 9)
    lengths = sorted(rng.sample(range(100, 9000), rng.randint(2, 6)))
    rows = [{"tokens": n, "prefill_seconds": scale * n**power} for n in lengths]
    assert curves.slope(rows, "prefill_seconds") == pytest.approx(power, abs=1e-6)


def test_prompts_are_stretches_of_the_text() -> None:
    text = torch.arange(100)
    made = curves.prompt(text, 40, 3)
    assert made.shape == (3, 40) and made[:, 0].tolist() == [0, 20, 40]
    assert all(torch.equal(row, text[int(row[0]) : int(row[0]) + 40]) for row in made)


def test_a_turn_finds_what_is_there() -> None:
    model = deepcopy(tiny()).float()
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 97, (2, 400), generator=torch.Generator().manual_seed(0))
    found = {way.name: curves.turn(model, ids, 5, way) for way in curves.ways(model, "llama-8b", 0.4)}
    plain, merged, both = found["plain"], found["merge"], found["merge, Multipole"]
    each = model.config.num_key_value_heads * model.config.head_dim * 4 * 2 * 2 * 2
    assert plain.cache == (400 + 4) * each and plain.read == plain.passes == 1
    assert merged.cache < plain.cache and both.cache == merged.cache
    assert min(one.prefill for one in found.values()) > 0 and min(one.step for one in found.values()) > 0


def test_tables_hold_every_row() -> None:
    row = {
        "shape": "smollm2", "tokens": 1024, "batch": 1, "way": "merge", "prefill_seconds": 1.5, "prefill_allowed": 2.0,
        "prefill_speedup": 1.9, "prefill_speedup_low": 1.8, "prefill_speedup_high": 2.0, "step_seconds": 0.02,
        "step_speedup": 1.1, "step_speedup_low": 1.0, "step_speedup_high": 1.2, "step_allowed": 1.3,
        "cache_bytes": 3 << 20, "peak_bytes": 9 << 20,
    }  # fmt: skip
    other = row | {"batch": 4, "shape": "llama-8b"}
    text = curve_tables.curves({"rows": [row, other]}, "smollm2", False).markdown()
    assert "1.90x (1.80 to 2.00)" in text and "20.0 ms" in text and "3.0 MiB" in text
    assert "llama-8b" in curve_tables.curves({"rows": [row, other]}, None, True).markdown()
    assert "peak" in text
    del row["peak_bytes"]
    assert "peak" not in curve_tables.curves({"rows": [row]}, "smollm2", False).markdown()
