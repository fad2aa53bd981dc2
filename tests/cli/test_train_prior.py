"""``quickmerge train prior`` on a tiny model: train, resume, use, and one clear sentence for what is wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from video_samples import write_frames

SMALL = ["--width", "16", "--context", "60", "--target", "10", "--layer", "1", "--keep", "0.4", "--batch", "2",
         "--save-every", "2"]  # fmt: skip


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text("the sea the the sea " * 60 + name)
    return folder


def test_train_then_generate_and_bench_with_it(run, tiny_folder, texts, tmp_path) -> None:
    out = tmp_path / "prior"
    code, told, err = run("train", "prior", "--model", tiny_folder, "--data", texts, "--out", out, "--steps", 3, *SMALL)
    assert code == 0 and f"wrote {out}" in told and "8 windows of 70 tokens" in err
    config = json.loads((out / "config.json").read_text())
    assert config["kind"] == "quickmerge-prior" and config["trained_for"]["layers"] == [1]
    assert not list(out.rglob("*.pt")) and not list(out.rglob("*.pkl")) and not list(out.rglob("*.bin"))
    file = tmp_path / "doc.txt"
    file.write_text("the sea " * 700)
    base = ["--model", tiny_folder, "--prior", out, "--layer", 1]
    short = texts / "short.txt"
    short.write_text("the sea " * 35)
    code, _, err = run("generate", *base, "--prompt", "the sea the sea", "--file", short, "--max-new-tokens", 2,
                       "--min-tokens", 0, "--json", tmp_path / "g.json")  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "g.json").read_text())["reducer"] == "quickmerge+prior"
    code, told, err = run("bench", *base, "--text", file, "--keep", "0.4", "--reducer", "quickmerge", "--context", 90,
                          "--target", 9, "--json", tmp_path / "b.json")  # fmt: skip
    if code == 0:  # a random model need not profit from its context, which bench refuses
        rows = json.loads((tmp_path / "b.json").read_text())["rows"]
        assert {r["reducer"] for r in rows} == {"quickmerge", "quickmerge+prior"}
    else:
        assert "full context must predict" in err


def test_a_stopped_run_goes_on_to_the_same_weights(run, tiny_folder, texts, tmp_path) -> None:
    base = ["train", "prior", "--model", tiny_folder, "--data", texts, "--steps", 6, *SMALL]
    assert run(*base, "--out", tmp_path / "whole")[0] == 0
    code, told, _ = run(*base, "--out", tmp_path / "parts", "--max-minutes", "1e-6")
    assert code == 0 and "stopped after step 1; go on with --resume" in told
    assert run(*base, "--out", tmp_path / "parts", "--resume")[0] == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    code, _, err = run(*base, "--out", tmp_path / "parts", "--resume", "--learning-rate", "0.5")
    assert code == 2 and "learning_rate" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "1.5"], "--keep must be a number in (0, 1], got 1.5"),
        (["--head", "gausian"], "did you mean 'gaussian'"),
        (["--context", "5000"], "training needs a text of at least 5010 tokens"),
        (["--depths", "0,1"], "depths must lie in 1..1"),
        (["--precision", "int8"], "precision must be one of no, bf16, fp16, got 'int8'"),
        (["--steps", "0"], "steps must be a whole number of at least 1, got 0"),
        (["--directions", "up"], "directions must be one of forward, both, got 'up'"),
        (["--resume"], "resume"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(run, tiny_folder, texts, tmp_path, options, message) -> None:
    code, _, err = run(
        "train", "prior", "--model", tiny_folder, "--data", texts, "--out", tmp_path / "o", *SMALL, *options
    )
    assert code == 2 and message in err and "Traceback" not in err


def test_empty_data_and_a_wrong_prior(run, tiny_folder, texts, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = run("train", "prior", "--model", tiny_folder, "--data", tmp_path / "empty", "--out", tmp_path / "o")
    assert code == 2 and str(tmp_path / "empty") in err
    generate = ["generate", "--model", tiny_folder, "--prompt", "the sea", "--file", texts / "a.txt"]
    code, _, err = run(*generate, "--prior", tmp_path / "nothing")
    assert code == 2 and "prior must be a folder with config.json and model.safetensors" in err
    code, _, err = run(*generate, "--prior", tmp_path / "nothing", "--reducer", "tome")
    assert code == 2 and "--prior belongs to the reducer quickmerge, got tome" in err


def test_images_and_videos_train_too(run, tmp_path) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        pixels = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    small = ["--size", 16, "--patch", 4, "--width", 16, "--steps", 2, "--batch", 2, "--keep", "0.5,1"]
    code, told, err = run("train", "prior", "--data", folder, "--out", tmp_path / "p", *small)
    assert code == 0 and "3 images" in err and f"wrote {tmp_path / 'p'}" in told
    assert json.loads((tmp_path / "p" / "config.json").read_text())["trained_for"]["kind"] == "images"
    code, _, err = run("train", "prior", "--data", folder, "--out", tmp_path / "q", *small, "--patch", 5)
    assert code == 2 and "patch" in err


def test_videos_train_too(run, tmp_path) -> None:
    pytest.importorskip("av")
    write_frames(tmp_path / "a.mp4", (np.full((32, 32, 3), 20 * number, np.uint8) for number in range(9)), fps=8)
    small = ["--size", 16, "--patch", 4, "--frames", 4, "--width", 48, "--steps", 1, "--batch", 2, "--keep", "0.5"]
    code, told, err = run("train", "prior", "--data", tmp_path / "a.mp4", "--out", tmp_path / "p", *small)
    assert code == 0 and "2 clips of 4 frames" in err and "wrote" in told


@pytest.mark.slow
def test_killed_at_three_random_moments_it_ends_with_the_same_weights(tiny_folder, texts, tmp_path) -> None:
    """The command itself, noise and drawn keeps included, killed with SIGKILL while steps are taken."""
    rng = random.Random(0)
    base = [sys.executable, "-c", "from quickmerge.cli import main; main()", "train", "prior", "--model", tiny_folder,
            "--data", texts, "--steps", 40, *SMALL, "--keep", "0.4,0.5,0.6"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: Path, *more: object) -> subprocess.Popen[bytes]:
        command = [str(part) for part in (*base, "--out", out, *more)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    out = tmp_path / "killed"
    for turn in range(3):
        steps = out / "checkpoints"
        seen = {path.name for path in steps.glob("step-*")}
        process = start(out, *(["--resume"] if turn else []))
        while process.poll() is None and not {path.name for path in steps.glob("step-*")} - seen:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert start(out, "--resume").wait() == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    assert [json.loads(line)["loss"] for line in lines[0]] == [json.loads(line)["loss"] for line in lines[1]]
