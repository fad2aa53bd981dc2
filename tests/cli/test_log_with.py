"""``--log-with`` by accelerate's own tracker and a package that only notes what it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAKE = """
import json, os
class Run:
    def __init__(self, **given): note("init", given)
    def log(self, values, step=None): note("log", {"step": step, "loss": values["loss"]})
    def finish(self): note("finish", {})
def note(what, given):
    with open(os.environ["NOTES"], "a") as file: file.write(json.dumps([what, given]) + "\\n")
note("import", {})
def init(**given): return Run(**given)
class config:
    update = staticmethod(lambda values, **_: note("config", {"steps": values["steps"]}))
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    (folder / "trackio-1.0.dist-info").mkdir(parents=True)
    (folder / "trackio-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trackio\nVersion: 1.0\n")
    (folder / "trackio.py").write_text(FAKE)
    return folder


def test_a_run_is_tracked_over_a_stop(tiny_folder: Path, site: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the sea the the sea " * 60)
    out, notes = tmp_path / "out", tmp_path / "notes.jsonl"
    base = ["train", "prior", "--model", tiny_folder, "--data", tmp_path / "a.txt", "--out", out, "--steps", 3,
            "--width", 16, "--context", 60, "--target", 10, "--layer", 1, "--keep", 0.4, "--batch", 2,
            "--log-every", 1]  # fmt: skip

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(site), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path, "NOTES": str(notes)}
        command = [sys.executable, "-m", "quickmerge", *map(str, base), *more]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    first = run("--max-minutes", "1e-6")
    assert first.returncode == 0 and not notes.exists(), first.stderr  # nothing is imported unless it is asked for
    again = run("--resume", "--log-with", "trackio")
    assert again.returncode == 0, again.stderr
    found = [json.loads(line) for line in notes.read_text().splitlines()]
    assert [what for what, _ in found] == ["import", "init", "config", "log", "log", "log", "finish"]
    assert found[1][1]["project"] == "quickmerge" and found[1][1]["name"].startswith("out-")
    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [given for what, given in found if what == "log"] == [
        {"step": line["step"], "loss": line["loss"]} for line in written
    ]


def test_what_is_not_there_is_one_sentence_before_anything_is_read(run, tmp_path: Path) -> None:
    for name in ("wandb", "trackio"):
        code, out, err = run("train", "calm", "--data", tmp_path, "--out", tmp_path / "o", "--log-with", name)
        assert (
            code == 2
            and out == ""
            and err == f"quickmerge: log_with {name} needs the package {name}: pip install {name}\n"
        )
    assert not (tmp_path / "o").exists()
