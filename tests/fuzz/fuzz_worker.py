"""One hostile input at a time, each in a process of its own that is forked from a warm one, and what became of it."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 30.0
"""Of processor time that an input may cost; of wall time, three times as much, as other work shares the machine."""
MEMORY = 2**30
"""Bytes that an input may cost beyond what the warm process has."""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
CANARY = "canary"
"""A file of this name beside the input is written only by code that an input brought along."""


@dataclass(frozen=True)
class Case:
    """An input: ``build`` makes its files in a folder and gives what to type; ``refused`` ones must not be taken."""

    name: str
    build: Callable[[Path], list[str | bytes]]
    refused: bool = False


@dataclass(frozen=True)
class Ending:
    """How a case ended: ``right``, ``sentence`` or what is wrong; and what it cost."""

    name: str
    kind: str
    told: str
    seconds: float
    megabytes: float

    @property
    def fine(self) -> bool:
        return self.kind in ("right", "sentence")


def judge(case: Case, work: Path) -> Ending:
    """Run a case in a forked process, and in ``work``, which is emptied before and after."""
    shutil.rmtree(work, ignore_errors=True)
    (work / "in").mkdir(parents=True)
    (work / "out").mkdir()
    held = _resident()
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        _run(case, work, held)
    status, usage = _wait(child, began + 3 * SECONDS)
    seconds = usage.ru_utime + usage.ru_stime
    grown = max(0.0, usage.ru_maxrss * 1024 - held)
    out, err = ((work / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
    kind, told = _kind(case, status, out, err, work)
    if kind in ("right", "sentence"):
        if seconds > SECONDS:
            kind = "too slow"
        elif grown > MEMORY or "the memory of this machine does not suffice" in err:
            kind = "too much memory"
    shutil.rmtree(work, ignore_errors=True)
    return Ending(case.name, kind, told, seconds, grown / 2**20)


def _run(case: Case, work: Path, held: int) -> None:
    """In the forked process: never comes back."""
    code = 70
    try:
        os.setsid()
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(work / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        given = [os.fsdecode(one) for one in case.build(work / "in")]
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.chdir(work / "out")
        room = _virtual() + 6 * MEMORY  # so that what has no measure at all doesn't take the machine
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        resource.setrlimit(resource.RLIMIT_CPU, (int(2 * SECONDS), int(2 * SECONDS) + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        import torch

        # The thread pool of the process that was forked from is lost, and torch makes the next one when it is first
        # asked for: by several threads at once, where weights are loaded by them, that is a race which it asserts on.
        torch.set_num_threads(1)
        from quickmerge.cli import main

        sys.argv = ["quickmerge", *given]
        code = 71
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 72
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BaseException:
                code = 73
        os._exit(code)


def _wait(child: int, until: float) -> tuple[int, resource.struct_rusage]:
    killed = False
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            with contextlib.suppress(OSError):
                os.killpg(child, signal.SIGKILL)  # what it started goes with it
            return (-1 if killed else status), usage
        if time.perf_counter() > until and not killed:
            killed = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)


def _kind(case: Case, status: int, out: str, err: str, work: Path) -> tuple[str, str]:
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("note: ")]
    told = lines[-1] if lines else ""
    if status == -1:
        return "hangs", told
    if (work / "out" / CANARY).exists() or (work / "in" / CANARY).exists():
        return "ran code", told
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}", told
    code = os.WEXITSTATUS(status)
    if CONTROLS.search(out) or CONTROLS.search(err):
        return "control characters", ascii((CONTROLS.search(out) or CONTROLS.search(err)).group())  # type: ignore[union-attr]
    if "Traceback" in err:
        return "traceback", next((line for line in reversed(lines) if not line.startswith("quickmerge: ")), told)
    if code == 0:
        return ("taken though it must be refused" if case.refused else "right"), told
    if code != 2:
        return f"exit {code}", told
    # what was told before, of work that was done, may stand where only its result could not be written
    if (len(lines) != 1 and not out.strip()) or not told.startswith("quickmerge: "):
        return "not one sentence", err[-300:]
    return "sentence", told


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _virtual() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
