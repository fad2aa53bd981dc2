"""From images to the features of patches, and back."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from quickmerge.datasets.images import Size, height_and_width
from quickmerge.errors import QuickmergeError
from quickmerge.merge.prior.config import PriorConfig
from quickmerge.merge.prior.layout import layout_of, read_slots, slot_loss
from quickmerge.merge.prior.model import BACKWARD, FORWARD, Prior, check_collapse, relative_spread, spread
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.reducers.pooling import GridMerge
from quickmerge.merge.tokens.view import TokenView
from quickmerge.training.config import TrainingConfig
from quickmerge.training.loop import TrainingResult, train
from quickmerge.training.objective import Dataset, Objective

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
        raise ValueError(f"patch must divide the sides of the image, {shape[-2]} x {shape[-1]}, got {height} x {width}")
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
        size: height and width of the images.
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
            f"patches must be {t * rows * columns} a row, of a multiple of {height * width} values, for {t} images "
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
    """Images as tokens: the `waves` of their patches, on a grid.

    Args:
        images: images ``(B, C, H, W)`` or clips ``(B, T, C, H, W)`` in [0, 1].
        patch: pixels of both sides, or height and width.

    Returns:
        A view of ``(B, T H/h W/w, C h w)`` tokens; half grey is zero.

    Raises:
        ValueError: neither images nor clips, or sides that patches do not fill.
    """
    return TokenView(waves(patchify(pictures - 0.5, patch), patch), grid=patch_grid(pictures.shape, patch))


def images_of(tokens: Tensor, patch: Patch, size: tuple[int, int], frames: int | None = None) -> Tensor:
    """Tokens as images again: the inverse of `view_of`, not held to [0, 1].

    Args:
        tokens: ``(B, N, C h w)``, one for each patch.
        patch: pixels of both sides, or height and width.
        size: height and width of the images.
        frames: frames of a clip; None for images.

    Returns:
        ``(B, C, H, W)``, or ``(B, T, C, H, W)`` where ``frames`` is given.

    Raises:
        ValueError: as `unpatchify`.
    """
    return unpatchify(pixels(tokens, patch), patch, size, frames) + 0.5


# Training a prior over merged patches: each slot of an image or a clip is predicted from those before it.


KINDS = {"images": 2, "videos": 3}
"""What a prior of images is of, and the axes of a place in it."""
FLAT = 1e-4
"""Images whose patches spread less than this are of one colour: they have nothing that could collapse."""


class PriorPatches(Objective):
    """The loss of a prior over merged patches, on images ``(B, C, H, W)`` or clips ``(B, T, C, H, W)`` in [0, 1].

    Tokens are the patches' cosine waves (`view_of`), and slots are what a reducer merges them into. Each slot is
    predicted from the slots before it and the layout, which is where all slots stand and how many patches they are of:

        ``L_forward = mean_k score(x_k | x_1..x_(k-1), layout) / D + sum_k n_k ||x_k - m_k||^2 / (V sum_k n_k)``

    with the head's score and mean m, sizes n and the variance V of contents (`slot_loss`); L_backward, from the other
    end, is added where the prior has both directions. Contents are data and take no gradient.

    Args:
        prior: what is trained; one that generates.
        patch: pixels of both sides of a patch, or height and width.
        keeps: shares of the patches that are kept; each micro-step draws one. 1 leaves them unmerged.
        reducer: from a share to what merges; `GridMerge` by default.

    Raises:
        ValueError: if a share is not in (0, 1], or the prior is not of images.
    """

    def __init__(
        self, prior: Prior, *, patch: Patch, keeps: Sequence[float], reducer: Callable[[float], Reducer] = GridMerge
    ) -> None:
        super().__init__()
        if not keeps or any(isinstance(keep, bool) or not 0 < keep <= 1 for keep in keeps):
            raise ValueError(f"keeps must be shares in (0, 1], got {list(keeps)}")
        if not prior.config.generates or prior.config.axes not in KINDS.values():
            raise ValueError(
                "prior must be of images, with pool 0 and axes 2 or 3, "
                f"got pool={prior.config.pool} and axes={prior.config.axes}"
            )
        self.prior = prior
        self.patch = sides(patch)
        self.reducers = tuple(reducer(keep) for keep in keeps)

    def view(self, pictures: Tensor) -> TokenView:
        """The tokens of images ``(B, C, H, W)`` or clips ``(B, T, C, H, W)``.

        Raises:
            ValueError: if they are of another kind than the prior, or patches do not fill them.
        """
        wanted = 5 if self.prior.config.axes == 3 else 4
        if pictures.ndim != wanted:
            what = "clips (B, T, C, H, W)" if wanted == 5 else "images (B, C, H, W)"
            raise ValueError(f"batch must be {what} for this prior, got shape {tuple(pictures.shape)}")
        return view_of(pictures, self.patch)

    @torch.no_grad()
    def calibrate(self, pictures: Dataset, most: int = 32) -> None:
        """Set the prior's scale of features from the slots, at every keep, of up to ``most`` images spread evenly."""
        count = min(most, len(pictures))
        slots = []
        for index in range(count):
            item = torch.as_tensor(pictures[index * len(pictures) // count])[None]
            view = self.view(item)
            for reducer in self.reducers:
                plan = reducer.plan(view)
                slots.append(plan.merge(view.hidden)[plan.valid])
        self.prior.calibrate(torch.cat(slots).to(self.prior.mean.device))

    def forward(self, batch: Tensor, progress: float) -> dict[str, Tensor]:
        """Losses of a batch of images."""
        prior = self.prior
        # Places and pixels lose too much in half precision, and cost too little to gain from it.
        with torch.autocast(batch.device.type, enabled=False), torch.no_grad():
            view = self.view(batch)
            plan = random.choice(self.reducers).plan(view)
            slots = plan.merge(view.hidden)
            varied = spread(view.hidden, view.valid) > FLAT
            share = slots.new_ones(())
            if bool(varied.any()):
                share = relative_spread(slots[varied], view.hidden[varied], plan.valid[varied], view.valid[varied])
        check_collapse(share, "the merged sequence")
        layout = layout_of(prior, view, plan)
        told: dict[str, Tensor] = {}
        directions = {"": FORWARD, "_back": BACKWARD} if prior.config.directions == "both" else {"": FORWARD}
        for name, direction in directions.items():
            state = read_slots(prior, slots, layout, direction)
            told[f"ar{name}"], told[f"error{name}"], _ = slot_loss(prior, state, slots, layout, direction)
        loss = torch.stack(list(told.values())).sum()
        return {"loss": loss, **{name: value.detach() for name, value in told.items()}, "spread": share}


def train_prior_patches(
    dataset: Dataset,
    config: TrainingConfig,
    out: Path,
    *,
    keeps: Sequence[float],
    patch: Patch,
    kind: str,
    reducer: Callable[[float], Reducer] = GridMerge,
    resume: bool = False,
    half: bool = False,
    **shape: Any,
) -> TrainingResult:
    """Train a prior over merged patches and save it in ``out``.

    Args:
        dataset: images ``(C, H, W)`` or clips ``(T, C, H, W)`` in [0, 1] by index, all of one size.
        config: settings of the loop.
        out: folder for config.json, model.safetensors, checkpoints and metrics.
        keeps: shares of the patches to train at; 1 leaves them unmerged.
        patch: pixels of both sides of a patch, or height and width.
        kind: ``"images"`` or ``"videos"``.
        reducer: from a share to what merges.
        resume: go on from the newest checkpoint.
        half: store the prior's weights in float16.
        **shape: further fields of `PriorConfig`: width, layers, heads, head, head_settings, directions.

    Raises:
        QuickmergeError, ValueError: for anything that does not fit; see `quickmerge.training.train`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if len(dataset) == 0:
        raise QuickmergeError("dataset must hold at least one item to train on, got an empty one")
    first = torch.as_tensor(dataset[0])
    if first.ndim != KINDS[kind] + 1:
        what = "clips (T, C, H, W)" if kind == "videos" else "images (C, H, W)"
        raise ValueError(f"dataset must hold {what} for kind {kind!r}, got items of shape {tuple(first.shape)}")
    height, width = sides(patch)
    trained_for = {
        "kind": kind, "patches": [height, width], "size": list(first.shape[-2:]),
        "frames": len(first) if kind == "videos" else 1, "keeps": list(keeps),
        "reducers": [reducer(keep).label for keep in keeps],
    }  # fmt: skip
    torch.manual_seed(config.seed)
    prior = Prior(
        PriorConfig(
            features=first.shape[-3] * height * width, axes=KINDS[kind], pool=0, saliency=False,
            trained_for=trained_for, **shape,
        )
    )  # fmt: skip
    objective = PriorPatches(prior, patch=patch, keeps=keeps, reducer=reducer)
    objective.calibrate(dataset)
    fingerprint: dict[str, Any] = {"prior": json.loads(prior.config.to_json())}
    if hasattr(dataset, "fingerprint"):
        fingerprint["data"] = dataset.fingerprint()
    return train(
        objective, dataset, config, out, resume=resume, fingerprint=fingerprint,
        finish=lambda folder: prior.save_pretrained(folder, torch.float16 if half else None),
    )  # fmt: skip
