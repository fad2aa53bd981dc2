"""From pictures to the features of patches, and back."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from quickmerge.tokens.view import TokenView
from quickmerge.training.data.fit import Size, height_and_width

Patch: TypeAlias = Size
"""Pixels of both sides of a patch, or height and width."""


def sides(patch: Patch) -> tuple[int, int]:
    """Height and width of a patch in pixels; ValueError for anything but whole numbers of at least 1."""
    return height_and_width(patch, "patch")


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


def waves(patches: Tensor, patch: Patch) -> Tensor:
    """From pixels of patches to cosine waves along their rows, columns and channels.

    Pixels beside each other are alike, and so are the colours of one pixel. What a cosine transform (DCT-II, scaled to
    be orthonormal) makes of them is nearly independent, which is what heads take the dimensions of a target for; three
    channels become grey, red against blue, and green against both. Lengths and distances are those of the pixels, and
    so is every mean and every squared error.

    Args:
        patches: ``(..., C * h * w)``, as `patchify` cuts them.
        patch: pixels of both sides, or height and width.

    Returns:
        ``(..., C * h * w)``, slowest waves first along each axis.
    """
    return _along_axes(patches, patch, inverse=False)


def pixels(coefficients: Tensor, patch: Patch) -> Tensor:
    """The inverse of `waves`: ``(..., C * h * w)`` to the same shape."""
    return _along_axes(coefficients, patch, inverse=True)


def _along_axes(x: Tensor, patch: Patch, *, inverse: bool) -> Tensor:
    cut = x.reshape(*x.shape[:-1], -1, *sides(patch))
    for axis in (-3, -2, -1):
        basis = _cosines(cut.shape[axis]).to(cut)
        cut = (cut.movedim(axis, -1) @ (basis if inverse else basis.T)).movedim(-1, axis)
    return cut.flatten(-3)


def _cosines(length: int) -> Tensor:
    """The orthonormal DCT-II matrix ``(length, length)`` float64, one wave a row."""
    steps = torch.arange(length, dtype=torch.float64)
    basis = torch.cos(math.pi / length * torch.outer(steps, steps + 0.5)) * math.sqrt(2 / length)
    basis[0] /= math.sqrt(2)
    return basis


def view_of(pictures: Tensor, patch: Patch) -> TokenView:
    """Pictures as tokens: the `waves` of their patches, on a grid.

    Args:
        pictures: images ``(B, C, H, W)`` or clips ``(B, T, C, H, W)`` in [0, 1].
        patch: pixels of both sides, or height and width.

    Returns:
        A view of ``(B, T H/h W/w, C h w)`` tokens; half grey is zero.

    Raises:
        ValueError: neither images nor clips, or sides that patches do not fill.
    """
    return TokenView(waves(patchify(pictures - 0.5, patch), patch), grid=patch_grid(pictures.shape, patch))


def pictures_of(tokens: Tensor, patch: Patch, size: tuple[int, int], frames: int | None = None) -> Tensor:
    """Tokens as pictures again: the inverse of `view_of`, not held to [0, 1].

    Args:
        tokens: ``(B, N, C h w)``, one for each patch.
        patch: pixels of both sides, or height and width.
        size: height and width of the pictures.
        frames: frames of a clip; None for images.

    Returns:
        ``(B, C, H, W)``, or ``(B, T, C, H, W)`` where ``frames`` is given.

    Raises:
        ValueError: as `unpatchify`.
    """
    return unpatchify(pixels(tokens, patch), patch, size, frames) + 0.5
