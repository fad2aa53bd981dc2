"""Calibration: the smallest share above a floor, what the recipe remembers of it, and what can't be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from counting_model import counting_model, documents

import quickmerge as qm
from quickmerge.bench.quality import recovery
from quickmerge.recipe import Measured
from quickmerge.recipe.calibration import FEW, HALF, calibrate

SHORT: dict[str, Any] = {"tokens": 280, "target": 24}
RECIPE = qm.Recipe(
    merge=qm.Merge(qm.QuickMerge(keep=0.4), mode=qm.Prefix(protect="literals")), decoding=qm.PromptLookup()
)


@pytest.fixture(scope="module")
def host() -> tuple[Any, Any]:
    return counting_model()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records") / "records.jsonl"


@pytest.fixture(scope="module")
def found(host: tuple[Any, Any], file: Path) -> Any:
    return calibrate(*host, documents(2 * HALF), RECIPE, floor=0.9, step=0.1, records=file, name="counts", **SHORT)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_chosen_share_is_the_smallest_measured_one_above_the_floor(found: Any) -> None:
    assert found.chosen is not None and found.chosen.value >= 0.9
    assert all((point.value >= 0.9) == (point.keep >= found.chosen.keep) for point in found.points)
    below = [point.keep for point in found.points if point.keep < found.chosen.keep]
    assert max(below) == pytest.approx(found.chosen.keep - 0.1), "the next smaller share was not tried"
    assert found.recipe == replace(
        RECIPE, merge=replace(RECIPE.merge, reducer=qm.QuickMerge(keep=found.chosen.keep))
    )  # fmt: skip


def test_points_follow_from_the_records(found: Any, file: Path) -> None:
    """The plain model once for each document; each half its own documents; scores as those of `recovery`."""
    rows = lines(file)
    plain = {row["item"]: row for row in rows if row["keep"] is None}
    assert len(plain) == 2 * HALF == len([row for row in rows if row["keep"] is None])
    at = {row["item"]: row for row in rows if row["keep"] == found.chosen.keep}
    assert len(at) == 2 * HALF, "the chosen share was measured on all, half of them held out"
    for keep in {row["keep"] for row in rows} - {None, found.chosen.keep}:
        mine = [row["item"] for row in rows if row["keep"] == keep]
        point = next(p for p in found.points if p.keep == keep)
        score = recovery(
            [r["nll"] for r in rows if r["keep"] == keep], [plain[i]["full"] for i in mine],
            [plain[i]["none"] for i in mine],
        )  # fmt: skip
        assert (point.value, point.low, point.high) == pytest.approx((score.recovery, score.low, score.high))
        assert len(mine) == HALF == point.documents
    assert found.check.documents == HALF and found.check.keep == found.chosen.keep


def test_what_stands_in_the_file_is_not_measured_again(host: tuple[Any, Any], found: Any, file: Path) -> None:
    """Interrupted work goes on: another floor on the same records measures what is missing alone."""
    before = len(lines(file))
    again = calibrate(*host, documents(2 * HALF), RECIPE, floor=0.9, step=0.1, records=file, name="counts", **SHORT)
    assert again == found and len(lines(file)) == before


def test_stopped_in_the_middle_nothing_is_lost_or_half_written(host: tuple[Any, Any], tmp_path: Path) -> None:
    file, seen = tmp_path / "r.jsonl", []

    def stop(label: str) -> None:
        seen.append(label)
        if len(seen) == 6:
            raise KeyboardInterrupt

    given: dict[str, Any] = {"floor": 0.9, "step": 0.4, "records": file, **SHORT}
    with pytest.raises(KeyboardInterrupt):
        calibrate(*host, documents(4), qm.QuickMerge(), advance=stop, **given)
    held = lines(file)
    assert held
    calibrate(*host, documents(4), qm.QuickMerge(), **given)
    assert lines(file)[: len(held)] == held
    keys = [(row["item"], row["keep"]) for row in lines(file)]
    assert len(keys) == len(set(keys))


def test_the_recipe_remembers(found: Any, host: tuple[Any, Any], tmp_path: Path) -> None:
    measured = found.recipe.calibration
    assert (measured.value, measured.low, measured.high) == (found.check.value, found.check.low, found.check.high)
    assert measured.held_out and measured.documents == HALF and measured.floor == 0.9 and measured.model == "counts"
    found.recipe.save_pretrained(tmp_path / "recipe")
    back = qm.Recipe.from_pretrained(tmp_path / "recipe")
    assert back == found.recipe and back.calibration == measured
    told = back.told(host[0], tokens=300)
    assert str(measured) in str(told) and told.as_dict()["calibration"] == measured.as_dict()
    assert "held-out documents" in str(measured) and "floor 0.9" in str(measured)
    assert "date" not in (tmp_path / "recipe" / "recipe.json").read_text(encoding="utf-8")


def test_what_was_measured_does_not_count_for_being_equal_and_goes_with_other_settings(found: Any) -> None:
    bare = replace(found.recipe, calibration=None)
    assert bare == found.recipe and hash(bare) == hash(found.recipe)
    assert replace(found.recipe, decoding=None).calibration is None
    assert replace(found.recipe, merge=qm.QuickMerge(keep=0.1)).calibration is None
    with pytest.raises(qm.QuickmergeError, match="calibration must be that of"):
        qm.Recipe(calibration="good")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "quickmerge keep 0.01"}, "calibration is of another recipe, 'quickmerge keep 0.01'"),
        ({"value": "much"}, "calibration.value must be a finite number, got 'much'"),
        ({"documents": 0}, "calibration.documents must be a whole number of at least 1, got 0"),
        ({"held_out": 1}, "calibration.held_out must be true or false, got 1"),
        (
            {"flavour": 1},
            "calibration has the unknown entry 'flavour' .did you mean 'floor'.*: it was written by quickmerge 99.0",
        ),
        (None, "calibration.label is missing"),
    ],
)
def test_an_altered_record_is_one_sentence(found: Any, change: Any, message: str, tmp_path: Path) -> None:
    found.recipe.save_pretrained(tmp_path)
    path = tmp_path / "recipe.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["quickmerge"] = "99.0"
    data["calibration"] = {} if change is None else {**data["calibration"], **change}
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(qm.QuickmergeError, match=message):
        qm.Recipe.from_pretrained(tmp_path)


def test_few_documents_say_so(host: tuple[Any, Any]) -> None:
    few = calibrate(*host, documents(2), qm.SnapKV(keep=0.5), floor=0.5, step=0.3, **SHORT)
    assert few.check is None and few.points[0].low is None
    told = str(few)
    assert f"2 documents are too few for an interval, which takes {FEW}" in told
    assert f"too few to hold half of them out, which takes {2 * HALF}" in told
    assert few.recipe is not None and few.recipe.cache.keep == few.chosen.keep
    assert not few.recipe.calibration.held_out and "no interval" in str(few.recipe.calibration)
    with pytest.raises(qm.QuickmergeError, match=f"confident needs an interval.*at least {FEW}"):
        calibrate(*host, documents(2), qm.SnapKV(keep=0.5), confident=True, **SHORT)


def test_confident_goes_by_the_lower_end(host: tuple[Any, Any], found: Any, file: Path) -> None:
    sure = calibrate(
        *host, documents(2 * HALF), RECIPE, floor=0.9, step=0.1, confident=True, records=file, name="counts", **SHORT
    )  # fmt: skip
    assert sure.chosen is None or (sure.chosen.low >= 0.9 and sure.chosen.keep >= found.chosen.keep)
    assert all(
        (point.low >= 0.9) == (sure.chosen is not None and point.keep >= sure.chosen.keep) for point in sure.points
    )


def test_no_share_may_do(host: tuple[Any, Any], tmp_path: Path) -> None:
    none = calibrate(*host, documents(3), qm.Truncate(keep=0.5), floor=1.0, lowest=0.1, step=0.3, **SHORT)
    assert none.chosen is None and none.recipe is None and none.as_dict()["recipe"] is None
    assert f"no keep below 1 stays above 1: the best is {none.best}" in str(none)
    assert none.best.value == max(point.value for point in none.points)


def test_a_score_that_does_not_rise_is_told() -> None:
    from quickmerge.recipe.calibration import Calibration, Point, _remarks

    points = tuple(
        Point(keep, value, None, None, 3, None, 0.5) for keep, value in ((0.2, 0.95), (0.4, 0.9), (0.6, 0.99))
    )
    odd = Calibration("recovery", 0.93, False, points, points[2], None, None, ())
    assert not odd.monotone and "keep 0.2 has 0.950 and keep 0.4 0.900" in _remarks(odd)[0]


def test_a_task_and_literals_are_scores_too(host: tuple[Any, Any]) -> None:
    """The counting model can do neither, and that is what is said; a model that can is measured in the slow tests."""
    for score, why in (("needle", "none of the questions"), ("literals", "none of their literals")):
        with pytest.raises(qm.QuickmergeError, match=f"texts must be of some use to the plain model.*{why}"):
            calibrate(*host, documents(1), qm.QuickMerge(), score=score, samples=1, **{**SHORT, "tokens": 420})


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("quickmerge", {}, "recipe must be a Recipe, a reducer, a Merge or a method for the cache, got 'quickmerge'"),
        (
            qm.Recipe(decoding=qm.PromptLookup()),
            {},
            "recipe must merge the text or evict from the cache to have a keep",
        ),
        (qm.QuickMerge(keep=qm.Count(30)), {}, "recipe must have a number as keep of merge to calibrate it"),
        (qm.Recipe(visual=qm.SCOPE(keep=0.5)), {}, "recipe must have no visual to be calibrated on texts"),
        (qm.QuickMerge(), {"floor": 0}, r"floor must be a number in \(0, 1\], got 0"),
        (qm.QuickMerge(), {"floor": 97}, r"floor must be a number in \(0, 1\], got 97"),
        (qm.QuickMerge(), {"step": 0.0001}, "step must be at least 0.001"),
        (qm.QuickMerge(), {"lowest": 1}, "lowest must be below 1"),
        (qm.QuickMerge(), {"score": "recover"}, "score must be recovery, literals, or tasks of .*got 'recover'"),
        (qm.QuickMerge(), {"tokens": 100}, "tokens must be at least 256, below which the recipe leaves texts alone"),
        (qm.QuickMerge(), {"texts": []}, "texts must be at least one document, got none"),
        (qm.QuickMerge(), {"texts": ["short"]}, "text 1 must have at least 1000 tokens"),
        (qm.Merge(qm.QuickMerge(), layer=99), {}, "99"),
    ],
)
def test_what_can_t_be_is_one_sentence(
    host: tuple[Any, Any], recipe: Any, settings: dict[str, Any], message: str
) -> None:
    given = {"texts": documents(1), **SHORT, **settings}
    with pytest.raises(ValueError, match=message):
        calibrate(*host, given.pop("texts"), recipe, **given)


def test_a_record_prints_what_it_is_of() -> None:
    one = Measured("q", "m", "literals", 0.9, 0.95, 1, False, True, 512, "float32", "ab", 0, "1", low=0.91, high=0.99)
    assert str(one) == (
        "calibrated: literals 0.950 (0.910 to 0.990) on 1 document of 512 tokens, m in float32; "
        "floor 0.9 by the lower end"
    )
