"""``quickmerge bench`` of CALMs beside an ordinary language model, and all that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calm_bench_samples import save, texts, tiny_calm, tiny_discrete


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    made = {"two": tiny_calm(2), "four": tiny_calm(4), "plain": tiny_discrete()}
    return {name: save(model, tmp_path / name) for name, model in made.items()}


@pytest.fixture
def documents(tmp_path: Path) -> list[Path]:
    paths = []
    for number, text in enumerate(texts(3, 80)):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text(text)
    return paths


def test_models_are_set_beside_the_ordinary_one(run, folders, documents, tmp_path: Path) -> None:
    data = tmp_path / "b.json"
    code, out, err = run(
        "bench", "calm", "--model", f"{folders['two']},k4={folders['four']},{folders['plain']}", "--text", *documents,
        "--context", 48, "--limit", 6, "--samples", 4, "--batch", "1,3", "--max-new-tokens", 6, "--rounds", 2,
        "--temperature", "1,0.5", "--out", tmp_path / "out", "--json", data,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(data.read_text())
    rows = {r["method"]: r for r in found["rows"]}
    assert list(rows) == ["two", "k4", "plain"]
    assert rows["two"]["against"] == rows["k4"]["against"] == "plain" and "gap" not in rows["plain"]
    assert [r["patch"] for r in found["rows"]] == [2, 4, 1] and rows["plain"]["kind"] == "tokens"
    assert all(r["positions"] == 6 and r["brier_lm_low"] <= r["brier_lm"] <= r["brier_lm_high"] for r in found["rows"])
    assert rows["plain"]["flops_ratio"] == 1 and rows["k4"]["flops"] < rows["two"]["flops"]
    assert [(s["method"], s["batch"]) for s in found["speeds"]] == [(n, b) for b in (1, 3) for n in rows]
    assert {(t["method"], t["temperature"], t["temperature_method"]) for t in found["temperatures"]} == {
        (m, t, w) for m in ("two", "k4") for t, w in ((1.0, "exact"), (0.5, "exact"), (0.5, "batch"))
    }
    at_one = [t for t in found["temperatures"] if (t["temperature"], t["temperature_method"]) == (1, "exact")]
    assert len(at_one) == 2 and all(t["draws"] == 1 and t["expected"] == pytest.approx(1) for t in at_one)
    assert "BrierLM" in out and "95 % intervals over" in out and (tmp_path / "out" / "report.html").is_file()


def test_without_a_batch_nothing_is_timed(run, folders, documents, tmp_path: Path) -> None:
    data = tmp_path / "b.json"
    common = ["--text", documents[0], "--context", 48, "--limit", 4, "--samples", 3, "--batch", ""]
    code, _, err = run("bench", "calm", "--model", folders["four"], *common, "--json", data)
    assert code == 0, err
    first = json.loads(data.read_text())
    assert first["speeds"] == [] and first["temperatures"] == []
    run("bench", "calm", "--model", folders["four"], *common, "--json", data)
    assert json.loads(data.read_text())["rows"] == first["rows"], "the same seed gives the same draws"


def test_what_does_not_fit_is_told(run, folders, documents, tmp_path: Path) -> None:
    four, text = folders["four"], ["--text", documents[0]]
    tokenizer = json.loads((folders["plain"] / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        f"x{word}" if word != "</s>" else word: i for word, i in tokenizer["model"]["vocab"].items()
    }
    tokenizer["model"]["unk_token"] = "xw1"
    (folders["plain"] / "tokenizer.json").write_text(json.dumps(tokenizer))
    cases = [
        (["--model", four], "Missing argument 'FILES'"),
        (
            ["--model", four, *text, "--keep", "0.5"],
            "quickmerge bench calm has no option --keep: it belongs to quickmerge bench text",
        ),
        (["--model", f"{four},{four}", *text], "a name of its own"),
        (["--model", f"{four},{folders['plain']}", *text], "plain has another than four"),
        (["--model", four, *text, "--batch", "0"], "--batch must be whole numbers of at least 1"),
        (["--model", four, *text, "--temperature", "2"], r"temperature must be a number in (0, 1]"),
        (["--model", four, *text, "--temperature", "hot"], r"--temperature must be numbers in (0, 1]"),
        (["--model", four, *text, "--context", "8"], "texts must hold a document of at least"),
        (
            ["--model", "smollm2-135m", *text],
            "--model must name at least one CALM (a folder of train calm), got smollm2",
        ),
    ]
    for given, words in cases:
        code, _, err = run("bench", "calm", *given)
        assert code == 2 and words in " ".join(err.split()), (given, err)
