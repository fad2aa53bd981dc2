"""Write a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from quickmerge.errors import QuickmergeError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write ``content`` to ``path``, creating its folders, so that no reader ever sees half a file.

    The text goes to a temporary neighbour first (same folder, so the final rename stays on one disk).

    Raises:
        QuickmergeError: the folder or the file cannot be written.
    """
    target = Path(path)
    if not target.name:
        raise QuickmergeError(f"Cannot write {os.fspath(target)!r}: it names a folder, not a file.")
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # os.open with 0o666 honours the user's umask; tempfile would leave the report readable by its owner only.
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as stream:
            stream.write(content)
        os.replace(beside, target)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            beside.unlink()
        reason = getattr(error, "strerror", None) or str(error)
        raise QuickmergeError(f"Cannot write {os.fspath(target)!r}: {reason}.") from error
    return target
