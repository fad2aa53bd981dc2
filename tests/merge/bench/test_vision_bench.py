from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cosine_similarity

import quickmerge as qm
from quickmerge.bench.harness import Arm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.vision import arms, bench_images, look, time_arms
from quickmerge.merge.tokens.removal import Removal

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 64,
    "patch_size": 8,
    "initializer_range": 0.2,
}


def build(head: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**SIZES, num_labels=3)
    kind = transformers.Dinov2ForImageClassification if head else transformers.Dinov2Model
    return kind._from_config(config, attn_implementation="sdpa").eval()


def images(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_the_model_as_it_is_is_perfectly_true_to_itself() -> None:
    model, x = build(), images()
    found = bench_images(model, [x, x[:1]], arms(model, [qm.ToMe(), qm.Random()], [0.6], x))
    rows, records = found.rows, found.records
    assert [row["method"] for row in rows] == ["full", "tome", "random", "smaller images"]
    assert rows[0]["pooled"] == pytest.approx(1) and rows[0]["patches"] == pytest.approx(1) and rows[0]["ratio"] == 1
    assert len(records) == 4 * 4 and {r["image"] for r in records} == {0, 1, 2, 3}
    for row in rows[1:3]:
        assert row["ratio"] == pytest.approx(0.6, abs=0.03)
        assert row["pooled"] < 1 and row["pooled_low"] <= row["pooled"] <= row["pooled_high"]
    assert rows[1]["patches"] > rows[2]["patches"]  # what random drops counts as nothing


def test_features_are_those_of_the_slots_by_size() -> None:
    model, x = build(), images()
    arm = Arm("tome", lambda: qm.reduce(model, qm.ToMe(), Removal(9)), {"keep": 0.6})
    seen = look(model, x, arm)
    with torch.no_grad(), qm.reduce(model, qm.ToMe(), Removal(9), unmerge=True):
        full = model(x).last_hidden_state
    torch.testing.assert_close(seen.patches, full[:, 1:])
    torch.testing.assert_close(seen.pooled, torch.cat([full[:, 0], full[:, 1:].mean(1)], -1))
    assert seen.entering == [65, 56, 47, 38] and seen.leaving == [56, 47, 38, 29]
    dense = look(model, x)
    want = cosine_similarity(seen.pooled, dense.pooled, dim=-1)
    found = bench_images(model, [x], [arm])
    rows, records = found.rows, found.records
    assert [r["pooled"] for r in records if r["method"] == "tome"] == pytest.approx(want.tolist())
    assert rows[1]["tokens"] == pytest.approx((56 + 47 + 38 + 29) / 4)


def test_a_head_is_asked_for_labels() -> None:
    model, x = build(head=True), images(4)
    with torch.no_grad():
        guesses = [("a", "b", "c")[i] for i in model(x).logits.argmax(-1).tolist()]
    labels = [*guesses[:3], "none"]
    rows = bench_images(model, [x], arms(model, [qm.ToMe()], [0.7], x), labels=labels, classes=("a", "b", "c")).rows
    assert rows[0]["accuracy"] == 0.75 and rows[0]["agreement"] == 1 and rows[0]["accuracy_change"] == 0
    with pytest.raises(QuickmergeError, match="one for each of 4 images"):
        bench_images(model, [x], [], labels=labels[:2], classes=("a", "b", "c"))
    with pytest.raises(QuickmergeError, match="need classes"):
        bench_images(model, [x], [], labels=labels)


def test_smaller_images_cost_what_was_asked_and_come_back_to_the_grid() -> None:
    model, x = build(), images()
    arm = arms(model, [], [0.5], x)[0]
    assert arm.settings["resize"] == 48  # 36 patches of 64
    seen = look(model, x, arm, (8, 8))
    assert seen.patches.shape == (3, 64, 32) and seen.leaving[0] == 37


def test_arms_take_turns_and_the_model_is_left_alone() -> None:
    model, x = build(), images()
    before = model(x).last_hidden_state
    said: list[str] = []
    rows = time_arms(model, x, arms(model, [qm.ToMe()], [0.5], x), 3, said.append)
    assert [row["method"] for row in rows] == ["full", "tome", "smaller images"] and len(said) == 12
    assert rows[0]["speedup"] == 1 and all(row["seconds"] > 0 and math.isfinite(row["speedup"]) for row in rows)
    assert torch.equal(model(x).last_hidden_state, before)
