"""`make compat`: the wheel in environments made for this and thrown away, with the smoke tests and the README's Python.

Two for each Python: the newest transformers that pip finds, without our constraints file, as a user would get it; and
the oldest that is promised, laid over the first. Both hold the built wheel: no source of this folder is on their path.

Usage:
    python tests/smoke/environments.py [--pythons python3.12 ...] [--keep FOLDER]

torch of the version that the tests run with is installed first. For a Python whose torch is no wheel for CPUs at hand
that is a build for CUDA of several gigabytes, so only the Python that this runs in is tested in full without
``--pythons``; of the others that are at hand it is tested that the wheel installs, compiles and imports.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
MINORS = (11, 12, 13)
TESTED = ["tests/smoke", "tests/test_readme.py", "tests/test_pages.py::test_the_python_of_a_page_runs[README.md]"]
COMPILES = "import compileall, quickmerge; assert compileall.compile_dir(quickmerge.__path__[0], force=True, quiet=1)"
IMPORTS = "import quickmerge, sys; assert 'torch' not in sys.modules and quickmerge.__version__"
QUIET = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "TRANSFORMERS_VERBOSITY": "warning", "OMP_NUM_THREADS": "2"}


class Step:
    """Says what goes on and how long it took; remembers what failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.began = time.monotonic()

    def run(
        self, what: str, command: Sequence[object], *, show: bool = False, cwd: Path | None = None, over: object = ""
    ) -> bool:
        """Run a command; its output is shown if it fails, or if asked for. ``over`` stands in front of packages."""
        began = time.monotonic()
        print(f"--- {what}", flush=True)
        # Whatever the caller has on its path must not stand in for the wheel.
        environment = {**os.environ, **QUIET, "PYTHONPATH": str(over)}
        out = None if show else subprocess.PIPE
        done = subprocess.run(
            [str(part) for part in command], stdout=out, stderr=None if show else subprocess.STDOUT, text=True,
            env=environment, cwd=cwd, check=False,
        )  # fmt: skip
        if done.returncode:
            if not show:
                print(done.stdout)
            self.failed.append(what)
        print(f"    {'failed' if done.returncode else 'done'} in {time.monotonic() - began:.0f} s", flush=True)
        return bool(done.returncode == 0)


def others() -> list[str]:
    """Interpreters of the other supported versions that are at hand."""
    found = []
    for minor in MINORS:
        if minor == sys.version_info.minor:
            continue
        places = [shutil.which(f"python3.{minor}")]
        # pyenv's shims refuse a version that is not chosen, so its own folders are looked at too.
        versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        places += sorted(map(str, versions.glob(f"3.{minor}.*/bin/python3.{minor}")))
        good = (
            p for p in places if p and not subprocess.run([p, "-c", ""], capture_output=True, check=False).returncode
        )
        found += [p for p in [next(good, None)] if p]
    return found


def _starts(python: str) -> bool:
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


def full(step: Step, python: str, wheel: Path, work: Path) -> None:
    """The newest and the oldest transformers under one Python."""
    name = subprocess.check_output(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True
    ).strip()
    home, over = work / f"newest-{name}", work / f"oldest-{name}"
    inside = home / "bin" / "python"
    pip = [inside, "-m", "pip", "install", "-q", "--no-compile"]
    if not (
        step.run(f"Python {name}: a new environment with {TORCH}", [python, "-m", "venv", home])
        and step.run(f"Python {name}: {TORCH}", [*pip, TORCH])
        and step.run(f"Python {name}: the wheel, with no constraints", [*pip, wheel, "pytest", "hypothesis"])
    ):
        return
    command = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTED]
    tests = work / "tests"
    step.run(f"Python {name}, newest transformers: smoke tests", command, show=True, cwd=tests)
    step.run(
        f"Python {name}, newest transformers: quickmerge demo",
        [home / "bin" / "quickmerge", "demo"], cwd=work / "demo",
    )  # fmt: skip
    oldest = oldest_release()
    install = [*pip, "--target", over, f"transformers=={oldest.rsplit('.', 1)[0]}.*"]
    if step.run(f"Python {name}: transformers {oldest} laid over it", install):
        step.run(f"Python {name}, transformers {oldest}: smoke tests", command, show=True, cwd=tests, over=over)


def oldest_release() -> str:
    """The oldest release that is promised, by the one place that says so."""
    for line in (ROOT / "src/quickmerge/models/compat.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("OLDEST, NEWEST = "):
            return line.split('"')[1]
    raise SystemExit("models/compat.py names no oldest release")


def light(step: Step, python: str, wheel: Path, work: Path) -> None:
    """What can be tested of the wheel without torch."""
    home = work / f"light-{Path(python).name}-{len(list(work.iterdir()))}"
    inside = home / "bin" / "python"
    step.run(f"{python}: a new environment", [python, "-m", "venv", home])
    step.run(f"{python}: the wheel alone", [inside, "-m", "pip", "install", "-q", "--no-deps", wheel])
    step.run(f"{python}: every file compiles", [inside, "-W", "error", "-c", COMPILES])
    step.run(f"{python}: imports", [inside, "-c", IMPORTS])


def main() -> int:
    """Run it all; the exit status says whether anything failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--pythons", nargs="*", default=[], help="more interpreters to test in full")
    parser.add_argument("--keep", type=Path, help="make the environments here and leave them")
    told = parser.parse_args()
    step = Step()
    with tempfile.TemporaryDirectory(prefix="quickmerge-compat-") as temporary:
        work = Path(told.keep or temporary)
        for folder in ("wheel", "demo"):
            (work / folder).mkdir(parents=True, exist_ok=True)
        # The tests stand alone, so that nothing is imported from the source beside them.
        shutil.copytree(ROOT / "tests", work / "tests" / "tests", dirs_exist_ok=True)
        for name in ("pyproject.toml", "README.md", "Makefile"):
            shutil.copy(ROOT / name, work / "tests" / name)
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", work / "wheel"]
        if not step.run("the wheel is built", build, cwd=ROOT):
            return 1
        wheel = next((work / "wheel").glob("*.whl"))
        full(step, sys.executable, wheel, work)
        for python in told.pythons:
            full(step, python, wheel, work)
        for python in [] if told.pythons else others():
            light(step, python, wheel, work)
    seconds = time.monotonic() - step.began
    print(f"\nmake compat: {'; '.join(step.failed) + ' failed' if step.failed else 'all passed'} ({seconds:.0f} s)")
    return bool(step.failed)


if __name__ == "__main__":
    raise SystemExit(main())
