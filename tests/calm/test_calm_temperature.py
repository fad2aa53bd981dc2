"""What a temperature does to a CALM, beside what its own draws say that it does."""

from __future__ import annotations

import pytest
import torch
from calm_bench_samples import texts, tiny_calm, words

from quickmerge.calm.cost import temperature_rows, writing_cost
from quickmerge.calm.evaluate import brier_text
from quickmerge.errors import QuickmergeError


def setting(patch: int = 1):
    model = tiny_calm(patch)
    with torch.no_grad():
        model.head.last.bias *= 3  # so that some chunks are likely
    return model, brier_text(words(), texts(3, 60), [patch], length=40, context=4, limit=20)


def test_draws_are_those_of_the_formula_and_lower_temperatures_repeat_more() -> None:
    model, text = setting()
    rows = temperature_rows(model, text, [1, 0.7, 0.5], places=20, count=50, pilot=2000)
    found = {(r["temperature"], r["temperature_method"]): r for r in rows}
    assert set(found) == {(1, "exact"), (0.7, "exact"), (0.5, "exact"), (0.5, "batch")}
    assert found[1, "exact"]["draws"] == 1 and all(r["gave_up"] == 0 for r in rows)
    for temperature in (0.7, 0.5):
        r = found[temperature, "exact"]
        assert r["draws"] == pytest.approx(r["expected"], rel=0.5) and r["draws"] > 1 and r["made"] >= r["draws"]
    assert found[0.5, "exact"]["same"] > found[1, "exact"]["same"] and found[0.5, "batch"]["draws"] == 50
    # the exact method by the chunks' own shares: the mean over places of sum P^4 / (sum P^2)^2
    states = torch.stack([model.hidden(text.windows[w, :p][None])[0][0, -1] for w, p in text.places.tolist()])
    drawn = model.sample_chunks(states.detach(), 4000, generator=torch.Generator().manual_seed(9))[..., 0]
    p = torch.stack([column.bincount(minlength=25).double() / 4000 for column in drawn.T])
    same = (p**4).sum(1) / (p**2).sum(1) ** 2
    spread = (same * (1 - same)).mean() / len(same)
    assert abs(found[0.5, "exact"]["same"] - float(same.mean())) < 5 * float(spread) ** 0.5 + 0.02


def test_the_cost_counts_the_draws() -> None:
    model, text = setting(4)
    row = temperature_rows(model, text, [0.5], places=3, count=40, pilot=50)[1]
    assert row["temperature_method"] == "batch" and row["flops"] == writing_cost(model, 20, 40).total


def test_rows_say_where_draws_were_not_enough() -> None:
    model, text = setting(4)
    row = temperature_rows(model, text, [0.05], places=4, count=5, pilot=5, most_draws=21)[0]
    assert 0 < row["gave_up"] <= 1 and row["draws"] <= row["made"] == 21


def test_what_does_not_fit_is_told() -> None:
    model, text = setting(4)
    with pytest.raises(QuickmergeError, match="temperature must be a number"):
        temperature_rows(model, text, [1.2])
    with pytest.raises(ValueError, match="pilot must be a whole number"):
        temperature_rows(model, text, [1], pilot=0)
