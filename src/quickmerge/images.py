"""Images of every mode and origin as what a model is shown: upright, opaque, 8 bits a channel in RGB.

Whatever opens or takes an image goes through here, so that one image is the same at every door.
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from quickmerge.errors import QuickmergeError

__all__ = ["FORMATS", "MOST_PIXELS", "as_rgb", "open_image", "opened", "upright", "upright_size"]

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is opened, by what a file holds and not by its name. Pillow knows others, some of which run other programs."""
MOST_PIXELS = 128 * 2**20
"""Larger images are not decoded: a small file may claim any size, and take all memory."""
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, LookupError, TypeError, AttributeError, ArithmeticError,
    RuntimeError, MemoryError, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises for files that are broken, each decoder in its own way."""
TURNED = (5, 6, 7, 8)
"""Orientations in EXIF by which width and height change places."""
RANGES = (1, 255, 65535)
"""What white may be where an image is of numbers that say nothing of it; whole numbers have no white of 1."""
SAMPLE_FORMAT, UNSIGNED = 339, 1
"""Tag of a TIFF file, and its value for numbers that are never negative."""
AT_ONCE = 2**22
"""Pixels that are converted at once."""


# Opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def opened(source: Path | IO[bytes], name: str | None = None) -> Iterator[Image.Image]:
    """An image file of one of `FORMATS`, whose size is known and allowed and whose pixels are not decoded yet.

    Whatever goes wrong with it inside the ``with`` block is told in one sentence; nothing but the decoding belongs
    there.

    Args:
        source: the file, or its bytes.
        name: what messages call it. Default: its path.

    Raises:
        QuickmergeError: there is no such file, it is no regular file or no image, it breaks off, or it has more than
            `MOST_PIXELS`.
    """
    called = str(source) if name is None else name
    try:
        # a pipe or a device may never end; a folder is told by what opens it
        if isinstance(source, os.PathLike) and stat.S_IFMT(os.stat(source).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise QuickmergeError(f"{called} can't be read as an image: it is no regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, which are checked below, and of what it can't read
            image = Image.open(source, formats=_formats())
        with image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except QuickmergeError:
        raise
    except UNREADABLE as error:
        raise QuickmergeError(f"{called} can't be read as an image: {reason(error)}") from error


def open_image(source: Path | IO[bytes], name: str | None = None) -> Image.Image:
    """An image file as it is meant to be seen: decoded, upright, in RGB, and white where it was transparent.

    Raises:
        QuickmergeError: it can't be read, or is too large; see `opened`. Or it holds numbers that are not finite.
    """
    with opened(source, name) as image:
        turned, meant = _turned(image)
    return as_rgb(turned, meant, str(source) if name is None else name)


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of `open_image`, without decoding a pixel.

    Raises:
        QuickmergeError: it can't be read, or is too large; see `opened`.
    """
    with opened(path) as image:
        width, height = image.size
        # Pillow turns a TIFF by itself, and gives its size as it will be.
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in TURNED
        return (height, width) if turned else (width, height)


def reason(error: BaseException) -> str:
    """Why an image can't be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return f"its content is of none of the formats {', '.join(_formats())}"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {MOST_PIXELS // 10**6} million pixels"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = " ".join(str(error).split())
    if isinstance(error, (OSError, SyntaxError, ValueError, EOFError)) and said:
        return said
    return f"it is damaged ({type(error).__name__}{': ' if said else ''}{said})"


def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has."""
    Image.preinit()
    if any(name not in Image.OPEN for name in FORMATS):
        Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


# Modes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """What a file's format says of whole numbers of 32 bits: which of them is white, and whether Pillow has read large
    ones as negative ones."""

    white: int | None = None
    unsigned: bool = False


def upright(image: Image.Image, name: str = "image") -> Image.Image:
    """An image turned as its camera was held, in RGB, and white where it was transparent.

    Args:
        image: decoded or not.
        name: what messages call it.

    Raises:
        QuickmergeError: it is no image of Pillow, can't be decoded, or holds numbers that are not finite.
    """
    if not isinstance(image, Image.Image):
        raise QuickmergeError(f"{name} must be a Pillow image, got {type(image).__name__}")
    try:
        turned, meant = _turned(image)
    except UNREADABLE as error:
        raise QuickmergeError(f"{name} can't be read as an image: {reason(error)}") from error
    return as_rgb(turned, meant, name)


def _turned(image: Image.Image) -> tuple[Image.Image, Numbers]:
    """A decoded copy, upright; and what only the file says, which a copy forgets."""
    image.load()
    meant = Numbers()
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        meant = Numbers(white=65535)  # whatever the file's own range, Pillow brings it to this one
    elif image.mode == "I" and image.format == "TIFF":
        tags: Any = getattr(image, "tag_v2", {})
        meant = Numbers(unsigned=tags.get(SAMPLE_FORMAT, UNSIGNED) in (UNSIGNED, (UNSIGNED,)))
    return ImageOps.exif_transpose(image), meant


def as_rgb(image: Image.Image, meant: Numbers | None = None, name: str = "image") -> Image.Image:
    """An image of any of Pillow's modes in RGB, white where it is transparent, by how much it is.

    Numbers of 16 bits are scaled to 8. Of whole numbers of 32 bits and of fractions an image doesn't say what is white:
    it is the least of 1 (fractions only), 255 and 65535 that no number is above, else the largest number. Where there
    are negative ones the least of them is black, and the largest number is white.

    Args:
        image: a decoded one.
        meant: what is known of its numbers.
        name: what messages call it.

    Raises:
        QuickmergeError: a number is not finite.
    """
    if image.mode.startswith("I;16"):
        return _deep(image)
    if image.mode in ("I", "F"):
        return _scaled(image, meant or Numbers(), name)
    if image.mode == "LAB":
        return _from_lab(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode in ("La", "RGBa"):  # colours are multiplied by alpha already

        def over_white(layer: NDArray[Any]) -> NDArray[Any]:
            seen = layer[..., :-1].astype(np.int32) + 255 - layer[..., -1:]
            return np.broadcast_to(seen.clip(0, 255), (*layer.shape[:2], 3))

        return _by_rows(np.asarray(image), over_white, channels=3)
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _deep(image: Image.Image) -> Image.Image:
    clear = image.info.get("transparency")  # a PNG file names one number that is transparent

    def grey(values: NDArray[Any]) -> NDArray[Any]:
        nearest = (values.astype(np.int32) + 128) // 257  # of the 256 steps from 0 to 65535
        return np.where(values == clear, 255, nearest) if isinstance(clear, int) else nearest

    return _by_rows(np.asarray(image), grey)


def _scaled(image: Image.Image, meant: Numbers, name: str) -> Image.Image:
    values = np.asarray(image)
    if meant.unsigned:
        values = values.view(np.uint32)
    if not np.isfinite(values).all():
        raise QuickmergeError(f"{name} can't be read as an image: it holds numbers that are not finite")
    low, high = min(0.0, float(values.min(initial=0))), float(values.max(initial=0))
    usual = [each for each in RANGES if each >= high and (image.mode == "F" or each > 1)]
    white = meant.white or (usual[0] if usual and low == 0 else high)
    scale = 255 / ((white - low) or 1.0)
    return _by_rows(values, lambda part: np.rint((part.astype(np.float64) - low) * scale).clip(0, 255))


def _by_rows(values: NDArray[Any], made: Callable[[NDArray[Any]], NDArray[Any]], channels: int = 1) -> Image.Image:
    """An RGB image of what ``made`` makes of some rows at a time, so that wide numbers of all pixels never stand beside
    one another in memory."""
    height, width = values.shape[:2]
    out = np.empty((height, width, 3) if channels == 3 else (height, width), np.uint8)
    rows = max(1, AT_ONCE // max(1, width))
    for start in range(0, height, rows):
        out[start : start + rows] = made(values[start : start + rows])
    return Image.fromarray(out).convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    made = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    assert made is not None
    return made
