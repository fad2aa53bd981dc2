"""Drawn scenes: every answer is right, no answer is right by habit, and what is drawn is what is meant."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from annotated_images import Picture
from PIL import Image
from scene_drawing import draw_image
from scene_questions import candidates
from scene_things import COLOURS, REGIONS, SHAPES, SIDE, Scene, draw_scene
from scenes import main, pictures, scenes

from quickmerge.datasets.annotated import read_annotated
from quickmerge.errors import QuickmergeError


def place(x: float, y: float) -> str:
    """The region of a point by thirds of the image, which knows nothing of cells."""
    row = ("top", "", "bottom")[int(y * 3 // SIDE)]
    column = ("left", "", "right")[int(x * 3 // SIDE)]
    return f"{row} {column}".strip() or "center"


def extent(thing) -> set[str]:
    """The regions that a thing's centre, and for a wide word its ends, lie in."""
    half = (len(thing.cells) - 1) * SIDE / 8
    return {place(thing.x - half, thing.y), place(thing.x, thing.y), place(thing.x + half, thing.y)}


def answers(scene: Scene, question: str) -> list[str]:
    """All answers that a question could have: one list, from what lies where."""
    things = scene.things

    def named(name: str) -> list:
        """Things that a name could mean."""
        *colour, noun = name.split()
        if noun.isdigit():
            return [t for t in things if t.kind == "digit" and t.name == noun]
        if noun in ("digit", "word"):
            return [t for t in things if t.kind == noun]
        return [t for t in things if t.kind == "shape" and t.name == noun and colour in ([], [t.colour])]

    def found(pattern: str) -> str | None:
        match = re.fullmatch(pattern, question)
        return match[1] if match else None

    if region := found("What shape is (?:at|in) the (.*)\\?"):
        return [t.name for t in things if region in extent(t)]
    if name := found("Where is the (.*)\\?"):
        return [" or ".join(sorted(extent(t))) for t in named(name)]
    if name := found("What colour is the (.*)\\?"):
        return [t.colour for t in named(name)]
    if question == "What word is written?":
        return [t.name for t in named("word")]
    if question == "Which digit is shown?":
        return [t.name for t in named("digit")]
    if region := found("Which digit is (?:at|in) the (.*)\\?"):
        return [t.name for t in things if region in extent(t)]
    if name := found("How many (.*) are there\\?"):
        if name.endswith(" shapes"):
            return [str(sum(t.kind == "shape" and t.colour == name.split()[0] for t in things))]
        return [str(len(named(name.removesuffix("s") if name != "crosses" else "cross")))]
    name = found("Is there an? (.*)\\?")
    assert name, question
    return ["yes" if named(name) else "no"]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_question_has_one_answer_and_it_is_the_right_one(split: str) -> None:
    for index, scene in enumerate(scenes(split, 150)):
        everything = candidates(scene, random.Random(index))
        assert len({one.question for one in everything}) == len(everything)
        for one in everything:
            assert answers(scene, one.question) == [one.answer], (scene, one)


def test_all_that_is_clear_can_be_asked() -> None:
    """A thing alone in its region is asked about, one that shares it is not."""
    for index, scene in enumerate(scenes("train", 100)):
        asked = {one.question for one in candidates(scene, random.Random(index)) if one.kind == "what"}
        clear = set()
        for region in REGIONS:
            there = [t for t in scene.things if region in extent(t)]
            if len(there) == 1 and there[0].kind == "shape":
                clear.add("What shape is in the center?" if region == "center" else f"What shape is at the {region}?")
        assert asked == clear


def test_scenes_are_what_they_should_be() -> None:
    found = list(scenes("train", 300))
    for scene in found:
        assert 3 <= len(scene.things) <= 8 and len(set(scene.labels)) == len(scene.labels)
        cells = [cell for thing in scene.things for cell in thing.cells]
        assert len(cells) == len(set(cells)) and all(0 <= at < 4 for cell in cells for at in cell)
        for thing in scene.things:
            half = thing.size / 2
            assert half <= thing.y <= SIDE - half
            row = thing.cells[0][0]
            assert row * 56 <= thing.y - half and thing.y + half <= (row + 1) * 56
            assert (thing.kind == "word") or thing.region == place(thing.x, thing.y)
        shapes = Counter(t.name for t in scene.things if t.kind == "shape")
        assert max(shapes.values()) <= 4
    words = sum(any(t.kind == "word" for t in scene.things) for scene in found)
    digits = sum(any(t.kind == "digit" for t in scene.things) for scene in found)
    assert 110 < words < 190 and 130 < digits < 220
    assert {t.name for s in found for t in s.things if t.kind == "shape"} == set(SHAPES)


def test_no_answer_is_right_by_habit() -> None:
    asked = [one for picture in pictures("train", 250) for one in picture.questions]
    by_kind: dict[str, Counter[str]] = {}
    by_question: dict[str, Counter[str]] = {}
    for kind, question, answer in asked:
        by_kind.setdefault(kind, Counter())[answer] += 1
        by_question.setdefault(question, Counter())[answer] += 1
    assert set(by_kind) == {"what", "where", "colour", "read", "count", "exists"}
    most = {"what": 1.3 / 8, "where": 1.2 / 9, "colour": 1.4 / 8, "read": 0.1, "count": 0.3, "exists": 0.51}
    for kind, count in by_kind.items():
        assert count.most_common(1)[0][1] / count.total() < most[kind], (kind, count)
    # not even to one who knows each question's commonest answer
    usual = sum(count.most_common(1)[0][1] for question, count in by_question.items() if count.total() >= 20)
    total = sum(count.total() for question, count in by_question.items() if count.total() >= 20)
    assert total > 600 and usual / total < 0.4


def test_images_have_8_to_12_questions_of_all_kinds_and_come_out_the_same() -> None:
    once, again = list(pictures("val", 12)), list(pictures("val", 12))
    assert once == again
    assert [p.labels for p in once] == [s.labels for s in scenes("val", 12)]
    for picture in once:
        assert 8 <= len(picture.questions) <= 12
        assert len({question for _, question, _ in picture.questions}) == len(picture.questions)
        assert {"count", "exists", "where"} <= {kind for kind, _, _ in picture.questions}
    # a longer set begins with the shorter one
    assert list(pictures("val", 5)) == once[:5]


def test_no_scene_is_in_two_splits_or_twice_in_one() -> None:
    seen: dict[frozenset, str] = {}
    for split, count in (("train", 400), ("val", 60), ("test", 60)):
        for scene in scenes(split, count):
            assert scene.split == split
            key = frozenset((t.label, t.colour, t.cells) for t in scene.things)
            assert key not in seen
            seen[key] = split
    # of scenes drawn without regard to splits about eight tenths are for training
    drawn = [draw_scene(split, random.Random(1)) for split in ("train", "val", "test")]
    assert [scene.split for scene in drawn] == ["train", "val", "test"]


def test_things_are_drawn_where_and_as_they_are_said_to_be() -> None:
    for index, scene in enumerate(scenes("train", 60)):
        picture = draw_image(scene, index)
        assert picture.size == (SIDE, SIDE) and picture.mode == "RGB"
        pixels = np.asarray(picture).astype(int)
        bare = np.asarray(draw_image(Scene((), scene.ground, scene.angle, scene.noise), index)).astype(int)
        changed = np.abs(pixels - bare).sum(-1) > 30
        inside = np.zeros_like(changed)
        for thing in scene.things:
            (row, first), (_, last) = thing.cells[0], thing.cells[-1]
            cell = (slice(row * 56, row * 56 + 56), slice(first * 56, last * 56 + 56))
            inside[cell] = True
            there = np.argwhere(changed[cell])
            assert len(there) > 60, thing
            # drawn in its colour, and where it should be
            colour = np.median(pixels[cell][changed[cell]], axis=0)
            assert np.abs(colour - COLOURS[thing.colour]).max() <= 12, thing
            middle = (there.min(0) + there.max(0)) / 2 + (row * 56, first * 56)
            assert abs(middle[0] - thing.y) < 8 and abs(middle[1] - thing.x) < 8, thing
        assert not (changed & ~inside).any(), scene


def test_shapes_differ_from_one_another() -> None:
    """Filled to different degrees and in different places, so that none could be taken for another."""
    masks = {}
    for scene in scenes("train", 200):
        for thing in scene.things:
            if thing.kind == "shape" and thing.name not in masks:
                alone = Scene((thing,), ((128, 128, 128), (128, 128, 128)), 0.0, 0.0)
                pixels = np.asarray(draw_image(alone, 0)).astype(int)
                mask = Image.fromarray((np.abs(pixels - 128).sum(-1) > 60).astype(np.uint8) * 255)
                masks[thing.name] = np.asarray(mask.crop(mask.getbbox()).resize((32, 32))) > 127
    assert set(masks) == set(SHAPES)
    for one in SHAPES:
        for other in SHAPES:
            if one < other:
                both = (masks[one] & masks[other]).sum() / (masks[one] | masks[other]).sum()
                assert both < 0.88, (one, other, both)


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Run the script; its exit code and what it says."""

    def run(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["scenes.py", *map(str, args)])
        try:
            code = main()
        except SystemExit as stopped:
            code = int(str(stopped.code))
        return code, capsys.readouterr().err

    return run


def test_the_script_writes_all_or_nothing_and_a_second_run_does_nothing(tmp_path, run) -> None:
    counts = ("--train", 5, "--val", 2, "--test", 3, "--out", tmp_path)
    code, said = run(*counts)
    assert code == 0 and "5 train, 2 val, 3 test images in" in said
    folder = tmp_path / "scenes-5-2-3"
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        read = read_annotated(folder / split)
        assert [p.path.name for p in read] == [f"{n:05d}.png" for n in range(1, count + 1)]
        drawn = list(pictures(split, count))
        assert [list(p.labels) for p in read] == [p.labels for p in drawn]
        assert [[(q.kind, q.question, q.answer) for q in p.questions] for p in read] == [p.questions for p in drawn]
        assert [p.path.read_bytes() for p in read] == [p.content for p in drawn]
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    code, said = run(*counts)
    assert code == 0 and "already" in said
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    # a damaged one is made anew
    (folder / "test" / "00001.png").write_bytes(b"")
    assert run(*counts)[0] == 0
    assert (folder / "test" / "00001.png").read_bytes() == next(pictures("test", 1)).content
    # and one of another recipe
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["about"]["recipe"] = -1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(*counts)[0] == 0
    assert json.loads((folder / "manifest.json").read_text())["about"]["recipe"] > 0


def test_a_run_that_breaks_off_leaves_nothing(tmp_path, run, monkeypatch) -> None:
    def broken(split: str, count: int) -> Iterator[Picture]:
        yield from pictures(split, 1)
        raise QuickmergeError("the disk is full")

    monkeypatch.setattr("scenes.pictures", broken)
    code, said = run("--train", 2, "--val", 2, "--test", 2, "--out", tmp_path)
    assert code == 2 and "the disk is full" in said
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_the_script_tells_bad_settings_in_one_sentence(tmp_path, run) -> None:
    code, said = run("--train", 0, "--out", tmp_path)
    assert code == 2 and "must be at least 1" in said and not list(tmp_path.iterdir())
    (tmp_path / "scenes-1-1-1").mkdir()
    (tmp_path / "scenes-1-1-1" / "mine.txt").write_text("mine")
    code, said = run("--train", 1, "--val", 1, "--test", 1, "--out", tmp_path)
    assert code == 2 and "holds something else" in said
    assert [p.name for p in (tmp_path / "scenes-1-1-1").iterdir()] == ["mine.txt"]
