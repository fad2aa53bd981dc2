"""``quickmerge generate text --attention multipole``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from quickmerge.errors import QuickmergeError
from quickmerge.multipole import Multipole
from quickmerge.multipole.cli import parse_attention

FAST = ["--max-new-tokens", "6", "--prompt", "sea the sea"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("the sea " * 40, encoding="utf-8")
    return path


def test_it_compares_and_says_what_was_read(run, tiny_folder, text, tmp_path) -> None:
    told = "multipole:ratio=0.25:interval=4,sink=2"
    code, out, err = run("generate", "--model", tiny_folder, "--file", text, *FAST, "--attention", told, "--budget",
                         "16", "--compare", "--json", tmp_path / "g.json")  # fmt: skip
    assert code == 0, err
    assert "== multipole ==" in out and "== full ==" in out
    assert "multipole:budget=16:ratio=0.25:sink=2:interval=4, 2 of 2 blocks, 1 row(s)" in err
    assert "rows for each new token and key-value head" in err and "MiB of clusters" in err
    data = json.loads((tmp_path / "g.json").read_text())
    read = data["multipole"]["attention"]
    assert data["reducer"] is None and data["keep"] is None and "attention" not in data["full"]
    # 80 words of the document, the prompt, and what was written: all of it was read, little of it key by key.
    assert data["multipole"]["tokens_per_layer"] == [83, 83] and read["tokens"] == 88
    assert read["decode_steps"] == 5 and read["updates"] >= 1 and read["kept"] <= 16
    assert 0 < read["rows_read"] < read["rows_dense"] and 0 < read["read_share"] < 1
    assert data["attention"] == "multipole:budget=16:ratio=0.25:sink=2:interval=4"


def teach(folder: Path) -> None:
    """Teach the tiny model that "the" and "sea" take turns, so that it says something."""
    model = LlamaForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = torch.tensor([[2, 3] * 40, [3, 2] * 40])
    for _ in range(20):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def test_a_budget_for_everything_gives_the_same_answer(run, tiny_folder, text) -> None:
    teach(tiny_folder)
    _, out, _ = run("generate", "--model", tiny_folder, "--file", text, *FAST, "--attention", "multipole:interval=4",
                    "--budget", "1000", "--compare")  # fmt: skip
    _, one, other = (part.strip() for part in out.replace("== full ==", "== multipole ==").split("== multipole =="))
    assert one == other and "the sea the sea" in one


def test_it_goes_together_with_merging(run, tiny_folder, text, tmp_path) -> None:
    code, _, err = run("generate", "--model", tiny_folder, "--file", text, *FAST, "--attention", "multipole:interval=4",
                       "--keep", "0.5", "--layer", "1", "--min-tokens", "0", "--json", tmp_path / "g.json")  # fmt: skip
    assert code == 0, err
    data = json.loads((tmp_path / "g.json").read_text())
    assert data["keep"] == 0.5 and data["reducer"].startswith("quickmerge")
    whole, rest = data["multipole"]["tokens_per_layer"]
    assert whole == 83 and rest < 60
    assert data["multipole"]["attention"]["tokens"] == pytest.approx((whole + rest) / 2 + 5)


def test_a_short_text_is_read_exactly(run, tiny_folder) -> None:
    code, _, err = run("generate", "--model", tiny_folder, *FAST, "--attention", "multipole")
    assert code == 0 and "too few to cluster, all of them read exactly" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attention", "multipol"], r"--attention must be multipole, got 'multipol' \(did you mean 'multipole'\?\)"),
        (["--attention", "multipole:sinks=3"], r"got 'sinks=3' \(did you mean 'sink'\?\)"),
        (["--attention", "multipole:sink"], "takes settings as name=value with a name of budget, "),
        (["--attention", "multipole:budget=3", "--budget", "4"], "budget must be given once, got 4 and 3"),
        (["--attention", "multipole:ratio=2"], "ratio must be a number above 0 and up to 1, got 2"),
        (["--attention", "multipole:space=window"], r"space must be one of rotated, windowed, got 'window'"),
        (["--attention", "multipole:first=2"], "first must be at most 1, the last block of LlamaForCausalLM"),
        (["--budget", "4"], "--budget is for multipole attention: give --attention multipole too"),
        (["--budget", "4", "--image", "a.png"], "--budget is for multipole attention: give --attention multipole too"),
        (["--attention", "multipole", "--keep", "2"], r"--keep must be a number in \(0, 1\], got 2"),
    ],
)
def test_wrong_options_are_one_sentence(run, tiny_folder, options: list[str], message: str) -> None:
    code, _, err = run("generate", "--model", tiny_folder, *FAST, *options)
    assert code == 2 and re.search(message, err) and "Traceback" not in err, err


def test_settings_are_read_as_numbers_and_words() -> None:
    found = parse_attention("multipole:ratio=0.125,coarse=0.03:space=windowed:update=False", 64)
    assert found == Multipole(budget=64, ratio=0.125, coarse=0.03, space="windowed", update=False)
    assert parse_attention("multipole", None) == Multipole()
    with pytest.raises(QuickmergeError, match=r"update must be True or False, got 'no'"):
        parse_attention("multipole:update=no", None)
