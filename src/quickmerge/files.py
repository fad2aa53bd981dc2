"""Reading text; and files and folders that appear whole or not at all, also when the disk fills up."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from quickmerge.errors import QuickmergeError

__all__ = ["read_text", "settle", "write_bytes", "write_folder", "write_json"]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        QuickmergeError: the file can't be read, is empty or is not UTF-8 text.
    """
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        raise QuickmergeError(f"{path} must be a text file, got a folder") from None
    except OSError as error:
        raise QuickmergeError(f"{path} can't be read: {error.strerror}") from None
    if not data.strip():
        raise QuickmergeError(f"{path} must hold some text, got an empty file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QuickmergeError(f"{path} must be UTF-8 text, got other bytes at offset {error.start}") from None
    if "\0" in text:
        raise QuickmergeError(f"{path} must be text, got binary data (a zero byte at offset {text.index(chr(0))})")
    return text


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder that appears as `target` whole or not at all, in the place of one that may be there already.

    Only one process may write a target at a time. A kill at any moment leaves the old folder or the new one; the
    next `write_folder` or `settle` removes what else is left.

    Args:
        target: where the folder shall be; parents are made.
        fill: writes the files into the empty folder that it is given.

    Raises:
        QuickmergeError: the disk is full or not writable. What was at `target` before is still there.
    """
    with _told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        settle(target.parent, glob.escape(target.name))
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            fill(work)
            work.chmod(0o755)  # mkdtemp makes it private
            for path in [*work.rglob("*"), work]:
                _to_disk(path)
            _swap_in(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _to_disk(target.parent)


def settle(parent: Path, name: str = "*") -> None:
    """Tidy up after a killed `write_folder`: bring back an old folder that was moved away, remove unfinished ones.

    Args:
        parent: the folder of the targets; it need not exist.
        name: the target's name, or a pattern of names.
    """
    for left_over in sorted(parent.glob(f".{name}.*.*")):
        if left_over.suffix not in (".old", ".tmp"):
            continue
        target = parent / left_over.name[1:].rsplit(".", 2)[0]
        if not fnmatchcase(target.name, name):  # `name` is "a", this is of "a.b"
            continue
        if left_over.suffix == ".old" and not target.exists():
            os.rename(left_over, target)
        else:
            shutil.rmtree(left_over, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        QuickmergeError: the disk is full or not writable. What was at `path` before is still there.
    """
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
        _to_disk(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, whole or not at all.

    Raises:
        QuickmergeError: as `write_bytes`.
    """
    write_bytes(path, (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextmanager
def _told(path: Path) -> Iterator[None]:
    # safetensors writes with its own code, and tells of a full disk with its own error.
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QuickmergeError(f"{path} can't be written ({reason}); what was there before is kept") from error


def _swap_in(work: Path, target: Path) -> None:
    if not target.exists():
        os.rename(work, target)
        return
    # A folder can't be renamed over a full one. Between these two renames `settle` knows the way back.
    away = work.with_suffix(".old")
    os.rename(target, away)
    try:
        os.rename(work, target)
    except BaseException:
        os.rename(away, target)
        raise
    shutil.rmtree(away, ignore_errors=True)


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and keeps their entries itself
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
