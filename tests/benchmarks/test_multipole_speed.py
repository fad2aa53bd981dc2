"""The benchmarks of what multipole attention costs: the same attention is timed, and whole results are written."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import multipole_generate
import multipole_speed as script
import multipole_tables as tables
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import quickmerge as qm
from quickmerge.multipole.attend import attend
from quickmerge.multipole.clustering import bounds, cluster

ARGS = Namespace(batch=2, device="cpu", dtype="float32", rounds=2, updates=2, prefill=600, budget=32)
SHAPE = script.Shape(6, 2, 16)


def test_what_is_timed_is_the_same_attention() -> None:
    query, keys, values = script.drawn(SHAPE, 600, ARGS)
    assert query.shape == (2, 6, 1, 16) and keys.shape == values.shape == (2, 2, 600, 16)
    z = torch.einsum("bhgd,bhnd->bhgn", query.double().view(2, 2, 3, 16), keys.double()) / 4
    wanted = torch.einsum("bhgn,bhnd->bhgd", z.softmax(-1), values.double()).reshape(2, 6, 1, 16)
    for way in script.DENSE.values():
        assert torch.allclose(way(query, keys, values, 0.25).double(), wanted, atol=1e-5)
    settings = qm.Multipole(budget=600)
    clusters = cluster(keys, values, None, *bounds(torch.zeros(2, dtype=torch.long), 599, settings), settings)
    own = attend(query, keys, values, None, clusters, settings, scaling=0.25)
    assert torch.allclose(own.transpose(1, 2).double(), wanted, atol=1e-5)


def test_a_length_is_measured_with_all_that_belongs_to_it() -> None:
    row = script.measure(SHAPE, 600, ARGS)
    settings = qm.Multipole(budget=32)
    clustered = 3 * 128  # of 589 behind the sink, with at least 128 in the buffer
    assert abs(row["clusters"] - clustered / 16) <= 1 and 0 < row["rows_chosen"] <= 32
    near = 600 - clustered
    assert near >= settings.sink + settings.interval
    size = 2 * 2 * 16 * 4
    assert row["dense_bytes"] == 2 * 600 * size
    assert row["multipole_bytes"] == pytest.approx(2 * (row["clusters"] + row["rows_chosen"] + near) * size)
    assert row["allowed_by_bytes"] == pytest.approx(row["dense_bytes"] / row["multipole_bytes"])
    dense, own = row["seconds"][row["fastest"]][1], row["seconds"]["multipole"][1]
    assert row["of_allowed"] == pytest.approx(dense / own / row["allowed_by_bytes"])
    assert all(row["seconds"][row["fastest"]][1] <= row["seconds"][name][1] for name in script.DENSE)
    assert row["update_seconds_per_step"] == pytest.approx(row["update_seconds"] / 128)
    assert row["speedup_with_updates"] < row["speedup"] and row["prefill_seconds"] > 0


def test_ratios_and_what_is_paid() -> None:
    found = script.ratios([4.0, 6.0, 8.0], [2.0, 2.0, 2.0], 2.0)
    assert (found["speedup"], found["speedup_with_updates"]) == (3, 1.5)
    assert script.paid(6.0, 5.0, 2.0) == 2 and script.paid(6.0, 2.0, 2.0) is None


def test_the_script_writes_its_tables(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(script.SHAPES, "small", SHAPE)
    monkeypatch.setattr(script, "bandwidth", lambda device: 1e10)
    out = tmp_path / "speed.json"
    given = ["--tokens", "500", "700", "--shapes", "small", "--rounds", "2", "--updates", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["multipole_speed.py", *given])
    assert script.main() == 0
    found = json.loads(out.read_text())
    assert [row["tokens"] for row in found["rows"]] == [500, 700] and found["environment"]["threads"]
    for make in (tables.step, tables.prompt):
        table = make(found["rows"])
        assert len(table.body) == 2 and table.body
    monkeypatch.setattr(sys, "argv", ["multipole_speed.py", "--rounds", "1"])
    with pytest.raises(SystemExit):
        script.main()


def test_bandwidth_is_bytes_over_seconds(monkeypatch) -> None:
    monkeypatch.setattr(script, "BLOCK", 1 << 16)
    assert 1e7 < script.bandwidth("cpu") < 1e13


def test_every_turn_of_generation_is_the_same(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    ids = torch.randint(2, 50, (1, 420), generator=torch.Generator().manual_seed(1))
    ways = multipole_generate.ways_of(model, ids, 10**6)
    multipole_generate.turn(model, ways[-1], ids, 1, note=False)
    clusters = [layer.clusters for layer in ways[-1].cache.layers]
    said = [multipole_generate.turn(model, way, ids, 128, note=True).tolist() for _ in range(2) for way in ways]
    assert all(one == said[0] for one in said) and len(said[0]) == 128
    assert [way.cache.get_seq_length() for way in ways] == [419] * 3
    assert all(layer.clusters is old for layer, old in zip(ways[-1].cache.layers, clusters, strict=True))
    assert all(seconds > 0 for seconds in ways[-1].update)  # one update in each turn
    assert all(0 < a < s for way in ways for a, s in zip(way.attention, way.seconds, strict=True))
    for name in ("code", "prose"):
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "test" / name / "a.txt").write_text(" ".join(f"w{i}" for i in ids[0].tolist() * 2))

    def load(name: str) -> tuple[Any, Any]:
        return model, lambda text, **options: {"input_ids": [int(word[1:]) for word in text.split()]}

    monkeypatch.setattr(multipole_generate.qm, "load", load)
    out = tmp_path / "generate.json"
    given = ["--documents", str(tmp_path), "--tokens", "420", "--new", "20", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["multipole_generate.py", *given])
    assert multipole_generate.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "dense, cache in place", "multipole"]
    assert rows[0]["speedup"] == rows[1]["speedup_in_place"] == 1
    assert rows[1]["same_tokens"] == 1 and rows[2]["cluster_bytes"] > 0 and rows[2]["clustering_seconds"] > 0
    assert tables.generate(rows).body


def test_the_pages_have_every_table() -> None:
    results = Path(__file__).parents[2] / "docs" / "results"
    page = "".join(found.read_text(encoding="utf-8") for found in results.glob("multipole*.md"))
    assert all(f"<!-- table:{name} -->" in page for name in tables.MULTIPOLE)
