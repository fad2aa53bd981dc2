"""Photographs put together: every answer is right, no answer is right by habit, and no photograph is in two splits."""

from __future__ import annotations

import io
import random
import re
import sys
from collections import Counter
from pathlib import Path

import mosaics as script
import numpy as np
import pytest
from mosaics import KINDS, QUADRANTS, Mosaic, candidates, mosaics, photographs, pictures, put_together
from PIL import Image

from quickmerge.errors import QuickmergeError


@pytest.fixture
def photos(tmp_path) -> dict[str, list[Path]]:
    """Eight plain photographs of each kind, each of a colour of its own, not square."""
    made: dict[str, list[Path]] = {}
    for number, name in enumerate(KINDS.values()):
        for index in range(8):
            path = tmp_path / f"{number}-{index}.jpg"
            Image.new("RGB", (60, 40), (number * 18, index * 30, 100)).save(path, quality=95)
            made.setdefault(name, []).append(path)
    return made


def answers(mosaic: Mosaic, question: str) -> list[str]:
    where = dict(zip(QUADRANTS, mosaic.kinds, strict=True)) if len(mosaic.kinds) == 4 else {}
    if question == "What is this?":
        return list(mosaic.kinds)
    if question == "How many kinds of fruit are there?":
        return [str(len(set(mosaic.kinds)))]
    if match := re.fullmatch("What is at the (.*)\\?", question):
        return [where[match[1]]]
    if match := re.fullmatch("Where is the (.*)\\?", question):
        return [place for place, kind in where.items() if kind == match[1]]
    if match := re.fullmatch("How many images show an? (.*)\\?", question):
        return [str(list(mosaic.kinds).count(match[1]))]
    match = re.fullmatch("Is there an? (.*)\\?", question)
    assert match and match[1] in KINDS.values(), question
    return ["yes" if match[1] in mosaic.kinds else "no"]


def test_every_question_has_one_answer_and_it_is_the_right_one(photos) -> None:
    for index, mosaic in enumerate(mosaics(photos, "train", 200)):
        everything = candidates(mosaic, random.Random(index))
        assert len({one.question for one in everything}) == len(everything)
        for one in everything:
            assert answers(mosaic, one.question) == [one.answer], (mosaic, one)


def test_mosaics_differ_and_show_photographs_of_their_kinds(photos) -> None:
    found = list(mosaics(photos, "train", 200))
    assert len(set(found)) == 200 and found == list(mosaics(photos, "train", 200))
    for mosaic in found:
        assert len(mosaic.files) == len(set(mosaic.files)) == len(mosaic.kinds) in (1, 4)
        assert all(file in photos[kind] for file, kind in zip(mosaic.files, mosaic.kinds, strict=True))
    assert 25 < sum(len(mosaic.files) == 1 for mosaic in found) < 70
    assert {len(set(mosaic.kinds)) for mosaic in found if len(mosaic.kinds) == 4} == {1, 2, 3, 4}


def test_photographs_lie_in_their_quadrants(photos) -> None:
    for mosaic in mosaics(photos, "train", 10):
        picture = np.asarray(put_together(mosaic)).astype(int)
        assert picture.shape == (224, 224, 3)
        for place, file in enumerate(mosaic.files):
            colour = np.asarray(Image.open(file))[20, 30].astype(int)
            side = 224 if len(mosaic.files) == 1 else 112
            part = picture[place // 2 * 112 :, place % 2 * 112 :][:side, :side]
            assert np.abs(part - colour).max() <= 2


def test_no_answer_is_right_by_habit(photos) -> None:
    count: dict[str, Counter[str]] = {}
    for picture in pictures(photos, "train", 150):
        Image.open(io.BytesIO(picture.content)).verify()
        assert len(set(picture.labels)) == len(picture.labels)
        for kind, _, answer in picture.questions:
            count.setdefault(kind, Counter())[answer] += 1
    most = {"what": 1.4 / 14, "where": 0.3, "count": 0.35, "exists": 0.51}
    assert set(count) == set(most)
    for kind, of_it in count.items():
        assert of_it.most_common(1)[0][1] / of_it.total() < most[kind], (kind, of_it)


def test_splits_are_drawn_from_the_photographs_of_their_own_split(tmp_path, monkeypatch) -> None:
    for split in ("train", "test"):
        for kind in KINDS:
            (tmp_path / split / kind).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (8, 8)).save(tmp_path / split / kind / f"{index}.jpg")
    with pytest.raises(QuickmergeError, match="python benchmarks"):
        photographs(tmp_path, "train")
    monkeypatch.setattr(script, "is_whole", lambda folder: True)
    for split in ("train", "test"):
        used = {file for mosaic in mosaics(photographs(tmp_path, split), split, 100) for file in mosaic.files}
        assert used and all(file.parent.parent == tmp_path / split for file in used)


def test_the_script_tells_what_is_missing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("QUICKMERGE_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["mosaics.py", "--out", str(tmp_path / "out")])
    assert script.main() == 2
    assert "python benchmarks/labelled_images.py" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["mosaics.py", "--test", "0"])
    with pytest.raises(SystemExit):
        script.main()
