from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_samples import Points, Small, lines, run_script, saved, settings

from quickmerge.training import train
from quickmerge.training.checkpoint import MODEL, load


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pairs of processes left behind; one script makes all, for it costs seconds to start."""
    folder = tmp_path_factory.mktemp("pairs")
    run_script("two_processes.py", folder)
    return folder


def told(out: Path) -> list[str]:
    return [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(2)]


def as_one_process(out: Path, alone: Path, accumulate: int = 1) -> None:
    objective = Small(dropout=0)
    train(objective, Points(), settings(steps=20, batch=6, accumulate=accumulate, log_every=4), alone)
    pair = load(out / "checkpoints" / "step-000020").model
    for name, value in objective.state_dict().items():
        assert torch.allclose(pair[name].double(), value.double(), rtol=0, atol=1e-6), name
    for one, two in zip(lines(alone), lines(out), strict=True):
        assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one_with_twice_the_batch(pairs: Path, tmp_path: Path, accumulate: int) -> None:
    assert told(pairs / f"equal-{accumulate}") == ["", ""]
    as_one_process(pairs / f"equal-{accumulate}", tmp_path, accumulate)


def test_two_processes_resume_exactly(pairs: Path) -> None:
    assert told(pairs / "stopped") == ["", ""]
    whole, stopped = ((pairs / name / "checkpoints" / "step-000008" / MODEL) for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
    assert lines(pairs / "whole") == lines(pairs / "stopped")


def test_what_one_process_meets_stops_both(pairs: Path) -> None:
    first, second = told(pairs / "broken")
    assert first == second
    assert "the loss is not finite (NaN or infinite) at step 4, on the items point" in first
    assert f"point {(pairs / 'item').read_text()}," in first
    assert first.count("point ") == 4  # the batch of one process
    assert saved(pairs / "broken") == ["step-000002", "step-000003"]


def test_a_full_disk_stops_both(pairs: Path) -> None:
    first, second = told(pairs / "full")
    assert "No space left on device" in first
    assert "the main process failed" in second
    assert saved(pairs / "full") == []


def test_a_signal_to_one_process_ends_both_with_a_checkpoint(pairs: Path) -> None:
    assert told(pairs / "terminated") == ["SystemExit: 143", "SystemExit: 143"]
    assert saved(pairs / "terminated") == ["step-000003"]


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    script = [str(Path(__file__).parents[1] / "samples" / "launched.py"), str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    as_one_process(tmp_path / "out", tmp_path / "alone")
