"""Telling text files from others by how they begin."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, TypeAlias

from quickmerge.errors import QuickmergeError

SNIFFED = 1 << 16
"""Bytes at the beginning of a file that tell text from binary data."""


def why_not_text(path: Path) -> str | None:
    """Say why a file does not look like text, from its first 64 KiB; None if it does.

    Raises:
        QuickmergeError: the file can't be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(SNIFFED)
    except OSError as error:
        raise QuickmergeError(f"{path} can't be read: {error.strerror}") from None
    if not start.strip():
        return "an empty file"
    if b"\0" in start:
        return "binary data"
    try:
        # a character may be cut in two where the beginning ends, but not where the file ends
        codecs.getincrementaldecoder("utf-8")().decode(start, final=len(start) < SNIFFED)
    except UnicodeDecodeError:
        return "other bytes than UTF-8"
    return None


# What the files and folders that a user names hold.


Kind: TypeAlias = Literal["text", "images", "videos", "dataset"]

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
VIDEOS = (".avi", ".mkv", ".mov", ".mp4", ".mpg", ".webm")
DATASETS = (".jsonl", ".parquet")
ONE: dict[Kind, str] = {"text": "text file", "images": "image", "videos": "video", "dataset": "dataset"}


@dataclass(frozen=True)
class Data:
    """Files of one kind, sorted and each named once; those of a ``"dataset"`` may be folders."""

    kind: Kind
    files: tuple[Path, ...]


def find_data(paths: Sequence[Path]) -> Data:
    """Find the training data in files and folders.

    A folder is searched to its ends. Hidden and binary files in it are passed over, but a file that is named must be
    usable.

    Args:
        paths: text files, images, videos, Hugging Face datasets saved to disk (also `.parquet` and `.jsonl` files),
            and folders of one of these.

    Returns:
        The kind and the files; the order of `paths` does not matter.

    Raises:
        QuickmergeError: a path is missing or unusable, there is nothing usable, or there are several kinds.
    """
    found: dict[Path, tuple[Path, Kind]] = {}
    for path in paths:
        for file, kind in _in_folder(path) if path.is_dir() else [_named(path)]:
            found.setdefault(file.resolve(), (file, kind))  # named twice, it is still one file
    if not found:
        raise QuickmergeError(
            f"no training data in {', '.join(map(str, paths)) or 'no paths'}: looked for UTF-8 text, images "
            f"({' '.join(IMAGES)}), videos ({' '.join(VIDEOS)}) and Hugging Face datasets saved to disk"
        )
    by_kind: dict[Kind, list[Path]] = {}
    for file, kind in sorted(found.values()):
        by_kind.setdefault(kind, []).append(file)
    if len(by_kind) > 1:
        raise QuickmergeError(
            f"training data must be of one kind, got {' and '.join(_told(kind, by_kind[kind]) for kind in by_kind)}: "
            "name only the files or the folder of one kind"
        )
    ((kind, files),) = by_kind.items()
    return Data(kind, tuple(files))


def _named(path: Path) -> tuple[Path, Kind]:
    if not path.exists():
        raise QuickmergeError(f"{path} does not exist")
    if not path.is_file():
        raise QuickmergeError(f"{path} must be a file or a folder")
    kind = _by_suffix(path)
    if kind is None and (reason := why_not_text(path)):
        raise QuickmergeError(
            f"{path} can't be trained on: it must be UTF-8 text, an image, a video or a dataset, got {reason}"
        )
    return path, kind or "text"


def _in_folder(top: Path) -> Iterator[tuple[Path, Kind]]:
    for folder, folders, files in os.walk(top, onerror=_unreadable):
        if "dataset_dict.json" in files or {"dataset_info.json", "state.json"} <= set(files):
            folders.clear()  # what lies below belongs to the dataset
            yield Path(folder), "dataset"
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(folder, name)
            if name.startswith(".") or not file.is_file():
                continue
            if kind := _by_suffix(file):
                yield file, kind
            elif why_not_text(file) is None:
                yield file, "text"


def _by_suffix(path: Path) -> Kind | None:
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        return "images"
    if suffix in VIDEOS:
        return "videos"
    return "dataset" if suffix in DATASETS else None


def _unreadable(error: OSError) -> NoReturn:
    raise QuickmergeError(f"{error.filename} can't be read: {error.strerror}") from None


def _told(kind: Kind, files: list[Path]) -> str:
    return f"{len(files)} {ONE[kind]}{'s' if len(files) > 1 else ''} ({files[0]}{', ...' if len(files) > 1 else ''})"
