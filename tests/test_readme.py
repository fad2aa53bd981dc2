"""The README is short, honest and right; that its code runs is looked at in test_pages.py."""

from __future__ import annotations

import re

from page_samples import README, ROOT, blocks, prose

TEXT = README.read_text(encoding="utf-8")


def test_a_stranger_reads_at_most_seven_hundred_words() -> None:
    before, fold, behind = TEXT.partition("<details>")
    assert fold and len(prose(before)) <= 700, len(prose(before))
    assert len(prose(behind)) < 400


def test_it_has_what_a_stranger_looks_for() -> None:
    before = TEXT.partition("<details>")[0]
    python = [block for block in blocks(README) if block.language == "python"]
    assert len(python) == 3, "a long prompt, an image, a recipe"
    assert "pip install quickmerge" in before and "`make demo`" in before and "`make test`" in before
    assert len(re.findall(r"^!\[", before, flags=re.M)) == 1, "one picture"
    assert re.findall(r"<!-- table:(\w+) -->", before) == ["short"]
    for heading, most in (("Which method for what", 5), ("Limits", 5)):
        part = before.split(f"## {heading}\n")[1].split("\n## ")[0]
        assert 1 <= len(re.findall(r"^- ", part, flags=re.M)) <= most, heading
    assert all(name in before for name in ("Multipole", "Gumiho", "CALM")), "it says what loses"


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`", TEXT):
        assert f"\n{target}:" in makefile
