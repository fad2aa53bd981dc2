"""One writer at a time: a lock that the kernel ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quickmerge.errors import QuickmergeError
from quickmerge.files import told
from quickmerge.staging import hold

__all__ = ["LOCK", "sole_writer"]

LOCK = ".quickmerge-lock"
"""Name of the lock of a folder that is being written."""


@contextmanager
def sole_writer(target: Path, lock: Path | None = None, *, keep: bool = False) -> Iterator[None]:
    """Be the only one, of all processes and threads, that writes ``target`` within the block.

    The lock is a file that says which process holds it. It is gone when the block ends, or free; one that a kill has
    left is taken over. Where a system has no such locks, as Windows has none, nothing is kept apart.

    Args:
        target: what is written: a folder, which is made, or a file.
        lock: the file to lock; default ``.quickmerge-lock`` in the folder ``target``.
        keep: leave the file where it is in the end.

    Raises:
        QuickmergeError: somebody else writes it, which is named; or the disk is full or not writable.
    """
    path = Path(os.path.realpath(target / LOCK if lock is None else lock))
    with told(target):
        made = _make(path.parent)
        handle = _take(path, target)
    try:
        yield
    finally:
        # Deleted while it is held: whoever opened it meanwhile finds that it has no name any more, and begins anew.
        if not keep:
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(handle)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # a job that was refused leaves nothing


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; those that were not there, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _take(path: Path, target: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its last holder has removed the folder
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            if not hold(handle):
                raise QuickmergeError(
                    f"{target} must be written by one run at a time, but {_holder(handle)} writes it: "
                    "wait for that to end, or name another folder"
                )
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(errors="replace"))
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    """The process that holds a lock, in words."""
    number, _, host = os.pread(handle, 300, 0).decode(errors="replace").strip().partition(" ")
    if not number.isdigit():
        return "another one"  # it has not yet said so
    here = "" if host == socket.gethostname() else f" on {host!r}"
    own = " (this one)" if not here and int(number) == os.getpid() else ""
    return f"process {number}{own}{here}"
