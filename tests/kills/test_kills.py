"""Commands that are killed leave the old, the new or nothing, and go on to the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="commands run in forks")

QUICK = "show over another;train prior over another;train calm, discrete;transplant"


def kills(count: int, *options: str, timeout: float) -> str:
    """What the script says of so many kills; fails if it does."""
    script = [sys.executable, str(Path(__file__).parent / "killed.py"), str(count), *options]
    done = subprocess.run(script, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_a_few_kills(tmp_path: Path) -> None:
    told = kills(6, "--only", QUICK, "--json", str(tmp_path / "k.json"), timeout=300)
    assert " of 6\n" in told and told.count("0 mixed") == 4
    rows = json.loads((tmp_path / "k.json").read_text())["rows"]
    assert {row["job"] for row in rows} == set(QUICK.split(";"))
    assert sum(row["moment"] + row["change"] + row["late"] for row in rows) == 6


@pytest.mark.slow
def test_two_hundred_kills() -> None:
    told = kills(216, "--seed", str(int.from_bytes(os.urandom(4), "big")), timeout=7200)
    hit = int(told.rsplit("kills ", 1)[1].split(" of ")[0])
    assert hit > 150
