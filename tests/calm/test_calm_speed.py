"""Models take turns in writing equally many tokens, and rows are medians of rounds."""

from __future__ import annotations

import pytest
import torch
from calm_bench_samples import WORDS, tiny_calm, tiny_discrete

from quickmerge.calm.cost import measure_speed, speed_rows, write_on
from quickmerge.errors import QuickmergeError


def test_all_write_equally_much_in_turn() -> None:
    models = {"calm": tiny_calm(4), "plain": tiny_discrete()}
    # tokens that would end a text are the likeliest there are
    with torch.no_grad():
        models["plain"].lm_head.weight[0] = 30 * models["plain"].model.norm.weight
    before = models["plain"].generation_config.to_dict()
    prompts = torch.randint(1, WORDS, (3, 8))
    told: list[str] = []
    records = measure_speed(models, prompts, batches=(1, 3), new=10, rounds=2, advance=told.append)
    assert models["plain"].generation_config.to_dict() == before
    assert [(r["method"], r["batch"], r["round"], r["tokens"]) for r in records] == [
        ("calm", 1, 0, 10), ("calm", 1, 1, 10), ("plain", 1, 0, 10), ("plain", 1, 1, 10),
        ("calm", 3, 0, 30), ("calm", 3, 1, 30), ("plain", 3, 0, 30), ("plain", 3, 1, 30),
    ]  # fmt: skip
    turns = ["calm", "plain", "plain", "calm"]
    assert told == [f"{name}, batch {batch}" for batch in (1, 3) for name in turns]
    assert all(r["seconds"] > 0 for r in records)


def test_rows_are_medians_of_rounds_and_of_their_ratios() -> None:
    records = [
        {"method": method, "batch": 2, "round": turn, "seconds": seconds, "tokens": 12}
        for method, times in (("a", (1.0, 2.0, 4.0)), ("b", (0.5, 1.0, 1.0)))
        for turn, seconds in enumerate(times)
    ]
    a, b = speed_rows(records)
    assert (a["tokens_per_second"], a["speedup"], b["tokens_per_second"], b["speedup"]) == (6, 1, 12, 2)
    assert (b["speedup_low"], b["speedup_high"]) == (2, 4) and b["rounds"] == 3 and b["against"] == "a"
    assert speed_rows(records, "b")[0]["speedup"] == 0.5
    assert speed_rows(records[:1])[0]["tokens_per_second_low"] == 12


def test_what_does_not_fit_is_told() -> None:
    prompts = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(QuickmergeError, match="prompts must be at least 8"):
        measure_speed({"calm": tiny_calm()}, prompts, batches=(1, 8))
    with pytest.raises(ValueError, match="rounds must be a whole number"):
        measure_speed({"calm": tiny_calm()}, prompts, batches=(1,), rounds=0)
    seconds, tokens = write_on(tiny_calm(2), prompts, 5, seed=0)
    assert seconds > 0 and tokens == 10
