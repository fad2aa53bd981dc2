import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from quickmerge.training.metrics import Meter, append_line, cut_after


def test_a_line_holds_means_and_goes_through_a_checkpoint() -> None:
    meter = Meter(seconds=10.0)
    meter.add({"loss": 0.1, "grad_norm": math.inf}, 4)
    meter = Meter(**json.loads(json.dumps(asdict(meter))))
    meter.add({"loss": 0.2, "grad_norm": 3.0}, 4)
    line = meter.line(2, rate=0.5, items=8, seconds=12.0)
    assert line.pop("loss") == (0.1 + 0.2) / 2
    assert line == {
        "step": 2,
        "grad_norm": 3.0,
        "learning_rate": 0.5,
        "items": 8,
        "seconds": 12.0,
        "items_per_second": 4.0,
    }


def test_what_never_was_finite_is_null(tmp_path: Path) -> None:
    meter = Meter()
    meter.add({"loss": 1.0, "other": math.nan}, 1)
    append_line(tmp_path / "m", meter.line(1, rate=1.0, items=1, seconds=1.0))
    assert json.loads((tmp_path / "m").read_text())["other"] is None


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 1', "1\n", "{}\n", ""])
def test_lines_after_a_step_are_cut(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    with path.open("a") as file:
        file.write(torn)
    cut_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_cutting_makes_the_file(tmp_path: Path) -> None:
    cut_after(tmp_path / "metrics.jsonl", 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
