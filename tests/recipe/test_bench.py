"""Recipes beside the plain model: rows follow from records, and each holds what makes it again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hosts_zoo import build, tokens

import quickmerge as qm
from quickmerge.bench.quality import document_nll
from quickmerge.datasets.text import Document
from quickmerge.recipe.bench import bench_recipes, recipes_report

FEWER = qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.3), 1, qm.Prefix(min_tokens=0)))
RECIPES = {
    "lookup": qm.Recipe(decoding=qm.Speculation(qm.PromptLookup(ngram=2), tree=8)),
    "fewer": FEWER,
    "clusters": qm.Recipe(attention=qm.Multipole(budget=8, sink=2, interval=4, block=32)),
}


def taught() -> Any:
    """A model for which a context says what follows: it repeats."""
    torch.manual_seed(0)
    model = build("llama", max_position_embeddings=256, initializer_range=0.05).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rows = torch.stack([tokens(1, 8, seed)[0].repeat(8) for seed in range(32)])
    for _ in range(60):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def found() -> Any:
    texts = [tokens(1, 8, seed).repeat(1, 15) for seed in range(3)]
    documents = [Document(f"d{i}", text[:, :90], text[:, 90:]) for i, text in enumerate(texts)]
    model = taught()
    done: list[str] = []
    result = bench_recipes(model, documents, RECIPES, max_new_tokens=16, advance=done.append)
    return model, documents, result, done


def test_every_way_has_a_row_with_the_recipe_that_makes_it_again(found: Any, tmp_path: Any) -> None:
    _, _, result, done = found
    assert [row["name"] for row in result.rows] == ["plain", *RECIPES] and len(done) == 3 * 4
    assert result.rows[0]["recipe"] is None
    for row in result.rows[1:]:
        (tmp_path / "again.json").write_text(json.dumps(row["recipe"]))
        assert qm.Recipe.from_pretrained(tmp_path / "again.json") == RECIPES[row["name"]]
    json.dumps(result.as_dict())


def test_the_plain_model_is_as_good_as_itself_and_speculation_too(found: Any) -> None:
    model, documents, result, _ = found
    plain, lookup, fewer, clusters = result.rows
    assert plain["recovery"] == 1 and plain["tokens_per_pass"] == 1 and plain["cache_ratio"] == 1 and plain["same"] == 3
    assert plain["nll"] == pytest.approx(sum(float(document_nll(model, d).mean()) for d in documents) / 3, abs=1e-4)
    assert lookup["recovery"] == pytest.approx(1, abs=1e-5) and lookup["same"] == 3
    assert lookup["tokens_per_pass"] > 1.5
    assert fewer["cache_ratio"] < 0.8 and fewer["nll"] != plain["nll"] != clusters["nll"]


def test_rows_follow_from_records(found: Any) -> None:
    _, _, result, _ = found
    for row in result.rows:
        mine = [record for record in result.records if record["recipe_name"] == row["name"]]
        assert len(mine) == 3 and row["nll"] == pytest.approx(sum(r["nll"] for r in mine) / 3)
        assert row["tokens_per_pass"] == sum(r["tokens"] - 1 for r in mine) / sum(r["passes"] - 1 for r in mine)
        assert all(0 < r["ttft_seconds"] < r["seconds"] for r in mine)


def test_the_report_names_every_recipe(found: Any) -> None:
    _, _, result, _ = found
    page = str(recipes_report(result.rows, {"model": "tiny"}).html())
    for row in result.rows:
        assert row["name"] in page and row["label"].split(":")[0] in page


@pytest.mark.parametrize("recipes", [{}, {"plain": FEWER}])
def test_what_can_t_be_compared_is_told(recipes: Any, found: Any) -> None:
    model, documents, _, _ = found
    with pytest.raises(qm.QuickmergeError, match="recipes must be at least one, and no recipe called plain"):
        bench_recipes(model, documents, recipes)
    with pytest.raises(qm.QuickmergeError, match="documents must be at least one"):
        bench_recipes(model, [], RECIPES)
