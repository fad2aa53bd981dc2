"""Videos through an encoder of images: every frame on its own, then merging across time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quickmerge.hosts.encoder import find_encoder
from quickmerge.hosts.vit import reduce_vit
from quickmerge.reducers.base import Reducer
from quickmerge.tokens.plan import follow, to_members
from quickmerge.tokens.saliency import AttentionTrace
from quickmerge.tokens.view import TokenView


@dataclass(frozen=True)
class FrameTokens:
    """The patches of a video, merged within frames and across them.

    Args:
        hidden: ``(B, K, D)`` features of the slots, in the order of their places, frame by frame.
        size: ``(B, K)`` how many patches each slot stands for; 0 where it only pads a ragged batch.
        position: ``(B, K)`` where each slot stands among the T H W patches.
        slot: ``(B, T H W)`` the slot of every patch, -1 where it was dropped.
        special: ``(B, T, p, D)`` class and register tokens of each frame, which are never merged.
        grid: ``(T, H, W)``.
        frame_tokens: patches left of each frame by the encoder, before merging across time.
    """

    hidden: Tensor
    size: Tensor
    position: Tensor
    slot: Tensor
    special: Tensor
    grid: tuple[int, int, int]
    frame_tokens: int

    def unmerge(self) -> Tensor:
        """Every patch with the features of its slot, ``(B, T H W, D)``; zero where it was dropped."""
        return to_members(self.hidden, self.slot)


def encode_frames(
    model: Any,
    pixels: Tensor,
    across: Reducer,
    *,
    reducer: Reducer | None = None,
    layer: Any = None,
) -> FrameTokens:
    """Encode every frame of videos with an encoder of images, then merge their patches across time.

    What follows, such as a language model, reads ``K`` tokens for a video and not ``T H W``. A method that compares
    keys compares the features here, since there is no attention between frames. `GridMerge` is made for this place: the
    sets of `ToMe` alternate over all patches, so that on a grid of an even number of patches the same place of two
    frames is always in the same set, and never merges.

    Args:
        model: a vision transformer for images of one of the proven families, without a head.
        pixels: ``(B, T, C, H, W)``.
        across: the method that merges the patches of all frames, with its ``keep``, a share of all T H W patches; a
            `GridMerge` heeds their places in space and time.
        reducer: a method that takes tokens out inside the encoder already; None for none.
        layer: where that one acts, see `quickmerge.reduce`.

    Raises:
        ValueError: if ``pixels`` is no batch of videos, or the model reads videos itself.
    """
    if pixels.ndim != 5:
        raise ValueError(f"pixels must be videos (B, T, C, H, W), got shape {tuple(pixels.shape)}")
    encoder = find_encoder(model)
    if hasattr(encoder.config, "num_frames"):
        raise ValueError(f"model must encode images, and {type(model).__name__} reads videos: run it inside reduce()")
    b, t = pixels.shape[:2]
    rows, columns = encoder.grid(pixels.flatten(0, 1))[1:]
    run = None if reducer is None else reduce_vit(model, reducer, layer)
    with run or nullcontext():
        hidden = model(pixels.flatten(0, 1)).last_hidden_state
    level = None if run is None or run.call is None else run.call.last
    prefix = hidden.shape[1] - rows * columns if level is None else int(run.call.prefix)  # type: ignore[union-attr]
    n = hidden.shape[1] - prefix
    patch = torch.arange(rows * columns, device=hidden.device)
    if level is None:
        size, place, slot = torch.ones(b * t, n, dtype=torch.long, device=hidden.device), patch.expand(b * t, -1), None
    else:
        if level.valid is not None:
            raise ValueError("reducer must leave as many tokens of every frame, got a budget of its own for each")
        size, place, slot = level.size[:, prefix:], level.position[:, prefix:] - prefix, level.slot[:, prefix:] - prefix
    frame = torch.arange(t, device=hidden.device).repeat(b)[:, None]
    features = hidden[:, prefix:].reshape(b, t * n, -1)
    key = features[:, None]
    view = TokenView(
        features,
        size=size.reshape(b, -1),
        position=(frame * rows * columns + place).reshape(b, -1),
        length=torch.full((b,), t * rows * columns, device=hidden.device),
        attention=(AttentionTrace(key, key, key, features.shape[-1] ** -0.5),),
        grid=(t, rows, columns),
    )
    plan = across.plan(view)
    if slot is None:
        own = (frame * n + patch).reshape(b, -1)
    else:
        own = torch.where(slot >= 0, frame * n + slot, -1).reshape(b, -1)
    return FrameTokens(
        hidden=across.combine(view, plan, features),
        size=plan.size,
        position=plan.position,
        slot=follow(own, plan.slot),
        special=hidden[:, :prefix].reshape(b, t, prefix, hidden.shape[-1]),
        grid=(t, rows, columns),
        frame_tokens=n,
    )
