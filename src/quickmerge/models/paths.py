"""Paths as a caller gives them, and what may be read from there."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from quickmerge.errors import DamagedWeightsError, QuickmergeError, first_sentence

__all__ = ["CONFIG_BYTES", "DEEPEST", "check_regular", "local_path", "read_json", "shown"]

CONFIG_BYTES = 1 << 20
"""No config that was ever published comes near."""
DEEPEST = 64
"""Objects and lists within one another in a file of JSON."""


def local_path(what: str, given: str | os.PathLike[str], kind: type[QuickmergeError] = QuickmergeError) -> Path:
    """The path that was given, with ``~`` resolved; nothing need be there.

    Args:
        what: the argument that it was given for.
        given: as the caller wrote it.
        kind: the error to raise.

    Raises:
        QuickmergeError: of that ``kind``, for an empty name or one that no file can have.
    """
    text = os.fspath(given)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    # Path("") is the current folder, which nobody means by an empty name
    if not text.strip() or (isinstance(given, Path) and not given.parts):
        raise kind(f"{what} must name something, got {text!r}")
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except FileNotFoundError:
        pass
    except RuntimeError:
        raise kind(f"{what} is {shown(text)}, but this machine knows no such user") from None
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise kind(f"{what} is {shown(text)}, which no file can be called ({error})") from None
    except OSError as error:
        raise kind(f"{what} is {shown(text)}, which can't be opened ({error.strerror})") from None
    return path


def shown(text: str) -> str:
    """A name in quotation marks, cut in the middle where it is very long."""
    return repr(text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}")


def check_regular(path: Path, most: int | None = None) -> None:
    """See that what is there is a regular file, or a link to one, of at most ``most`` bytes; nothing is read.

    Raises:
        DamagedWeightsError: it is a folder, a device or a pipe, is too large, or is not there.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise DamagedWeightsError(f"{path} can't be read ({error.strerror})") from None
    if not stat.S_ISREG(found.st_mode):
        raise DamagedWeightsError(f"{path} must be a regular file, got a folder, a device or a pipe")
    if most is not None and found.st_size > most:
        raise DamagedWeightsError(f"{path} must have at most {most:,} bytes, got {found.st_size:,}")


def read_json(path: Path, most: int = CONFIG_BYTES, remedy: str = "copy or download it again") -> dict[str, Any]:
    """The object that a small file of JSON holds.

    Args:
        path: the file.
        most: bytes that it may have.
        remedy: what would help if it is damaged.

    Raises:
        DamagedWeightsError: it is no regular file or too large, no JSON, no object, or is nested too deeply.
    """
    check_regular(path, most)
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedWeightsError(f"{path} is damaged (it must be JSON: {first_sentence(error)}): {remedy}") from None
    if not isinstance(data, dict):
        raise DamagedWeightsError(f"{path} is damaged (it must hold an object, got {type(data).__name__}): {remedy}")
    level: list[Any] = [data]
    for _ in range(DEEPEST):
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)
                 if isinstance(inner, (dict, list))]  # fmt: skip
        if not level:
            return data
    raise DamagedWeightsError(f"{path} is damaged (it is nested more than {DEEPEST} deep): {remedy}")
