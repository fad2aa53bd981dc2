"""``make fuzz``: hostile inputs in great numbers, each of which must end as right work or as one sentence.

    python tests/fuzz/run.py [--quick] [--seed N] [--least N] [--minutes M] [--jobs N] [--only WORDS] [--json FILE]

Every input is opened by a command of its own, in a process that is forked from a warm one. It may take 30 seconds of
processor time and 1 GB beyond what the warm process has. What ends otherwise than with exit 0, or with one sentence on
stderr and exit 2, is printed, and so is anything that prints control characters or runs code.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent, HERE.parent / "samples", HERE.parents[1] / "src"):
    sys.path.insert(0, str(folder))

from fuzz_bases import COMMANDS, OTHERS, build  # noqa: E402
from fuzz_corpus import fields, folder_case, tokenizers, weights, wholes  # noqa: E402
from fuzz_files import lists, names, outputs, pictures, texts, videos  # noqa: E402
from fuzz_worker import MEMORY, SECONDS, Case, Ending, judge  # noqa: E402


def corpus(base: Path, seed: int, each: int) -> list[Case]:
    """What is committed, and for each JSON file ``each`` draws; the draws of other inputs in proportion."""
    sound = [folder_case(base, kind, "sound", lambda _: None, command)
             for kind in COMMANDS for command in range(len(COMMANDS[kind]))]  # fmt: skip
    return [
        *sound, *fields(base, seed, each), *wholes(base), *weights(base), *tokenizers(base, seed, 12 * each),
        *pictures(base, seed, 10 * each), *videos(base, seed, 2 * each), *texts(base), *names(base), *lists(base),
        *outputs(base),
    ]  # fmt: skip


def warm(base: Path) -> list[str]:
    """Run every sound command once in this process, so that forked ones find all modules loaded; what went wrong."""
    import contextlib
    import io

    from quickmerge.cli import main

    wrong, here = [], Path.cwd()
    (base / "out").mkdir()
    os.chdir(base / "out")
    for kind, commands in {**COMMANDS, "model and file": OTHERS}.items():
        for argv in commands:
            words = {"it": base / kind, "base": base, "out": base / "out"}
            sys.argv = ["quickmerge", *(part.format(**words) for part in argv)]
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    main()
                except SystemExit as stop:
                    if stop.code:
                        wrong.append(f"{kind}, {argv[0]}: {said.getvalue()[-600:]}")
    os.chdir(here)
    return wrong


def share(cases: list[Case], jobs: int, work: Path, until: float) -> list[Ending]:
    """Judge cases in so many processes, until the time is over."""
    pipes = []
    for job in range(jobs):
        out, into = os.pipe()
        if os.fork() == 0:
            os.close(out)
            with os.fdopen(into, "wb") as stream:
                for case in cases[job::jobs]:
                    if time.monotonic() > until:
                        break
                    pickle.dump(judge(case, work / f"job{job}"), stream)
                    stream.flush()
            os._exit(0)
        os.close(into)
        pipes.append(out)
    endings: list[Ending] = []
    for out in pipes:
        with os.fdopen(out, "rb") as stream:
            while True:
                try:
                    endings.append(pickle.load(stream))  # of our own processes
                except EOFError:
                    break
        os.wait()
    return endings


def main() -> int:
    """Run the inputs that were asked for; 0 if each ended well."""
    ask = argparse.ArgumentParser()
    ask.add_argument("--quick", action="store_true", help="a small, fixed part")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--least", type=int, default=1000, help="fewest inputs of a whole run")
    ask.add_argument("--minutes", type=float, default=9.0)
    ask.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    ask.add_argument("--only", default="", help="inputs whose name holds this")
    ask.add_argument("--json", type=Path)
    asked = ask.parse_args()
    began = time.monotonic()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="quickmerge-fuzz.") as folder:
        base = Path(folder) / "base"
        base.mkdir()
        sys.stdout.flush()
        build(base)
        wrong = warm(base)
        print(f"warm after {time.monotonic() - began:.0f} s", flush=True)
        for line in wrong:
            print(f"SOUND INPUT REFUSED: {line}")
        cases = [case for case in corpus(base, asked.seed, 1 if asked.quick else 6) if asked.only in case.name]
        random.Random(asked.seed).shuffle(cases)  # so that a run that is cut short has seen some of everything
        if asked.quick:
            cases = cases[:60]
        endings = share(cases, asked.jobs, Path(folder) / "work", began + 60 * asked.minutes)
    bad = [ending for ending in endings if not ending.fine]
    for ending in sorted(bad, key=lambda one: (one.kind, one.name)):
        print(f"{ending.kind}: {ending.name}\n    {ending.told[-300:]}")
    tell(endings)
    if asked.json is not None:
        asked.json.write_text(json.dumps(results(endings, asked.seed), indent=1) + "\n")
    few = not asked.quick and not asked.only and len(endings) < asked.least
    if few:
        print(f"only {len(endings)} inputs in the time there was; {asked.least} are wanted")
    return 1 if bad or wrong or few else 0


def group(ending: Ending) -> str:
    """What kind of input it was."""
    return ending.name.split(":")[0].split(",")[0].split(" ")[0]


def results(endings: list[Ending], seed: int) -> dict[str, object]:
    """What the page on trust is made of."""
    from quickmerge.bench.harness import environment

    rows = []
    for name in sorted({group(ending) for ending in endings}):
        mine = [ending for ending in endings if group(ending) == name]
        kinds = Counter(ending.kind for ending in mine)
        rows.append({
            "group": name, "inputs": len(mine), "right": kinds["right"], "sentence": kinds["sentence"],
            "others": {kind: count for kind, count in kinds.items() if kind not in ("right", "sentence")},
            "seconds": round(max(ending.seconds for ending in mine), 2),
            "megabytes": round(max(ending.megabytes for ending in mine), 1),
        })  # fmt: skip
    limits = {"seconds": SECONDS, "bytes": MEMORY}
    return {"rows": rows, "meta": {"seed": seed, "limits": limits, "environment": environment()}}


def tell(endings: list[Ending]) -> None:
    """Print the counts, and what was most expensive."""
    table: dict[str, Counter[str]] = {}
    for ending in endings:
        table.setdefault(group(ending), Counter())[ending.kind] += 1
    for name, counts in sorted(table.items()):
        print(f"{name:12} " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    if endings:
        slow, large = max(endings, key=lambda e: e.seconds), max(endings, key=lambda e: e.megabytes)
        print(f"most expensive: {slow.seconds:.1f} s ({slow.name}), {large.megabytes:.0f} MB ({large.name})")
    kinds = Counter(ending.kind for ending in endings)
    print(f"{len(endings)} inputs: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))


if __name__ == "__main__":
    sys.exit(main())
