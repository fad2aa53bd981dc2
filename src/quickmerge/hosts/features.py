"""Knowing of every feature that fills a placeholder which picture it was made from.

``generate`` encodes pictures before anything else and then hands on features alone, so what they were made from has to
be noted where they are made: a run stands in front of the model's ``get_image_features`` and ``get_video_features``
while it is attached.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from quickmerge.errors import QuickmergeError
from quickmerge.hosts.attachment import stand_in
from quickmerge.hosts.tower import TowerWatch
from quickmerge.hosts.tower_tokens import Grid, Seen, joined
from quickmerge.hosts.vlm_structure import Vlm

OWN = ("vision_feature_layer", "vision_feature_select_strategy")
"""Settings of a call that must be the model's own, since the tower is watched where they say."""


@dataclass(frozen=True)
class Piece:
    """Placeholders of one picture: how many, which of them are ``apart``, no visual tokens, and what is known."""

    tokens: int
    apart: Tensor | None = None
    grid: Grid | None = None
    seen: Seen | None = None


class FeatureWatch:
    """Notes, for every tensor of features that is made while it is attached, what it was made from.

    Args:
        vlm: the model.
        tower: watches its tower.
    """

    def __init__(self, vlm: Vlm, tower: TowerWatch) -> None:
        self.vlm, self.tower = vlm, tower
        self._within = False
        self.outputs: dict[str, Any] = {}
        """What was made since `start`, by kind."""
        # Features may be handed over again, and several times where beams are searched.
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def attach(self) -> list[Callable[[], None]]:
        """Stand in front of what makes features; returns how to undo it."""
        undo: list[Callable[[], None]] = []
        for kind in ("image", "video"):
            name = f"get_{kind}_features"
            made = getattr(self.vlm.base, name, None)
            if made is not None:
                undo.append(stand_in(self.vlm.base, name, self._in_front(kind, made)))
        return undo

    def start(self) -> None:
        """A forward begins."""
        self.outputs = {}

    def forget(self) -> None:
        """Drop everything that was noted."""
        self.start()
        self._known = WeakIdKeyDictionary()

    def _in_front(self, kind: str, made: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(made)

        @functools.wraps(made)
        def features(*args: Any, **kwargs: Any) -> Any:
            inputs = signature.bind_partial(*args, **kwargs).arguments
            for name in OWN:
                own = getattr(self.vlm.config, name, None)
                if inputs.get(name) not in (None, own):
                    raise QuickmergeError(
                        f"{name} must be the model's own inside a quickmerge run, {own!r}, got {inputs[name]!r}"
                    )
            # Some models make the features of a video by the function for pictures.
            within, self._within = self._within, True
            try:
                output = made(*args, **kwargs)
            finally:
                self._within = within
            if getattr(output, "pooler_output", None) is not None and not within:
                vectors = tensors_of(output)
                for tensor, pieces in zip(vectors, self._made_from(inputs, vectors), strict=True):
                    self._known[tensor] = pieces
                self.outputs[kind] = output
            return output

        return features

    def _made_from(self, inputs: dict[str, Any], vectors: Any) -> list[list[Piece]]:
        seen = self.tower.seen
        if self.vlm.name == "llava_next":
            return [[piece] for piece in mosaics(self.vlm, inputs["image_sizes"], seen)]
        pieces = [Piece(each.count, None, each.grid, each) for each in seen]
        if self.vlm.family.layout != "tiles":
            return [[piece] for piece in pieces]
        # All tiles of a row of the batch come as one tensor.
        found: list[list[Piece]] = []
        for tensor in vectors:
            mine: list[Piece] = []
            while sum(piece.tokens for piece in mine) < tensor.shape[:-1].numel():
                mine.append(pieces.pop(0))
            found.append(mine)
        return found

    def pieces(self, vectors: Tensor) -> list[Piece]:
        """What a tensor of features was made from.

        Raises:
            QuickmergeError: if it was made elsewhere and something must be known of it.
        """
        if vectors in self._known:
            known: list[Piece] = self._known[vectors]
            return known
        if self.tower.asks or self.vlm.name == "llava_next":
            reason = "the reducer reads what the vision tower computes" if self.tower.asks else "they hold newlines too"
            raise QuickmergeError(
                f"mm_encoder_outputs must come from the model's get_image_features inside the run, since {reason}; got "
                "features from elsewhere"
            )
        if self.vlm.family.layout == "tiles":
            size = int(self.vlm.base.image_seq_len)
            return [Piece(size)] * (vectors.shape[:-1].numel() // size)
        return [Piece(len(vectors))]


def tensors_of(output: Any) -> list[Tensor]:
    """The features that a model has made, a tensor for each row or picture; some give those of all tiles as one."""
    vectors = output.pooler_output
    return [vectors] if isinstance(vectors, Tensor) else list(vectors)


def mosaics(vlm: Vlm, image_sizes: Any, seen: list[Seen]) -> list[Piece]:
    """LLaVA-NeXT: a picture as a whole and cut into crops, without what padded them, a newline behind every line.

    The model's own packing is run on numbers instead of features; so it is known which token of which crop went where.
    All of a picture is one set of tokens with one budget, and newlines stay as they are.
    """
    config, base = vlm.config, vlm.base
    code: Any = sys.modules[type(base).__module__]
    crops = [
        code.image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in image_sizes
    ]
    numbers = [torch.arange(n * seen[0].count, dtype=torch.float64).view(n, -1, 1) for n in crops]
    newline = torch.tensor([-1.0], dtype=torch.float64)
    packed, _ = base.pack_image_features(numbers, image_sizes, config.vision_feature_select_strategy, newline)
    found, start = [], 0
    for picture, n in zip(packed, crops, strict=True):
        index = picture[:, 0].long()
        what = joined(seen[start : start + n], index[index >= 0])
        found.append(Piece(len(index), index < 0, None, what))
        start += n
    return found
