"""The benchmark of transplants goes on where it was broken off; its tables and figure are made of what it writes."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transplant as script
import transplant_figure
import transplant_tables
import transplant_texts
from documents import MANIFEST
from safetensors.torch import save_file
from tokenizer_samples import SENTENCES, byte_level
from transplant_samples import model_folder, tokenizer_folder

import quickmerge.transplant.api  # noqa: F401 (its name is also that of the function)
from quickmerge.errors import QuickmergeError

LINES = [f"{SENTENCES[n % len(SENTENCES)]} It was {n} days ago." for n in range(60)]
RUSSIAN = [f"Кошка сидит на окне {n} дня." for n in range(30)]


def gathered(folder: Path, split: str, texts: list[str], **more: list[str]) -> Path:
    """A folder such as documents.py and training_text.py fill, of one split and of more."""
    entries = []
    whole = [(name, number, text) for name, own in {split: texts, **more}.items() for number, text in enumerate(own)]
    for split, number, text in whole:
        file = f"{split}/prose/{number}.txt"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        entries.append({"file": file, "kind": "prose", "split": split, "sha256": digest})
    (folder / MANIFEST).write_text(json.dumps({"complete": True, "documents": entries}))
    return folder


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    base = model_folder(tmp_path / "base", "llama tied")
    torch.manual_seed(0)
    save_file({"rows": torch.randn(520, 12)}, tmp_path / "donor.safetensors")
    one = script.Case(
        "one", str(tokenizer_folder(tmp_path / "t1")), str(tmp_path / "donor.safetensors"), ("prose", "Russian")
    )
    two = script.Case("two", str(tokenizer_folder(tmp_path / "t2", byte_level(460))), None, ("prose, lower case",))
    monkeypatch.setattr(script, "CASES", (one, two))
    monkeypatch.setattr(transplant_texts, "PASSAGE", 60)
    monkeypatch.setattr(transplant_texts, "_paragraphs", lambda *_: RUSSIAN)
    for module in (script, sys.modules["quickmerge.transplant.api"]):
        monkeypatch.setattr(module, "digit_report", partial(module.digit_report, numbers=[7, 12, 345, 2024]))
    documents = gathered(tmp_path / "documents", "test", ["\n".join(LINES[n : n + 20]) for n in range(4)],
                         dev=["\n".join(LINES[n : n + 20]) for n in range(30, 32)])  # fmt: skip
    monkeypatch.setattr(script, "CHOSEN_ON", 2)
    training = gathered(tmp_path / "training", "train", ["\n".join(LINES[n:]) for n in range(8)])

    def start(*more: object) -> int:
        given = ["--model", base, "--documents", documents, "--training", training, "--passages", 3, "--hidden", 0, 0.5]
        given += ["--notes", tmp_path / "notes.jsonl", "--out", tmp_path / "r.json", "--figure", tmp_path / "f.png"]
        monkeypatch.setattr(sys, "argv", ["transplant.py", *map(str, given), *map(str, more)])
        return script.main()

    return start


def test_a_run_that_was_broken_off_goes_on(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    allowed = [16]
    real = script.rebuild

    def counted(*args: Any, method: str, **more: Any) -> Any:
        if len(made) == allowed[0]:
            raise KeyboardInterrupt
        made.append(method)
        return real(*args, method=method, **more)

    monkeypatch.setattr(script, "rebuild", counted)
    with pytest.raises(KeyboardInterrupt):
        start()
    # with nothing hidden all is known already
    assert not (tmp_path / "r.json").exists() and made == [*script.METHODS, "auto", *script.CURVE[:2]]
    made.clear()
    allowed[0] = 99
    assert start() == 0
    assert made == [*script.CURVE[2:], *script.METHODS, "auto"] and not (tmp_path / "notes.jsonl").exists()
    broken = json.loads((tmp_path / "r.json").read_text())
    monkeypatch.setattr(script, "rebuild", real)
    assert start() == 0
    whole = json.loads((tmp_path / "r.json").read_text())
    assert broken == whole

    kinds = [("one", "prose"), ("one", "Russian"), ("two", "prose, lower case")]
    assert [(r["vocabulary"], r["kind"], r["method"]) for r in whole["rows"]] == [
        (*kind, method) for kind in kinds for method in script.COMPARED
    ]
    assert [(r["vocabulary"], r["kind"]) for r in whole["against_auto"]] == kinds
    for r in whole["rows"]:
        assert r["bits_per_byte_low"] <= r["bits_per_byte"] <= r["bits_per_byte_high"]
        whole_bits = r["bits_per_byte"] * r["bytes"]
        old = r["tokens"] - r["new_tokens"]
        parts = (r["bits_per_shared_token"] or 0) * old + (r["bits_per_new_token"] or 0) * r["new_tokens"]
        assert parts == pytest.approx(whole_bits) and r["new_tokens"] > 0
        assert (r["over_auto"] == 0) == (r["rule"] == next(
            other["rule"] for other in whole["rows"]
            if (other["vocabulary"], other["method"]) == (r["vocabulary"], "auto")
        ))  # fmt: skip
    for r in whole["against_auto"]:
        own = [o for o in whole["rows"] if (o["vocabulary"], o["kind"]) == (r["vocabulary"], r["kind"])]
        own = [o for o in own if o["method"] != script.HELD_OUT]
        assert r["best_bits_per_byte"] == pytest.approx(min(o["bits_per_byte"] for o in own)) and r["behind"] >= 0
    written = whole["meta"]["written_folder"]
    assert written["largest_difference_bits"] < 1e-3
    nothing, half = ([r for r in whole["hidden"] if r["share"] == share] for share in (0, 0.5))
    prose = {r["method"]: r for r in whole["rows"] if (r["vocabulary"], r["kind"]) == ("one", "prose")}
    assert [r["bits_per_byte"] for r in nothing] == [prose[r["method"]]["bits_per_byte"] for r in nothing]
    assert all(h["new_tokens"] > n["new_tokens"] for n, h in zip(nothing, half, strict=True))
    for name, (file, make, key) in transplant_tables.TRANSPLANT.items():
        if file == "transplant":
            table = make(whole[key])
            assert table.body, name
    first = (tmp_path / "f.png").read_bytes()
    transplant_figure.draw(whole["hidden"], tmp_path / "again.png")
    assert first[:4] == b"\x89PNG" and first == (tmp_path / "again.png").read_bytes()


def test_what_is_hidden_is_in_no_piece(start: Any) -> None:
    tokenizer = byte_level(420)
    case = script.CASES[0]
    bench = script.Bench(case, None, tokenizer, torch.randn(420, 8), {}, [])
    bench.prepare(None)
    plain, _ = bench.plan()
    gone: set[int] = set()
    for share in (0.2, 0.6):
        plan, segmenter = bench.plan(share)
        kept = set(plan.copied[:, 1].tolist())
        lost = set(plain.copied[:, 1].tolist()) - kept
        assert lost > gone, "what a small share hides a large one hides too"
        gone = lost
        assert all(len(bench.ours.by_id[one].data or b"") > 1 for one in lost)
        assert len(plan.copied) + len(plan.rebuilt) == len(plain.copied) + len(plain.rebuilt)
        pieces = segmenter.cut_all(bench.theirs.by_id[int(one)].data or b"" for one in plan.rebuilt)
        assert all(pieces) and not lost & {one for own in pieces for one in own}
        for new, own in zip(plan.rebuilt, pieces, strict=True):
            assert bench.ours.spell(own) == bench.theirs.by_id[int(new)].data


def test_what_is_missing_is_told_in_one_sentence(start: Any, tmp_path: Path, capsys: Any) -> None:
    other = model_folder(tmp_path / "untied", "llama")
    for more, message in (
        (["--documents", tmp_path], "are not whole: run benchmarks/documents.py first"),
        (["--training", tmp_path], "are not whole: run benchmarks/training_text.py first"),
        (["--passages", 9], "--passages must be at most 4, of which prose has enough text, got 9"),
        (["--model", other], "must have one matrix for input and output"),
    ):
        assert start(*more) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert message in said, said
    for wrong in (["--hidden", 1], ["--passages", 1], ["--vocabularies", "three"]):
        with pytest.raises(SystemExit):
            start(*wrong)


def test_paragraphs_are_those_of_the_script_in_one_line() -> None:
    russian = "Кошка сидит на окне и смотрит на\n  двор, где Linux."
    chinese = "自由软件并不意味着免费，而是指用户有运行、\n  复制、分发和修改 Linux\n  软件的自由。"
    english, short, table = "All of this is in English, and left out.", "Кошка.", "| -- | 表格表格表格表格表格表格 |"
    text = "\n\n".join([russian, english, short, chinese, table])
    assert transplant_texts.running(text, "CYRILLIC") == ["Кошка сидит на окне и смотрит на двор, где Linux."]
    assert transplant_texts.running(text, "CJK") == [
        "自由软件并不意味着免费，而是指用户有运行、复制、分发和修改 Linux软件的自由。"
    ]
    assert transplant_texts.plain("Ein GRÖSSERES\n  Café") == "ein grosseres cafe"


def test_passages_hold_so_many_bytes_and_do_not_overlap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paragraphs = [f"Это абзац номер {n}, и он говорит о кошках и о собаках." for n in range(100)]
    monkeypatch.setattr(transplant_texts, "_paragraphs", lambda *_: paragraphs)
    found = transplant_texts.passages("Russian", None, 7)
    assert len(set(found)) == 7 and all(500 <= len(text.encode()) < 504 for text in found)
    places = [text.split(",")[0] for text in found]
    assert places == sorted(places, key=lambda text: int(text.split()[-1])), "spread in order"
    with pytest.raises(QuickmergeError, match="at most 16"):
        transplant_texts.passages("Russian", None, 99)
    folder = gathered(tmp_path, "test", ["Short line.\n" * 200, "One sentence. " * 200])
    others = transplant_texts.passages("Russian", None, 5, scored=7)
    assert len(set(others)) == 5 and not set(others) & set(found), "what is chosen on is not what is scored"
    prose = transplant_texts.passages("prose", folder, 2)
    assert [len(text) for text in prose] == [500, 500] and prose[0].startswith("Short") and prose[1].startswith("One")


def test_intervals_are_of_the_same_passages() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(100, 1000, 30)
    own = [{"bits": bits + 10, "bytes": 100} for bits in hard]
    other = [{"bits": bits, "bytes": 100} for bits in hard]
    more, low, high = script.gap(own, other)
    assert (more, low, high) == pytest.approx((0.1, 0.1, 0.1)), "how hard a passage is falls out"
