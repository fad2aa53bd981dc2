"""Between pixels and the features of patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quickmerge.errors import whole_number

Patch = int | tuple[int, int]


def sides(patch: Patch) -> tuple[int, int]:
    """``8`` or ``(8, 16)`` as height and width of a patch in pixels.

    Raises:
        ValueError: not one or two whole numbers of at least 1.
    """
    height, width = (patch, patch) if isinstance(patch, int) else patch
    whole_number("patch", height)
    whole_number("patch", width)
    return height, width


def patch_grid(shape: torch.Size | tuple[int, ...], patch: Patch) -> tuple[int, int, int]:
    """Patches along each axis (T, H, W) of images ``(B, C, H, W)`` or clips ``(B, T, C, H, W)`` of this shape.

    Raises:
        ValueError: neither images nor clips, or sides that patches do not fill.
    """
    height, width = sides(patch)
    if len(shape) not in (4, 5):
        raise ValueError(f"x must be images (B, C, H, W) or clips (B, T, C, H, W), got shape {tuple(shape)}")
    if shape[-2] % height or shape[-1] % width:
        raise ValueError(
            f"patch must divide the sides of the picture, {shape[-2]} x {shape[-1]}, got {height} x {width}"
        )
    return (shape[1] if len(shape) == 5 else 1), shape[-2] // height, shape[-1] // width


def patchify(x: Tensor, patch: Patch) -> Tensor:
    """Cut images or clips into patches, in raster order and frame by frame.

    Args:
        x: images ``(B, C, H, W)`` or clips ``(B, T, C, H, W)``.
        patch: pixels of both sides, or height and width.

    Returns:
        ``(B, N, C * h * w)``: N = T H/h W/w patches; within one, channel by channel and row by row.

    Raises:
        ValueError: neither images nor clips, or sides that patches do not fill.
    """
    height, width = sides(patch)
    t, rows, columns = patch_grid(x.shape, patch)
    cut = x.reshape(len(x), t, x.shape[-3], rows, height, columns, width)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(len(x), t * rows * columns, -1)


def unpatchify(patches: Tensor, patch: Patch, size: tuple[int, int], frames: int | None = None) -> Tensor:
    """Put patches together again: the inverse of `patchify`.

    Args:
        patches: ``(B, N, C * h * w)``.
        patch: pixels of both sides, or height and width.
        size: height and width of the pictures.
        frames: frames of a clip; None for images.

    Returns:
        ``(B, C, H, W)``, or ``(B, T, C, H, W)`` where ``frames`` is given.

    Raises:
        ValueError: sides that patches do not fill, or patches of another number or length.
    """
    height, width = sides(patch)
    b, n, length = patches.shape
    t, rows, columns = patch_grid((b, frames or 1, 1, *size), patch)
    if n != t * rows * columns or length % (height * width):
        raise ValueError(
            f"patches must be {t * rows * columns} a row, of a multiple of {height * width} values, for {t} pictures "
            f"of {size[0]} x {size[1]}, got {n} of {length}"
        )
    cut = patches.reshape(b, t, rows, columns, -1, height, width).permute(0, 1, 4, 2, 5, 3, 6)
    x = cut.reshape(b, t, -1, *size)
    return x if frames is not None else x[:, 0]


def cosines(channels: int, patch: Patch) -> Tensor:
    """The basis in which patches are merged and predicted: cosines along rows, columns and channels.

    Pixels beside each other are alike, and so are the colours of one pixel. What is left after that is told by the
    cosine transform (DCT-II, scaled to an orthonormal matrix) is nearly independent, which is what heads take the
    dimensions of a target for; along three channels it is grey, red against blue, and green against both.
    Lengths and distances are those of the pixels, and so is every squared error.

    Returns:
        ``(C * h * w, C * h * w)`` float32: ``patches @ cosines(...)`` are the coefficients, ``@ cosines(...).T``
        goes back.
    """
    basis = torch.ones(1, 1, dtype=torch.float64)
    for length in (channels, *sides(patch)):
        k, i = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
        wave = torch.cos(math.pi / length * (i + 0.5) * k.double()) * math.sqrt(2 / length)
        wave[0] /= math.sqrt(2)
        basis = torch.kron(basis, wave)
    return basis.T.float().contiguous()
