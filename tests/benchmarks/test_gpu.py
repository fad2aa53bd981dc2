from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(out: Path, *more: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(FILE), "--out", str(out), *more], capture_output=True, text=True, check=False, timeout=300
    )
    return done, json.loads(out.read_text()) if out.exists() else {}


def test_without_a_gpu_tests_are_left_out_by_name(tmp_path: Path) -> None:
    done, found = run(tmp_path / "gpu.json", "--device", "cpu", "--only", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    tests = found["parts"]["tests"]
    if torch.cuda.is_available():
        assert tests["state"] == "passed"
    else:
        assert tests["state"] == "left out" and tests["skipped"] > 20
        assert all("needs a CUDA device" in line for line in tests["said"])
    assert found["environment"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    done, found = run(tmp_path / "gpu.json")
    assert done.returncode == 2 and not found
    assert done.stderr.strip() == "torch sees no GPU here; --device cpu runs the same script without one"


def test_what_would_run_past_the_time_is_left_out(tmp_path: Path) -> None:
    done, found = run(tmp_path / "gpu.json", "--device", "cpu", "--minutes", "0")
    assert done.returncode == 0
    assert {part["state"] for part in found["parts"].values()} == {"left out"} and len(found["parts"]) == 4


@pytest.mark.slow
def test_the_whole_of_it(tmp_path: Path) -> None:
    done, found = run(tmp_path / "gpu.json", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = found["parts"]
    assert parts["kernels"]["passed"] > 20
    assert {row["way"] for row in parts["curves"]["found"]["rows"]} == {
        "plain", "merge", "Multipole", "merge, Multipole",
    }  # fmt: skip
    assert parts["multipole"]["found"]["rows"]
