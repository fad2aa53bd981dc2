"""Write pictures whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image

from quickmerge.errors import QuickmergeError
from quickmerge.report.files import write_atomically

_FORMATS: dict[str, dict[str, object]] = {".png": {"optimize": True}, ".webp": {"quality": 90, "method": 6}}


def write_picture(picture: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture as PNG, or as WebP at a fraction of the size, by the ending of its name.

    Raises:
        QuickmergeError: path ends in neither .png nor .webp, or cannot be written.
    """
    kind = suffix_among(path, tuple(_FORMATS))
    stream = io.BytesIO()
    picture.save(stream, kind[1:], **_FORMATS[kind])
    return write_atomically(path, stream.getvalue())


def suffix_among(path: str | os.PathLike[str], allowed: tuple[str, ...]) -> str:
    """The ending of a name in lower case, such as ``.png``; QuickmergeError unless it is allowed."""
    kind = Path(path).suffix.lower()
    if kind not in allowed:
        raise QuickmergeError(f"path must end in {' or '.join(allowed)}, got {os.fspath(path)!r}")
    return kind
