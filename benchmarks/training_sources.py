"""Where the training text comes from: public text with a clear licence, read as data and never run.

The sources of the benchmark documents give their "dev" half; what was chosen from it is taken out by the caller.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import struct
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from document_sources import (
    DEBIAN,
    Document,
    MissingSourceError,
    moby_dick,
    python_code,
    python_manual,
    speeches,
    unpacked,
)

BIBLE = "bible-kjv-text"
MANUALS = ("c-api", "distutils", "extending", "faq", "howto", "reference", "tutorial", "using", "whatsnew")
# import name: distribution, licence
PACKAGES = {
    "fontTools": ("fonttools", "MIT"),
    "huggingface_hub": ("huggingface_hub", "Apache-2.0"),
    "jinja2": ("Jinja2", "BSD-3-Clause"),
    "matplotlib": ("matplotlib", "Matplotlib (PSF-based)"),
    "mpmath": ("mpmath", "BSD-3-Clause"),
    "networkx": ("networkx", "BSD-3-Clause"),
    "numpy": ("numpy", "BSD-3-Clause"),
    "pydantic": ("pydantic", "MIT"),
    "pygments": ("Pygments", "BSD-2-Clause"),
    "rich": ("rich", "MIT"),
    "sympy": ("sympy", "BSD-3-Clause"),
    "torch": ("torch", "BSD-3-Clause"),
    "transformers": ("transformers", "Apache-2.0"),
}
LEAST_CODE = 6000
"""Fewest characters of a module."""
NOT_OURS = re.compile(r"(^|_)(test|tests|testing|vendor|vendored|extern|external|antlr|generated|third_party)($|_)")
"""Folders and modules that are tests, come from somebody else or were written by a program."""


def bible(downloads: Path) -> Iterator[Document]:
    """The King James Bible, a book each; verse numbers are left out."""
    with unpacked(BIBLE, downloads) as (version, folder):
        verses = _bible_text((folder / "usr/lib/bible.data").read_bytes()).splitlines()
    books: dict[str, dict[str, list[str]]] = {}
    for line in verses:
        if verse := re.match(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)", line):
            books.setdefault(verse[1], {}).setdefault(verse[2], []).append(verse[3].strip())
    for number, (book, chapters) in enumerate(books.items(), 1):
        text = "\n\n".join(" ".join(chapter) for chapter in chapters.values())
        source = f"Debian {BIBLE} {version}: {book}"
        yield Document(f"bible-{number:02d}-{book.lower()}", "prose", "train", source, "public domain", text)


def other_manuals(downloads: Path) -> Iterator[Document]:
    """Sources of the Python manuals beside the one of the library."""
    with unpacked(DEBIAN, downloads) as (version, folder):
        for manual in MANUALS:
            for path in sorted(folder.glob(f"usr/share/doc/*/html/_sources/{manual}/*.rst.txt")):
                name = f"{manual}-{path.name.removesuffix('.rst.txt')}"
                source = f"Debian {DEBIAN} {version}: {manual}/{path.name}"
                text = path.read_text(encoding="utf-8", errors="replace")
                yield Document(name, "technical", "train", source, "PSF-2.0", text)


def modules_of(package: str) -> Callable[[Path], Iterator[Document]]:
    """A source of the modules of an installed Python package."""

    def modules(_: Path) -> Iterator[Document]:
        distribution, licence = PACKAGES[package]
        top = Path(sysconfig.get_paths()["purelib"], package)
        if not top.is_dir():
            raise MissingSourceError(f"the package {distribution} is not installed beside quickmerge")
        version = importlib.metadata.version(distribution)
        for path in sorted(top.rglob("[a-z]*.py")):
            parts = path.relative_to(top.parent).with_suffix("").parts
            if any(NOT_OURS.search(part) for part in parts):
                continue
            # The licence at the head of each file is in the manifest; test documents have the same words at theirs.
            text = re.sub(r"\A(?:#.*\n|\s*\n)+", "", path.read_text(encoding="utf-8", errors="replace"))
            if len(text) >= LEAST_CODE:
                source = f"{distribution} {version}: {'/'.join(parts)}.py"
                yield Document("-".join(parts), "code", "train", source, licence, text)

    modules.__name__ = package
    return modules


def _bible_text(data: bytes) -> str:
    """What bible.data holds: a table of offsets, and blocks in the format of `compress` without their heads."""
    (count,) = struct.unpack_from(">I", data, 0x58)
    offsets = struct.unpack_from(f">{count + 1}I", data, 0x5C)
    blocks = (data[start:end] for start, end in itertools.pairwise(offsets))
    return b"".join(map(_uncompress, blocks)).decode("ascii", errors="replace")


def _uncompress(block: bytes) -> bytes:
    head = b"\x1f\x9d\x90"  # codes of up to 16 bits
    try:
        return subprocess.run(["gzip", "-dc"], input=head + block, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingSourceError(f"{BIBLE} cannot be unpacked: gzip says {error}") from error


# kind, and where from; a kind takes equal shares of its sources as far as they last
SOURCES: dict[str, list[Callable[[Path], Iterator[Document]]]] = {
    "prose": [moby_dick, speeches, bible],
    "technical": [python_manual, other_manuals],
    "code": [python_code, *map(modules_of, PACKAGES)],
}
