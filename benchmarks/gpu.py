"""Everything that needs a GPU, in one go of at most eight minutes: writes benchmarks/results/gpu.json.

    python benchmarks/gpu.py [--minutes 8] [--wheels FOLDER] [--only tests kernels curves multipole] [--device cpu]

Parts, each a process of its own: the tests in tests/gpu, every Triton kernel against its statement in float64
(tests/multipole/triton_interpreted.py), the curves of `curves.py`, and a step of multipole attention beside the fastest
dense one. What a part found is written as soon as it is done. Parts that would run past the time are left out, by name.

A machine without an index brings what it lacks: ``--wheels`` names a folder of wheels, which are unpacked beside the
Python that runs this, without their dependencies; ``python -m pip download --no-deps -d FOLDER transformers ...`` fills
one elsewhere. The package itself is taken from ``src``. With ``--device cpu`` the same script runs without a GPU:
kernels in Triton's interpreter, small sizes, and the tests say what they skip.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUTCOME = re.compile(r"(\d+) (passed|failed|skipped|error|errors|deselected)\b")
SAYS = "import json; from quickmerge.bench.harness import environment; print(json.dumps(environment()))"


@dataclass(frozen=True)
class Part:
    """A process: what it is called, its arguments for Python, the result file that it leaves, and seconds to grant."""

    name: str
    arguments: tuple[str, ...]
    result: str | None
    seconds: int
    environment: Mapping[str, str]


def parts(device: str, folder: Path) -> list[Part]:
    """What is run, in order: first what says whether anything is right, then what says how fast."""
    cuda = device == "cuda"
    pytest = ("-m", "pytest", "-q", "-rs", "--no-header", "-p", "no:cacheprovider")
    curves = ["--dtype", "bfloat16", "--device", device, "--out", str(folder / "curves.json"), "--shapes", "llama-8b"]
    steps = ["--dtype", "bfloat16", "--device", device, "--out", str(folder / "multipole.json")]
    if cuda:
        curves += ["--tokens", *map(str, (1024, 2048, 4096, 8192, 16384, 32768, 65536)), "--new", "64"]
        steps += ["--tokens", *map(str, (8192, 32768, 131072)), "--rounds", "30"]
    else:
        curves += ["--tokens", "256", "512", "--new", "4", "--rounds", "1", "--batches", "1", "2"]
        steps += ["--tokens", "2048", "--rounds", "2", "--updates", "2", "--prefill", "256", "--shapes", "smollm2"]
    interpreted = {} if cuda else {"TRITON_INTERPRET": "1"}
    return [
        Part("tests", (*pytest, "tests/gpu"), None, 150, {}),
        Part("kernels", (*pytest, "tests/multipole/triton_interpreted.py"), None, 150, interpreted),
        Part("curves", (str(HERE / "curves.py"), *curves), "curves.json", 120, {}),
        Part("multipole", (str(HERE / "multipole_speed.py"), *steps), "multipole.json", 60, {}),
    ]


def main() -> int:
    """Run the parts; 1 where one failed, 2 where nothing can be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this machine lacks")
    parser.add_argument("--only", nargs="+", choices=("tests", "kernels", "curves", "multipole"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        inherited = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths(args.wheels, folder)))}
        asked = subprocess.run([sys.executable, "-c", SAYS], env=inherited, capture_output=True, text=True, check=False)
        if asked.returncode:
            print(asked.stderr.strip().splitlines()[-1], file=sys.stderr)
            print("quickmerge can't be imported here: --wheels FOLDER brings what is missing", file=sys.stderr)
            return 2
        environment = json.loads(asked.stdout.strip().splitlines()[-1])
        print(", ".join(f"{name} {value}" for name, value in environment.items()))
        if args.device == "cuda" and environment["gpu"] == "none":
            print("torch sees no GPU here; --device cpu runs the same script without one", file=sys.stderr)
            return 2
        found: dict[str, Any] = {}
        for part in parts(args.device, folder):
            if not args.only or part.name in args.only:
                found[part.name] = run(part, folder, inherited, end)
                write(args.out, {"parts": found, "environment": environment, "device": args.device})
    bad = [name for name, each in found.items() if each["state"] not in ("passed", "left out")]
    print(f"wrote {args.out}" + (f"; failed: {', '.join(bad)}" if bad else ""))
    return int(bool(bad))


def paths(wheels: Path | None, folder: Path) -> Sequence[Path]:
    """What is put before everything that the Python at hand has; wheels are unpacked first."""
    own = [ROOT / "src", ROOT / "tests", ROOT / "tests" / "samples"]
    if wheels is None:
        return own
    site = folder / "site"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "-qq", "--no-index", "--no-deps", "--no-compile"),
            *("--target", str(site), *map(str, sorted(wheels.glob("*.whl")))),
        ],
        check=True,
    )  # fmt: skip
    return [*own, site]


def run(part: Part, folder: Path, environment: Mapping[str, str], end: float) -> dict[str, Any]:
    """Run one part in the time that is left; what it found."""
    left = min(float(part.seconds), end - time.monotonic())
    if left < 5:
        print(f"{part.name}: left out, the time is over")
        return {"state": "left out", "seconds": 0.0}
    print(f"{part.name} ...", flush=True)
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *part.arguments], cwd=ROOT, env={**environment, **part.environment}, timeout=left,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        text, state = done.stdout, "passed" if done.returncode == 0 else "failed"
    except subprocess.TimeoutExpired as late:
        text, state = late.stdout.decode(errors="replace") if late.stdout else "", "out of time"
    print("\n".join(text.rstrip().splitlines()[-40:]), flush=True)
    found: dict[str, Any] = {"state": state, "seconds": round(time.monotonic() - began, 1)}
    if part.result is None:
        found |= {name: int(count) for count, name in OUTCOME.findall(text.rstrip().rpartition("\n")[2])}
        if state == "passed" and not found.get("passed") and found.get("skipped"):
            found["state"] = "left out"
        found["said"] = [line for line in text.splitlines() if line.startswith(("SKIPPED", "FAILED", "ERROR"))]
    elif (folder / part.result).is_file():
        found["found"] = json.loads((folder / part.result).read_text(encoding="utf-8"))
    return found


def write(file: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all, by nothing but Python: this file runs before the package can be imported."""
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    beside.replace(file)


if __name__ == "__main__":
    sys.exit(main())
