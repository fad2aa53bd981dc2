"""Run by test_kills.py and ``make kills``: kills commands with SIGKILL and looks at what they leave.

    python tests/kills/killed.py KILLS [--seed N] [--only "JOB;JOB"] [--folder FOLDER] [--json FILE]

Every job is a command on tiny models. It is run once undisturbed, and then again and again in a fresh folder, or over
what an earlier run has left, and killed: at a moment that is drawn evenly over its time, or in front of one of its
calls that change the disk, drawn evenly among them. After a kill every finished file must be whole, all of the old set
or all of the new one; then the command is run again, with --resume where it has begun, and everything must be equal to
the undisturbed run to the last byte, with nothing left over. Commands run in forks of this process, which imports the
libraries and runs nothing of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch._dynamo  # noqa: E402, F401 (a first optimizer step loads it: here once for all children)
from kill_samples import prepare  # noqa: E402

from quickmerge import cli  # noqa: E402
from quickmerge.files import settle  # noqa: E402
from quickmerge.together import complete  # noqa: E402

CHANGES = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "truncate", "ftruncate")
"""Calls of os in front of which a command is killed."""


@dataclass(frozen=True)
class Job:
    """A command that writes.

    Attributes:
        command: arguments; ``OUT`` stands for the folder that is written.
        resumes: whether it goes on with ``--resume``.
        timed: whether its files hold times, and so differ from run to run.
        old: arguments in place of some of the command's, of a run whose files it writes over; none for a fresh folder.
    """

    command: str
    resumes: bool = False
    timed: bool = False
    old: str = ""


TRANSPLANT = "transplant --base base --tokenizer wanted --out OUT --method mean"
TRAIN = "--out OUT --batch 2 --save-every 1"
CLASSIFIER = f"train classifier --model tiny --data photos --no-augment {TRAIN}"
PRIOR = f"train prior --model words --data texts --width 16 --context 60 --target 10 --layer 1 --keep 0.4 {TRAIN}"
PARTS = "--vision models/vision --model models/language"
RECOGNIZER = f"train recognizer {PARTS} --data scenes --blocks 2 --vision-layers 2,4 {TRAIN}"
CALM = f"train calm --data texts --patch 2 --chunks 6 {TRAIN} --steps 3"
SPEAKER = "--autoencoder coder --layers 1 --width 16 --heads 2"
SHOW = "show text --model words --file texts/a.txt --layer 1 --limit 60 --html OUT/m.html --figure OUT/m.png"
JOBS = {
    "transplant": Job(TRANSPLANT),
    "transplant over another": Job(TRANSPLANT, old="--base base2"),
    "train classifier": Job(f"{CLASSIFIER} --steps 3", resumes=True),
    "train classifier over another": Job(f"{CLASSIFIER} --steps 2", resumes=True, old="--seed 5"),
    "train dynamicvit": Job(
        f"train dynamicvit --model classifier --data photos --steps 2 --layers 1,2 --no-augment {TRAIN}", resumes=True
    ),
    "train gumiho": Job(
        "train gumiho --model words --data texts --steps 3 --length 24 --mlp-depth 2 --inner 16 --heads 2 --generate 4 "
        f"--passage 8 --answer-tokens 6 --at-once 2 {TRAIN}",
        resumes=True,
    ),
    "train prior": Job(f"{PRIOR} --steps 3", resumes=True),
    "train prior over another": Job(f"{PRIOR} --steps 2", resumes=True, old="--seed 5"),
    "train recognizer": Job(f"{RECOGNIZER} --steps 2", resumes=True),
    "train recognizer over another": Job(f"{RECOGNIZER} --steps 1", resumes=True, old="--seed 5"),
    "train vlm": Job(
        f"train vlm --model language --vision tiny --layers 2,4 --data asked --steps 2 --questions 1 {TRAIN}",
        resumes=True,
    ),
    "train calm, autoencoder": Job(
        f"{CALM} --stage autoencoder --vocabulary 262 --latent 6 --ae-width 16", resumes=True
    ),
    "train calm, model": Job(f"{CALM} --stage model {SPEAKER} --samples 2 --targets 3", resumes=True),
    "train calm, discrete": Job(f"{CALM} --stage discrete {SPEAKER}", resumes=True),
    "show": Job(SHOW),
    "show over another": Job(SHOW, old="--limit 40"),
    "bench": Job(
        "bench decode --drafter lookup --model words --prompts prompts.jsonl --max-new-tokens 6 --tree 4 "
        "--json OUT/b.json --out OUT/r",
        timed=True,
    ),
    "generate": Job(
        "generate text --model words --file short.txt --prompt sea --layer 1 --max-new-tokens 3 --json OUT/g.json",
        timed=True,
    ),
}


def child(action: Callable[[], Any], log: Path) -> int:
    """Start a fork that does this, its words in a file. Returns its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(handle, stream)
            action()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def end_of(pid: int) -> int:
    """Exit status of a fork; minus the signal's number if that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Kills:
    """Kills of jobs in one folder of inputs."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.log = folder / "log.txt"
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        self.known: dict[str, tuple[float, int, dict[str, bytes]]] = {}
        self.number = 0
        self.hits: dict[str, dict[str, int]] = {}

    def call(self, arguments: str, out: Path, before: Callable[[], None] = lambda: None) -> int:
        """Begin a command, within the folder of inputs."""

        def run() -> None:
            os.chdir(self.inputs)
            sys.argv = ["quickmerge", *(part.replace("OUT", str(out)) for part in arguments.split())]
            before()
            cli.main()

        return child(run, self.log)

    def succeed(self, arguments: str, out: Path, before: Callable[[], None] = lambda: None) -> None:
        status = end_of(self.call(arguments, out, before))
        if status:
            told = self.log.read_text(errors="replace")[-3000:]
            raise SystemExit(f"quickmerge {arguments} into {out} ended with {status}:\n{told}")

    def undisturbed(self, name: str) -> tuple[float, int, dict[str, bytes]]:
        """Seconds of a job, its calls that change the disk, and what it writes."""
        if name not in self.known:
            job, out = JOBS[name], self.folder / f"whole-{len(self.known)}"
            out.mkdir()
            told = self.folder / "calls.txt"
            began = time.monotonic()
            self.succeed(job.command, out, lambda: self.count(told))
            self.known[name] = (time.monotonic() - began, int(told.read_text()), files(out))
        return self.known[name]

    @staticmethod
    def count(told: Path) -> None:
        """Write into a file, over and over, how many times the disk was changed."""
        calls = [0]

        def one() -> None:
            calls[0] += 1
            handle = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(handle, str(calls[0]).encode())
            os.close(handle)

        watch(one)

    def kill(self, name: str) -> None:
        """One kill of a job, and what comes of it."""
        job = JOBS[name]
        seconds, calls, wanted = self.undisturbed(name)
        out = self.folder / f"killed-{self.number}"
        self.number += 1
        out.mkdir()
        old: dict[str, bytes] = {}
        if job.old:
            self.succeed(_with(job.command, job.old), out)
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
            (out / "metrics.jsonl").unlink(missing_ok=True)
            old = files(out)
            assert old != wanted, name
        if self.rng.random() < 0.5:
            at = self.rng.randint(1, calls)
            kind, how = "change", f"before call {at} of {calls}"
            status = end_of(self.call(job.command, out, lambda: die_at(at)))
        else:
            wait = self.rng.uniform(0, seconds)
            kind, how = "moment", f"after {wait:.2f} of {seconds:.2f} s"
            pid = self.call(job.command, out)
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
            status = end_of(pid)
        where = f"{name}, killed {how} (status {status}), in {out}"
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"{where}: {self.log.read_text(errors='replace')[-3000:]}")
        self.look(job, out, old, wanted, where)
        begun = any((out / "checkpoints").glob("step-*"))
        self.succeed(f"{job.command} --resume" if job.resumes and begun else job.command, out)
        found = files(out)
        if job.timed:
            whole(found, where)
            if found.keys() != wanted.keys():
                raise SystemExit(f"{where}: afterwards there are {sorted(found)}, not {sorted(wanted)}")
        elif found != wanted:
            raise SystemExit(f"{where}: afterwards {differing(found, wanted)} differ")
        if left := [path for path in [*out.rglob(".*"), *out.parent.glob(f".{out.name}*")] if path.name != ".DS_Store"]:
            raise SystemExit(f"{where}: {left} are left over")
        shutil.rmtree(out)
        hits = self.hits.setdefault(name, {"moment": 0, "change": 0, "late": 0})
        hits[kind if status else "late"] += 1

    def results(self, seed: int) -> dict[str, Any]:
        """What the page on trust is made of. A kill counts once all that it left was seen to be right."""
        from quickmerge.bench.harness import environment

        rows = [{"job": name, **hits} for name, hits in self.hits.items()]
        return {"rows": rows, "meta": {"seed": seed, "environment": environment()}}

    def look(self, job: Job, out: Path, old: dict[str, bytes], wanted: dict[str, bytes], where: str) -> None:
        """See that what a kill has left is whole: nothing yet, the old or the new."""

        def settled() -> None:
            settle(out.parent, out.name)
            settle(out)
            complete(out)

        if end_of(child(settled, self.log)):
            raise SystemExit(f"{where}: {self.log.read_text(errors='replace')[-3000:]}")
        found = files(out)
        if job.timed:
            whole(found, where)
            return
        for path, data in found.items():
            if path.endswith(".jsonl") and wanted[path].startswith(data):
                continue  # answers, which are added one batch after the other
            if data not in (wanted.get(path), old.get(path)):
                raise SystemExit(f"{where}: {path} is neither the old nor the new one")
        # Files of one trained part come together; what else a command writes comes file by file.
        part = {path for path in {**old, **wanted} if path.endswith((".safetensors", "config.json"))}
        for group in ({path for path in part if not path.startswith("backbone/")},
                      {path for path in part if path.startswith("backbone/")}):  # fmt: skip
            sides = [{path: kind[path] for path in group if path in kind} for kind in (found, old, wanted)]
            if sides[0] not in ({}, *sides[1:]) or (sides[1] and not sides[0]):
                raise SystemExit(f"{where}: {sorted(sides[0])} are a mixture")


def _with(command: str, changed: str) -> str:
    """A command with another value for one option, which it may not have had."""
    option, value = changed.split()
    parts = command.split()
    if option not in parts:
        return f"{command} {changed}"
    parts[parts.index(option) + 1] = value
    return " ".join(parts)


def watch(each: Callable[[], None]) -> None:
    """Call something in front of every change of the disk."""

    def watched(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            each()
            return plain(*arguments, **named)

        return call

    for name in CHANGES:
        setattr(os, name, watched(getattr(os, name)))


def die_at(number: int) -> None:
    """Be killed in front of the ``number``-th change of the disk."""
    left = [number]

    def each() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(each)


def files(out: Path) -> dict[str, bytes]:
    """What a command has written for its user, without the working files of a training run."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(out).parts)
        if path.is_file() and not hidden and not name.startswith("checkpoints/") and name != "metrics.jsonl":
            found[name] = path.read_bytes()
    return found


def whole(found: dict[str, bytes], where: str) -> None:
    """See that pages and JSON end where they should."""
    for name, data in found.items():
        text = data.decode()
        if name.endswith(".json"):
            json.loads(text)
        elif name.endswith(".html") and not text.rstrip().endswith("</html>"):
            raise SystemExit(f"{where}: {name} is cut off")


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of jobs, with semicolons between them")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path, help="counts; also of a run that is broken off, up to its last round")
    given = parser.parse_args()
    names = [name for name in JOBS if not given.only or name in given.only.split(";")]
    with tempfile.TemporaryDirectory() as own:
        folder = given.folder or Path(own)
        os.environ["QUICKMERGE_CACHE"] = str(folder / "cache")
        kills = Kills(folder, given.seed)
        if end_of(child(lambda: prepare(kills.inputs), kills.log)):
            raise SystemExit(kills.log.read_text())
        for number in range(given.kills):
            kills.kill(names[number % len(names)])
            if (number + 1) % len(names) == 0 or number + 1 == given.kills:
                print(f"{number + 1} kills", flush=True)
                if given.json is not None:
                    given.json.write_text(json.dumps(kills.results(given.seed), indent=1) + "\n")
        hit = {name: hits["moment"] + hits["change"] for name, hits in kills.hits.items()}
        for name, count in hit.items():
            print(f"{name}: {count} kills hit, 0 half-written, 0 mixed, every rerun equal to the last byte")
        print(f"kills {sum(hit.values())} of {given.kills}")


if __name__ == "__main__":
    main()
