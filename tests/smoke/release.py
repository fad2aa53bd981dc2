"""`make release`: the wheel and the sdist that would be published, checked and installed in fresh environments.

Usage:
    python tests/smoke/release.py [--out dist] [--full python3.12 ...]

Both are built, and twine checks what an index would show of them. Then each Python that is supported and at hand gets
an environment of its own for each of the two, in which the package installs and imports and says the project's version.
The Python that this runs in gets all dependencies too, and runs commands; so do those of ``--full``, for which
torch may be a build for CUDA of several gigabytes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from environments import IMPORTS, ROOT, TORCH, Step, others

COMMANDS = (["--version"], ["ls"], ["plan", "--tokens", "4096", "--keep", "0.4"])
NEVER = re.compile(r"(^|/)(\.venv|runs|__pycache__|\.git|build)(/|$)|\.(gguf|pt|bin)$")
"""What no archive may hold."""


def version() -> str:
    """The project's, by the one file that says it."""
    text = (ROOT / "src/quickmerge/_version.py").read_text(encoding="utf-8")
    return text.split('__version__ = "')[1].split('"')[0]


def look(step: Step, archive: Path) -> None:
    """See that an archive holds what it must and nothing that it must not."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()
    else:
        with tarfile.open(archive) as opened:
            names = opened.getnames()
    wanted = ["quickmerge/py.typed", "quickmerge/data/demo.txt", "quickmerge/models/families.json", "LICENSE"]
    faults = [f"{name} is missing" for name in wanted if not any(each.endswith(name) for each in names)]
    faults += [f"{name} is inside" for name in names if NEVER.search(name)]
    print(f"--- {archive.name}: {len(names)} files, {archive.stat().st_size / 2**20:.1f} MiB")
    for fault in faults:
        print(f"    {fault}")
    step.failed += [f"{archive.name}: {fault}" for fault in faults]


def alone(step: Step, python: str, archive: Path, work: Path) -> None:
    """Without dependencies: it installs, imports, and says its version."""
    home = work / f"{Path(python).name}-{archive.suffix[1:]}"
    inside = home / "bin" / "python"
    says = f"{IMPORTS}; assert quickmerge.__version__ == {version()!r}, quickmerge.__version__"
    what = f"{python}, {archive.name}"
    if step.run(f"{what}: installs", [python, "-m", "venv", home]) and step.run(
        f"{what}: alone", [inside, "-m", "pip", "install", "-q", "--no-deps", archive]
    ):
        step.run(f"{what}: imports as {version()}", [inside, "-c", says])


def full(step: Step, python: str, archive: Path, work: Path) -> None:
    """With all dependencies, as a user gets it: commands run."""
    home = work / f"full-{Path(python).name}-{archive.suffix[1:]}"
    pip = [home / "bin" / "python", "-m", "pip", "install", "-q"]
    what = f"{python}, {archive.name} with its dependencies"
    if (
        step.run(f"{what}: a new environment", [python, "-m", "venv", home])
        and step.run(f"{what}: {TORCH}", [*pip, TORCH])
        and step.run(f"{what}: installs", [*pip, archive])
    ):
        for command in COMMANDS:
            step.run(f"{what}: quickmerge {' '.join(command)}", [home / "bin" / "quickmerge", *command], cwd=work)
        step.run(f"{what}: nothing is in conflict", [home / "bin" / "python", "-m", "pip", "check"])


def main() -> int:
    """Build, check, install; the exit status says whether anything failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the archives are put once all is well")
    parser.add_argument("--full", nargs="*", default=[], help="more interpreters to install all dependencies in")
    told = parser.parse_args()
    step = Step()
    with tempfile.TemporaryDirectory(prefix="quickmerge-release-") as temporary:
        work = Path(temporary)
        built = work / "dist"
        for kind in ("wheel", "sdist"):
            build = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", built]
            if not step.run(f"the {kind} is built", build, cwd=ROOT):
                return 1
        archives = sorted(built.iterdir())
        step.run("twine check --strict", [sys.executable, "-m", "twine", "check", "--strict", *archives])
        for archive in archives:
            look(step, archive)
            for python in [sys.executable, *others()]:
                alone(step, python, archive, work)
        wheel = next(archive for archive in archives if archive.suffix == ".whl")
        for python in [sys.executable, *told.full]:
            full(step, python, wheel, work)
        if not step.failed:
            told.out.mkdir(parents=True, exist_ok=True)
            for archive in archives:
                shutil.copy2(archive, told.out / archive.name)
    seconds = time.monotonic() - step.began
    print(f"\nmake release: {'; '.join(step.failed) + ' failed' if step.failed else 'all passed'} ({seconds:.0f} s)")
    if not step.failed:
        print(f"{', '.join(archive.name for archive in archives)} in {told.out}")
    return bool(step.failed)


if __name__ == "__main__":
    raise SystemExit(main())
