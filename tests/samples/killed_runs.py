"""Run by test_kill.py: trains in child processes and kills them with SIGKILL. The parent itself runs no torch code."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 (a first optimizer step loads it: here once for all children)
from training_samples import Points, Small, saved, settings

from quickmerge import files
from quickmerge.training import checkpoint, train

CONFIG = settings(steps=60, save_every=7, log_every=5)
SHORT = settings(steps=6, save_every=2, log_every=4)


def in_child(action: Callable[[], Any]) -> int:
    """Start a child that does this. Returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def succeed(child: int) -> None:
    _, status = os.waitpid(child, 0)
    assert status == 0, f"a run ended with status {status}"


def newest(out: Path) -> int:
    steps = [int(name[5:]) for name in saved(out) if name[0] != "."] if (out / "checkpoints").exists() else []
    return max(steps, default=0)


def at_random_moments(folder: Path) -> None:
    """Kill a run three times, a moment after it has made one more checkpoint at least."""
    succeed(in_child(lambda: train(Small(), Points(), CONFIG, folder / "whole")))
    out = folder / "killed"
    moments = random.Random(os.getpid())
    for attempt in range(3):
        before = newest(out)
        slow = {"resume": attempt > 0, "on_step": lambda *_: time.sleep(0.02)}
        child = in_child(lambda slow=slow: train(Small(), Points(), CONFIG, out, **slow))
        deadline = time.monotonic() + 30
        while newest(out) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the run was over before it could be killed ({status})"
        print("killed behind step", newest(out))
    succeed(in_child(lambda: train(Small(), Points(), CONFIG, out, resume=True)))


def at_each_write(folder: Path) -> None:
    """Kill a run before its 1st, 2nd, ... write to the disk, each time in a folder of its own."""
    succeed(in_child(lambda: train(Small(), Points(), SHORT, folder / "whole")))
    for number in range(1, 1000):
        out = folder / f"killed-{number}"

        def die_at(number: int = number, out: Path = out) -> None:
            left = [number]
            for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (checkpoint, "save_file")):
                setattr(module, name, counted(getattr(module, name), left))
            train(Small(), Points(), SHORT, out)

        child = in_child(die_at)
        _, status = os.waitpid(child, 0)
        if status == 0:
            print("kills", number - 1)
            return
        assert os.WIFSIGNALED(status), status
        succeed(in_child(lambda out=out: train(Small(), Points(), SHORT, out, resume=newest(out) > 0)))


def counted(function: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return call


def between_renames(folder: Path) -> None:
    """Kill while an old folder is already away and the new one not yet there."""
    target = folder / "target"
    files.write_folder(target, lambda work: files.write_bytes(work / "word", b"old"))

    def die() -> None:
        os.rename = counted(os.rename, [2])
        files.write_folder(target, lambda work: files.write_bytes(work / "word", b"new"))

    _, status = os.waitpid(in_child(die), 0)
    assert os.WIFSIGNALED(status) and not target.exists()


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
