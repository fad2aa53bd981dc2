"""A fixed part of ``make fuzz``: hostile inputs end as right work or as one sentence, and the judge can tell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs processes that fork")


def test_hostile_inputs_end_well() -> None:
    done = subprocess.run(
        [sys.executable, HERE / "run.py", "--quick", "--jobs", "1", "--minutes", "4"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " inputs: " in done.stdout


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("pass", "right"), ("raise QuickmergeError('no')", "sentence"), ("1 / 0", "traceback"),
        ("print('\\x1b[31m')", "control characters"), ("open('canary', 'w')", "ran code"),
        ("sys.exit(2)", "not one sentence"), ("sys.exit(5)", "exit 5"), ("os.kill(os.getpid(), 11)", "signal 11"),
        ("x = bytearray(3 * 2**29)", "too much memory"), ("raise MemoryError", "too much memory"),
        ("time.sleep(99)", "hangs"),
    ],
)  # fmt: skip
def test_the_judge_sees_what_is_wrong(body: str, kind: str, tmp_path: Path) -> None:
    # in a process of its own: what forks here must not have the threads of the test run
    code = f"""
import sys, os, time, types
sys.path.insert(0, {str(HERE)!r})
import fuzz_worker as worker
from pathlib import Path
worker.SECONDS = {4 if kind == "hangs" else 30}
from quickmerge.errors import QuickmergeError
import quickmerge.cli as cli
from quickmerge.console.ending import end
def command():
    {body}
cli.main = lambda: end(command)
found = worker.judge(worker.Case("x", lambda work: []), Path({str(tmp_path / "work")!r}))
print(found.kind)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == kind, done.stdout + done.stderr
