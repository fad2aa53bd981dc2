"""Run by test_processes.py: trains with two processes on gloo, without a launcher's cost of starting them."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 (a first optimizer step loads it: here once for all children)
from training_samples import NamedPoints, Points, Small, settings

from quickmerge.training import checkpoint, train
from quickmerge.training.metrics import Stream


def pair(action: Callable[[int], Any], out: Path) -> None:
    """Do this in two processes that know of one another; each writes what it raised beside `out`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a hang ends the child, and so the test
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
            told = ""
            try:
                action(rank)
            except BaseException as error:
                told = f"{type(error).__name__}: {error}"
            Path(f"{out}.{rank}.json").write_text(json.dumps(told))
            os._exit(0)
        children.append(child)
    for child in children:
        _, status = os.waitpid(child, 0)
        assert status == 0, f"a process ended with status {status}"


def equal(folder: Path) -> None:
    for accumulate in (1, 2):
        config = settings(steps=20, batch=3, accumulate=accumulate, log_every=4)
        out = folder / f"equal-{accumulate}"
        pair(lambda _, out=out, config=config: train(Small(dropout=0), Points(), config, out), out)


def resumed(folder: Path) -> None:
    """With dropout: stopped by the time in the middle, then gone on."""
    config = settings(steps=8, save_every=3)
    pair(lambda _: train(Small(), Points(), config, folder / "whole"), folder / "whole")
    short = settings(steps=8, save_every=3, max_minutes=1e-9)
    pair(lambda _: train(Small(), Points(), short, folder / "stopped"), folder / "stopped")
    pair(lambda _: train(Small(), Points(), config, folder / "stopped", resume=True), folder / "stopped")


def broken_item(folder: Path) -> None:
    """One of the two processes meets an item that is NaN, in the fourth step."""
    out = folder / "broken"
    config = settings(save_every=1)
    item = Stream(37, config.seed).micro_steps(3, batch=4, accumulate=1, processes=2, rank=1)[0][2]
    pair(lambda _: train(Small(), NamedPoints(broken=item), config, out), out)
    (folder / "item").write_text(str(item))


def full_disk(folder: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def act(_: int) -> None:
        checkpoint.save_file = full
        train(Small(), Points(), settings(), folder / "full")

    pair(act, folder / "full")


def terminated(folder: Path) -> None:
    """Only one process gets the signal; both end."""

    def on_step(done: int, _: Any) -> None:
        if done == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    out = folder / "terminated"
    pair(lambda _: train(Small(), Points(), settings(), out, on_step=on_step), out)


if __name__ == "__main__":
    for scenario in (equal, resumed, broken_item, full_disk, terminated):
        scenario(Path(sys.argv[1]))
