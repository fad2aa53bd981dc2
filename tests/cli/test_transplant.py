"""``quickmerge transplant`` on tiny models: what it prints and writes, and one sentence for all that is wrong."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizer_samples import SENTENCES, sentencepiece_bpe
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transplant_samples import config_of, model_folder, tokenizer_folder

from quickmerge.errors import QuickmergeError
from quickmerge.transplant import writer
from quickmerge.transplant.cli import parse_special


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "base")


@pytest.fixture
def wanted(tmp_path: Path) -> Path:
    return tokenizer_folder(tmp_path / "wanted")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(SENTENCES), encoding="utf-8")
    return path


def test_a_transplant_is_written_measured_and_told(
    run: Any, base: Path, wanted: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "out"
    donor = model_folder(tmp_path / "donor", tokenizer=sentencepiece_bpe(520), seed=4)
    code, printed, err = run(
        "transplant", "--base", base, "--donor", donor, "--tokenizer", wanted, "--out", out, "--method", "omp",
        "--k", "4",
        "--special", "<s>=<|endoftext|>", "--pad-to-multiple-of", "64", "--text", text, "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0, err
    words = " ".join(printed.split())
    for part in (
        "copied bit for bit", "576 (before: 420)", "new, approximated", "input matrix", "output matrix", "omp k=4",
        "umbers are cut", "bits per byte", "tokens per byte", "A new row wins at", f"wrote {out}",
    ):  # fmt: skip
        assert part in words, part
    data = json.loads((tmp_path / "r.json").read_text())
    quality = data["quality"]
    assert (
        quality["before"]["bytes"] > 300 and quality["after"]["new_tokens"] > 0 and quality["before"]["new_tokens"] == 0
    )
    # a random model can't do better than to spread itself over the vocabulary
    assert 1 < quality["before"]["bits_per_byte"] < 10 and quality["after"]["bits_per_byte"] > 1
    assert quality["logits"]["shared_spread"] > 0 and data["texts"] == ["text.txt"]
    assert config_of(out)["vocab_size"] == 576 and data["special"]["<s>"] == ["<|endoftext|>"]
    rows = data["matrices"]["input"]["table"]
    assert {"omp k=4 unit", "omp k=4 inner"} == {row["rule"] for row in rows}


def test_auto_chooses_on_one_half_of_the_text_and_is_measured_on_the_other(
    run: Any, base: Path, wanted: Path, tmp_path: Path
) -> None:
    lines = [f"{number} {SENTENCES[number % len(SENTENCES)]}" for number in range(150)]
    (tmp_path / "long.txt").write_text("\n".join(lines), encoding="utf-8")
    start = ["transplant", "--base", base, "--tokenizer", wanted, "--text", tmp_path / "long.txt"]
    code, printed, err = run(*start, "--out", tmp_path / "out", "--json", tmp_path / "r.json")
    assert code == 0, err
    words = " ".join(printed.split())
    for part in ("rows by one rule", "kind of token", "subword mean 0.75", "what is measured below are others"):
        assert part in words, part
    data = json.loads((tmp_path / "r.json").read_text())
    whole = len("\n".join(lines).encode())
    chosen, measured = data["matrices"]["input"]["decision"]["bytes"], data["quality"]["after"]["bytes"]
    assert 0.35 * whole < measured < 0.65 * whole and 0 < chosen < whole - measured + 1000
    code, printed, err = run(
        *start, "--out", tmp_path / "again", "--choose-by", "held-out", "--json", tmp_path / "h.json"
    )
    assert code == 0, err
    data = json.loads((tmp_path / "h.json").read_text())
    assert data["matrices"]["input"]["decision"] is None and data["quality"]["after"]["bytes"] > 0.95 * whole
    assert "rows by one rule" not in printed


def test_a_dry_run_prints_the_same_and_writes_nothing(
    run: Any, base: Path, wanted: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, printed, err = run("transplant", "--base", base, "--tokenizer", wanted, "--out", out, "--dry-run",
                             "--donor-text", text, "--json", tmp_path / "r.json")  # fmt: skip
    assert code == 0, err
    assert "nothing was written" in printed and "centred" in printed and not out.exists()
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["out"] is None and data["quality"] is None and len(data["matrices"]["input"]["table"]) > 10
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_way_back_is_told(run: Any, base: Path, wanted: Path, tmp_path: Path) -> None:
    for source, tokenizer, out in ((base, wanted, "there"), (tmp_path / "there", base, "back")):
        code, printed, err = run("transplant", "--base", source, "--tokenizer", tokenizer, "--out", tmp_path / out,
                                 "--method", "mean", "--no-quality")  # fmt: skip
        assert code == 0, err
    assert "its rows are back" in printed
    code, printed, _ = run(
        "transplant", "--base", base, "--tokenizer", base, "--out", tmp_path / "same", "--no-quality"
    )
    assert code == 0 and "nothing changed" in printed


def wrong(base: Path, wanted: Path, tmp_path: Path) -> dict[str, tuple[list[object], str]]:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")))
    words.save_pretrained(tmp_path / "words")
    alone = sentencepiece_bpe(520)
    vocabulary = {f"▁猫{chr(0x4E00 + number)}": number for number in range(4)} | {"猫": 4, "▁": 5, "▁猫": 6}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = __import__("tokenizers").pre_tokenizers.Metaspace()
    backend.decoder = __import__("tokenizers").decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "apart")
    few = model_folder(tmp_path / "few", tokenizer=alone, rows=520, seed=1)
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"v": zeros(100, 4) + 1}, tmp_path / "v.safetensors")
    start: list[object] = ["--base", base, "--out", tmp_path / "out"]
    full = [*start, "--tokenizer", wanted]
    return {
        "method": ([*full, "--method", "opm"], r"method is 'opm' \(did you mean 'omp'\?\)"),
        "choice": (
            [*full, "--choose-by", "texts"],
            r"choose_by must be one of text, held-out, got 'texts' \(did you mean",
        ),
        "no tokenizer": (start, "give tokenizer, or a donor that has one"),
        "no alphabet": ([*start, "--tokenizer", tmp_path / "words"], "tokenizer must be byte-level, SentencePiece"),
        "nothing shared": ([*start, "--tokenizer", tmp_path / "apart"], "tokenizer"),
        "too many anchors": ([*full, "--donor", few, "--method", "omp", "--k", "500"], "k must be at most"),
        "small matrix": ([*full, "--donor", tmp_path / "v.safetensors"], "got 100 vectors"),
        "no vectors": ([*full, "--method", "nearest"], "needs vectors of the new tokens"),
        "out is base": (["--base", base, "--out", base, "--tokenizer", wanted], "out must be another folder"),
        "both": ([*full, "--donor", few, "--donor-text", base / "config.json"], "either --donor or --donor-text"),
        "special": ([*full, "--special", "<s>"], "--special must be NEW=TEXT"),
        "unknown special": ([*full, "--special", "<t>=a"], "special names '<t>'"),
        "rows": ([*full, "--vocab-size", "5"], "vocab_size must be at least 520"),
        "model": (
            ["--base", "smollm", "--out", tmp_path / "out", "--tokenizer", wanted],
            "no model is called 'smollm'",
        ),
    }


CASES = """method,choice,no tokenizer,no alphabet,nothing shared,too many anchors,small matrix,no vectors,out is base,
both,special,unknown special,rows,model""".replace("\n", "").split(",")


def test_the_list_of_cases_is_whole(base: Path, wanted: Path, tmp_path: Path) -> None:
    assert list(wrong(base, wanted, tmp_path)) == CASES


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence_and_exit_2(case: str, run: Any, base: Path, wanted: Path, tmp_path: Path) -> None:
    import re

    arguments, message = wrong(base, wanted, tmp_path)[case]
    code, printed, err = run("transplant", *arguments)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and printed == "", err
    assert len(lines) == 1 and lines[0].startswith("quickmerge: ") and re.search(message, lines[0]), err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_sentence(run: Any, base: Path, wanted: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "write_safetensors", full)
    code, printed, err = run("transplant", "--base", base, "--tokenizer", wanted, "--out", tmp_path / "out",
                             "--method", "mean")  # fmt: skip
    assert code == 2 and printed == "" and len(err.strip().splitlines()) == 1 and "No space left on device" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "wanted"]


def test_special_tokens_are_read_in_three_ways(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"<c>": "x=y"}')
    assert parse_special(["<a>=b=c", '{"<b>": "d"}', str(tmp_path / "s.json")]) == {
        "<a>": "b=c",
        "<b>": "d",
        "<c>": "x=y",
    }
    for bad in ("<a>", "=b", "<a>=", "{", "[1].json", '{"a": 1}'):
        with pytest.raises(QuickmergeError):
            parse_special([bad])
