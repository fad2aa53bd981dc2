"""Tasks asked of recipes: answers against greedy decoding and prompts read alone, whatever is shared; and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import held, past
from hosts_zoo import build
from tokenizer_samples import byte_level
from torch.nn.functional import cross_entropy

import quickmerge as qm
from quickmerge.datasets.task_prompts import lay_out
from quickmerge.datasets.tasks import TaskMaker
from quickmerge.merge.cache import SnapKV
from quickmerge.recipe.tasks import bench_tasks, tasks_report

TEXTS = ("The river is wide here, and nobody came so late. " * 30,)
CODE = ("def add(a, b):\n    return a + b\n\n" * 40,)
SHORT = qm.Prefix(min_tokens=0)
RECIPES = {
    "fewer": qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.3), 1, SHORT)),
    "random": qm.Recipe(merge=qm.Merge(qm.Random(keep=0.2), [1, 3], SHORT)),
    "clusters": qm.Recipe(attention=qm.Multipole(budget=64, sink=2, interval=16, block=64)),
    "whole": qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=1.0), 1, SHORT)),
}
TASKS = ("needle", "labels")


def maker(queries: int = 2, tokens: int = 420) -> TaskMaker:
    return TaskMaker(byte_level(), tokens, TEXTS, CODE, queries)


def tiny(family: str = "llama", dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    return build(family, dtype=dtype, vocab_size=420, **more)


def asked(model: Any, **given: Any) -> Any:
    settings = {"tasks": TASKS, "seeds": range(2), "recipes": RECIPES, **given}
    made = settings.pop("maker", maker())
    return bench_tasks(model, byte_level(), made, settings.pop("recipes"), **settings)


def alone(model: Any, record: dict[str, Any], mode: str) -> tuple[bool, float]:
    """A prompt and its answer as a user would read them: one forward, then one token at a time."""
    sample = maker().make(record["task"], record["seed"])
    prompt = lay_out(byte_level(), sample, sample.queries[record["question"]], "bare", mode)
    recipe = RECIPES.get(record["way"], qm.Recipe())
    pieces = [prompt.shared, prompt.behind] if mode == "later" else [prompt.prompt]
    logits = []
    with torch.no_grad(), qm.apply(model, recipe):
        cache = None
        for piece in (*pieces, *((token,) for token in prompt.lead + prompt.answer)):
            out = model(torch.tensor([piece]), **past(cache), use_cache=True)
            cache = held(out)
            logits.append(out.logits[0, -1])
    answer = torch.tensor(prompt.answer)
    told = torch.stack(logits[-len(answer) - 1 : -1])
    return bool((told.argmax(-1) == answer).all()), float(cross_entropy(told, answer))


@pytest.mark.parametrize("mode", ["last", "first", "both", "later"])
def test_what_is_shared_changes_no_answer(mode: str) -> None:
    model = tiny()
    found = asked(model, mode=mode, format="bare")
    assert len(found.records) == 2 * 2 * (1 + len(RECIPES)) * 2 - 2 * (1 + len(RECIPES))  # needle has one question
    for record in found.records:
        if record["way"] != "clusters":  # whose clusters depend on how many tokens are read at once
            exact, nll = alone(model, record, mode)
            assert record["exact"] == exact and record["nll"] == pytest.approx(nll, abs=1e-5)


def test_sliding_windows_are_read_anew_for_each_question() -> None:
    model = tiny("mistral")
    found = asked(model, format="bare", recipes={"whole": RECIPES["whole"]})
    for record in found.records:
        assert record["nll"] == pytest.approx(alone(model, record, "last")[1], abs=1e-5)


def test_a_model_that_answers_is_scored_so() -> None:
    """Taught one answer by heart, the model gives it exactly; the rows count it, and what is solvable."""
    torch.manual_seed(0)
    model = build("llama", vocab_size=420, initializer_range=0.05).train()
    made = maker(queries=1)
    sample = made.make("needle", 0)
    prompt = lay_out(byte_level(), sample, sample.queries[0], "cue")
    ids = torch.tensor([prompt.prompt + prompt.answer])
    told = torch.where(torch.arange(ids.shape[1]) < len(prompt.prompt), -100, ids)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = model(ids, labels=told).loss
        if loss < 0.05:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    found = asked(model, maker=made, tasks=("needle",), recipes={"whole": RECIPES["whole"]})
    right, wrong = [r for r in found.records if r["way"] == "plain"]
    assert right["exact"] and right["solvable"] and not wrong["exact"] and not wrong["solvable"]
    row = found.rows[0]
    assert row["exact"] == 0.5 and row["solvable"] == 1 and row["exact_solvable"] == 1.0
    assert 0 < row["exact_low"] < 0.5 < row["exact_high"] < 1


def test_rows_follow_from_records_and_make_themselves_again(tmp_path: Path) -> None:
    found = asked(tiny(dtype=torch.bfloat16))
    json.dumps(found.as_dict())
    assert [row["name"] for row in found.rows[: 1 + len(RECIPES)]] == ["plain", *RECIPES]
    assert len(found.rows) == 3 * (1 + len(RECIPES))
    for row in found.rows:
        mine = [r for r in found.records if r["way"] == row["name"] and row["task"] in (None, r["task"])]
        assert row["prompts"] == len(mine) and row["nll"] == pytest.approx(sum(r["nll"] for r in mine) / len(mine))
        assert (row["dtype"], row["format"], row["mode"], row["tokens"]) == ("bfloat16", "cue", "last", 420)
        if row["recipe"] is not None:
            (tmp_path / "again.json").write_text(json.dumps(row["recipe"]))
            assert qm.Recipe.from_pretrained(tmp_path / "again.json") == RECIPES[row["name"]]
    plain, fewer, _, _, whole = found.rows[: 1 + len(RECIPES)]
    assert plain["flops_ratio"] == plain["cache_ratio"] == plain["prefill_ratio"] == 1
    assert fewer["flops_ratio"] < 1 and fewer["cache_ratio"] == pytest.approx((1 + 3 * 0.3) / 4, abs=0.01)
    assert whole["cache_ratio"] == 1 and whole["exact"] == plain["exact"]
    assert all(r["seconds"] > 0 for r in found.records)


def test_what_stands_in_the_file_is_not_measured_again(tmp_path: Path) -> None:
    path, done = tmp_path / "records.jsonl", list[str]()
    model = tiny()
    whole = asked(model, records=path, advance=done.append)
    assert len(done) == 2 * 2 * (1 + len(RECIPES))
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == len(whole.records)
    # Killed in the middle of a line, half way.
    path.write_text("".join(lines[: len(lines) // 2]) + lines[-1][:20])

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    again = asked(model, records=path)
    assert path.read_text().splitlines(keepends=True)[: len(lines) // 2] == lines[: len(lines) // 2]
    told = [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in again.records]
    assert told == [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in whole.records]
    model.forward = refused
    assert asked(model, records=path).rows == again.rows
    del model.forward


def test_other_settings_and_other_recipes_are_measured_anew(tmp_path: Path) -> None:
    path, model = tmp_path / "records.jsonl", tiny()
    some = {"tasks": ("needle",), "seeds": [0], "records": path}
    asked(model, recipes={"a": RECIPES["fewer"]}, **some)
    asked(model, recipes={"a": RECIPES["fewer"]}, mode="later", **some)
    asked(model, recipes={"a": RECIPES["random"]}, **some)
    asked(model, recipes={"a": RECIPES["fewer"]}, about={"model": "b"}, **some)
    asked(model, recipes={"a": RECIPES["fewer"]}, **some)
    assert len(path.read_text().splitlines()) == 2 + 2 + 1 + 2


@pytest.mark.parametrize("mode", ["last", "later"])
def test_caches_that_are_made_smaller_are_measured_as_they_are(mode: str) -> None:
    """Entries that leave the cache leave it in the rows, alone and beside merging."""
    evictor = SnapKV(keep=0.3, min_tokens=0)
    ways = {
        "cache": qm.Recipe(cache=evictor), "both": qm.Recipe(merge=RECIPES["fewer"].merge, cache=evictor),
        "twice": qm.Recipe(merge=qm.Merge(qm.GemFilter(keep=0.3, block=1), mode=SHORT)),
    }  # fmt: skip
    found = asked(tiny(), recipes=ways, mode=mode, format="bare", tasks=("needle",), seeds=[0])
    _, cache, both, twice = found.rows
    assert cache["cache_ratio"] == pytest.approx(0.3, abs=0.01) and 1 < cache["flops_ratio"] < 1.2
    assert both["cache_ratio"] < 0.5 and both["flops_ratio"] < 1
    assert twice["cache_ratio"] == pytest.approx(0.3, abs=0.01) and 0.3 < twice["flops_ratio"] < 1


def test_the_report_names_every_way_and_task() -> None:
    found = asked(tiny(), recipes={"fewer": RECIPES["fewer"]}).about(model="tiny")
    page = str(tasks_report(found.rows, found.meta).html())
    assert all(name in page for name in ("plain", "fewer", "needle", "labels", "420"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipes": {}}, "recipes must be at least one, got none"),
        ({"tasks": ()}, "tasks must be at least one, got none"),
        ({"seeds": ()}, "seeds must be at least one, got none"),
        ({"recipes": {"plain": qm.Recipe()}}, "recipes must have names other than plain"),
        ({"maker": maker(tokens=700)}, "tokens must leave prompt and answer no longer than the model's 512 positions"),
    ],
)
def test_what_can_t_be_measured_is_told(given: Any, message: str) -> None:
    with pytest.raises(qm.QuickmergeError, match=f"^{message}"):
        asked(tiny(), **given)


def test_the_model_solves_needles_when_it_reads_everything(smollm2: Any) -> None:
    model, tokenizer = smollm2
    found = bench_tasks(
        model, tokenizer, TaskMaker(tokenizer, 512), {"a tenth": qm.Recipe(merge=qm.Random(keep=0.1))},
        tasks=("needle",), seeds=range(2), format="chat",
    )  # fmt: skip
    plain, tenth = found.rows
    assert plain["exact"] == 1 and tenth["exact"] == 0 and tenth["nll"] > plain["nll"] + 1
