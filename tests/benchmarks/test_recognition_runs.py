"""The recognition benchmark on tiny recognisers: pooling, one run from training to scores, and going on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import recognizer_tokens
import torch
from recognition import variants
from recognition_runs import (
    TIMED,
    Variant,
    finish,
    finished,
    measure_reduced,
    measure_times,
    measure_ways,
    pooled,
    train_run,
)
from scene_samples import small_recognizer, write_scenes

from quickmerge.datasets.annotated import read_annotated
from quickmerge.errors import QuickmergeError
from quickmerge.merge.reducers import make_reducer
from quickmerge.recognition.train import LabelledScenes, pixel_format, read_features
from quickmerge.training import TrainingConfig


def encode(texts):
    rows = [torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1) if rows else torch.zeros(0, 6)


def test_pooling_is_the_mean_of_squares() -> None:
    grid = torch.arange(16.0).view(1, 4, 4, 1)
    found = pooled(grid.reshape(1, 16, 1), 2).flatten().tolist()
    wanted = [float(grid[0, y : y + 2, x : x + 2].mean()) for y in (0, 2) for x in (0, 2)]
    assert found == wanted
    features = torch.randn(2, 16, 3)
    assert torch.equal(pooled(features, 1), features)
    with pytest.raises(QuickmergeError, match="a square grid of sides that 3 divides, got 16"):
        pooled(features, 3)
    with pytest.raises(QuickmergeError, match="square grid"):
        pooled(features[:, :15], 2)


def test_the_variants_differ_in_one_thing_each() -> None:
    found = {variant.name: variant for variant in variants(3)}
    base = found.pop("paper")
    assert {v.blocks for name, v in found.items() if "block" in name} == {1, 6}
    assert {v.mask for v in found.values() if v.objective == "reference"} == {"independent", "prefix", "causal"}
    assert found["reference, independent mask"].blocks == base.blocks
    folders = {variant.folder(Path("w"), seed) for variant in variants(3) for seed in (0, 1)}
    assert len(folders) == 2 * (len(found) + 1) and not any(" " in str(folder) for folder in folders)


@pytest.mark.parametrize("objective", ["paper", "reference"])
def test_a_run_from_training_to_scores(tmp_path: Path, objective: str) -> None:
    scenes = read_annotated(write_scenes(tmp_path / "scenes"))
    variant = Variant("tiny", 2, objective=objective, pool=2, ways=("one-shot", "best-first", "greedy", "beam"))
    seer = small_recognizer(layers=[2, 4])
    data = LabelledScenes(scenes, pixel_format(seer))
    features = read_features(seer, data, shrink=lambda x: pooled(x, variant.pool))
    assert features.shape == (9, 4, 64)
    data.keep(features)
    config = TrainingConfig(steps=60, batch=9, learning_rate=5e-3, save_every=60)
    out = variant.folder(tmp_path, 0)
    recognizer, seconds = train_run(lambda v: small_recognizer(layers=[2, 4]), variant, 0, data, config, out, 0)
    assert seconds > 0
    ways = measure_ways(recognizer, features, data.labels, variant.ways, encode)
    assert list(ways) == list(variant.ways)
    assert ways["one-shot"]["exact_at"]["10"]["recall"] > 0.9
    assert ways["best-first"]["exact_at"]["10"]["recall"] > 0.9
    if objective == "reference":
        assert ways["greedy"]["exact_at"]["10"]["recall"] > 0.5
    times = measure_times(recognizer, features, 3)
    assert set(times) == set(TIMED) and times["one-shot"]["ratio"] == 1
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in times.values())
    settings = {"steps": 60}
    assert finished(out, settings) is None
    finish(out, {"settings": settings, "ways": ways})
    assert sorted(path.name for path in out.iterdir()) == ["measured.json", "metrics.jsonl"]
    assert json.loads(json.dumps(finished(out, settings))) == {"settings": settings, "ways": ways}
    with pytest.raises(QuickmergeError, match="was measured with steps=60, and 61 is asked for now"):
        finished(out, {"steps": 61})


def test_fewer_tokens_are_measured_arm_by_arm(tmp_path: Path) -> None:
    recognizer = small_recognizer(layers=[2, 4])
    data = LabelledScenes(read_annotated(write_scenes(tmp_path / "scenes")), pixel_format(recognizer))

    def look(reducer: str, keep: float):
        less = None if reducer == "full" else make_reducer(reducer, place="vision", keep=keep)
        return [recognizer.look(torch.stack([data.pixels(i) for i in rows]), less) for rows in (range(5), range(5, 9))]

    arms = [("full", 1.0), ("tome", 0.5), ("random", 0.25)]
    rows = measure_reduced(recognizer, look, data.labels, arms, encode)
    assert [(row["reducer"], row["keep"], row["tokens"]) for row in rows] == [
        ("full", 1.0, 16.0),
        ("tome", 0.5, 8.0),
        ("random", 0.25, 4.0),
    ]
    assert all(row["decode_seconds"] > 0 and row["images"] == 9 for row in rows)


def test_a_trained_recogniser_is_measured_with_fewer_tokens(tmp_path: Path, monkeypatch) -> None:
    small_recognizer(layers=[2, 4]).save_pretrained(tmp_path / "made")
    scenes, out = write_scenes(tmp_path / "scenes"), tmp_path / "r.json"
    monkeypatch.setattr(recognizer_tokens.SentenceEncoder, "load", lambda: encode)
    given = ["--model", tmp_path / "made", "--scenes", scenes, "--mosaics", scenes, "--images", 4, "--out", out]
    monkeypatch.setattr(sys, "argv", ["recognizer_tokens.py", *map(str, given)])
    assert recognizer_tokens.main() == 0
    result = json.loads(out.read_text())
    rows, kinds = result["rows"], result["kinds"]
    labels = [label for scene in read_annotated(scenes)[:9] for label in scene.labels]
    assert {row["way"] for row in kinds} == {"one-shot", "best-first"}
    assert all(0 <= row["found"] <= row["labels"] <= len(labels) for row in kinds)
    assert [(row["data"], row["reducer"], row["keep"]) for row in rows] == [
        (data, *arm) for data in ("scenes", "mosaics") for arm in recognizer_tokens.ARMS
    ]
    tokens = {(row["reducer"], row["keep"]): row["tokens"] for row in rows}
    assert tokens["full", 1.0] == 16 and tokens["tome", 0.25] < tokens["tome", 0.5] < 16
