"""Write a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from quickmerge.errors import QuickmergeError
from quickmerge.files import write_bytes


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write ``content`` to ``path``, creating its folders, so that no reader ever sees half a file.

    Raises:
        QuickmergeError: the folder or the file cannot be written.
    """
    target = Path(path)
    if not target.name:
        raise QuickmergeError(f"Cannot write {os.fspath(target)!r}: it names a folder, not a file.")
    write_bytes(target, content)
    return target
