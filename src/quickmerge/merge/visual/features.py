"""Knowing of every feature that fills a placeholder which image it was made from.

``generate`` encodes images before anything else and then hands on features alone, so what they were made from has
to be noted where they are made: a run stands in front of the model's ``get_image_features`` and
``get_video_features`` while it is attached.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.visual.made_of import Making, made_of
from quickmerge.merge.visual.tower import TRIED, Grid, Seen, TowerWatch, joined, layout_of, squares, window_order_of
from quickmerge.models.attachment import stand_in, stands_aside
from quickmerge.models.vlm import FEATURES, Vlm

OWN = ("vision_feature_layer", "vision_feature_select_strategy")
"""Settings of a call that must be the model's own, since the tower is watched where they say."""


@dataclass(frozen=True)
class Piece:
    """Placeholders of one image: how many, which of them are ``apart``, no visual tokens, and what is known."""

    tokens: int
    apart: Tensor | None = None
    grid: Grid | None = None
    seen: Seen | None = None
    runs: bool = False
    """Whether these are of several images, which are told by placeholders side by side."""


class FeatureWatch:
    """Notes, for every tensor of features that is made while it is attached, what it was made from.

    Args:
        vlm: the model.
        tower: watches its tower.
    """

    def __init__(self, vlm: Vlm, tower: TowerWatch) -> None:
        self.vlm, self.tower = vlm, tower
        self._within = False
        self._makings: dict[Any, Making] = {}
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
        self._makings = {}

    def _in_front(self, kind: str, made: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(made)

        @functools.wraps(made)
        def features(*args: Any, **kwargs: Any) -> Any:
            if stands_aside():
                return made(*args, **kwargs)
            inputs = signature.bind_partial(*args, **kwargs).arguments
            for name in OWN:
                own = getattr(self.vlm.config, name, None)
                if inputs.get(name) not in (None, own):
                    raise QuickmergeError(
                        f"{name} must be the model's own inside a quickmerge run, {own!r}, got {inputs[name]!r}"
                    )
            # Some models make the features of a video by the function for images.
            within, self._within = self._within, True
            try:
                if not within:
                    self._prepare(inputs, lambda: made(*args, **kwargs))
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
        if self.tower.layout in ("traced", "closed"):
            return self._pieces_of(inputs, vectors)
        if self.vlm.family.mosaic:
            return [[piece] for piece in mosaics(self.vlm, inputs["image_sizes"], seen)]
        pieces = [Piece(each.count, None, each.grid, each) for each in seen]
        if self.tower.layout != "tiles":
            return [[piece] for piece in pieces]
        # All tiles of a row of the batch come as one tensor.
        found: list[list[Piece]] = []
        for tensor in vectors:
            mine: list[Piece] = []
            while sum(piece.tokens for piece in mine) < tensor.shape[:-1].numel():
                mine.append(pieces.pop(0))
            found.append(mine)
        return found

    def _prepare(self, inputs: dict[str, Any], made: Callable[[], Any]) -> None:
        """Images are about to be encoded: find out what the tower must be told of them."""
        tower = self.tower

        def make() -> list[Tensor]:
            output = made()
            if getattr(output, "pooler_output", None) is None:
                raise UnsupportedModelError(
                    f"{type(self.vlm.model).__name__} is not supported: its {FEATURES} gives no pooler_output, which "
                    "would be what takes the place of placeholder tokens"
                )
            return tensors_of(output)

        if tower.layout in ("packed", "tiles") and tower.asks and self.vlm.base not in TRIED:
            making = made_of([each.block for each in self.vlm.blocks], make)
            wanted = _squares_of(self.vlm, inputs, len(making.token))
            same = not making.why and wanted is not None and torch.equal(making.token.cpu(), wanted)
            TRIED[self.vlm.base] = self.vlm.family.layout if same else "traced"
        tower.layout = layout_of(self.vlm)
        tower.begin(self._making(inputs, make) if tower.layout in ("traced", "closed") else None)

    def _making(self, inputs: dict[str, Any], make: Callable[[], Any]) -> Making | None:
        """How the patches at hand become visual tokens; None where it can't be told and nobody asks.

        It is found out once for images of the same shapes, at the price of encoding these twice.

        Raises:
            UnsupportedModelError: saying why it can't be told, where somebody asks.
        """
        key = tuple((name, _shape(value)) for name, value in sorted(inputs.items()))
        if key not in self._makings:
            self._makings[key] = made_of([each.block for each in self.vlm.blocks], make)
        making = self._makings[key]
        if making.why and not self.tower.asks:
            return None
        if making.why:
            raise UnsupportedModelError(
                f"reducer asks which patches the visual tokens of {type(self.vlm.model).__name__} are made of, and "
                f"{making.why}: a method that asks nothing of the tower would do, or a layer inside the language model"
            )
        return making

    def _pieces_of(self, inputs: dict[str, Any], vectors: list[Tensor]) -> list[list[Piece]]:
        """The images whose features stand in tensors; each tile that is encoded alone is one."""
        making = self.tower.making
        whole = None if making is None else self.tower.traced()
        apart = None if making is None else making.apart
        grids = next((v for k, v in inputs.items() if k.endswith("grid_thw") and isinstance(v, Tensor)), None)
        found: list[list[Piece]] = []
        start = 0
        for each, count in zip(vectors, _counts(vectors, inputs), strict=True):
            mine: list[Piece] = []
            for n in count or [n for n in [each.shape[:-1].numel()] if n]:
                index = torch.arange(start, start + n)
                start += n
                lone = None if apart is None else apart[index.to(apart.device)]
                lone = lone if lone is not None and bool(lone.any()) else None
                there = index if lone is None else index[~lone.cpu()]
                told = None if whole is None else whole.at(there)
                mine.append(Piece(n, lone, None, told, runs=not count))
            found.append(mine)
        pieces = [piece for mine in found for piece in mine]
        if grids is None or len(grids) != len(pieces):
            return found
        placed = iter([_with_grid(piece, grid) for piece, grid in zip(pieces, grids.tolist(), strict=True)])
        return [[next(placed) for _ in mine] for mine in found]

    def pieces(self, vectors: Tensor) -> list[Piece]:
        """What a tensor of features was made from.

        Args:
            vectors: the features of some images.

        Raises:
            QuickmergeError: if it was made elsewhere and something must be known of it.
        """
        if vectors in self._known:
            known: list[Piece] = self._known[vectors]
            return known
        hands_on = self.tower.beside is not None and not self.tower.beside.unmerge
        newlines = self.vlm.family.mosaic or self.tower.layout == "traced"
        if self.tower.asks or hands_on or newlines:
            reason = (
                "the reducer reads what the vision tower computes"
                if self.tower.asks
                else "which of them are newlines can't be told"
            )
            reason = "they tell which patches were merged in the vision tower" if hands_on else reason
            raise QuickmergeError(
                f"mm_encoder_outputs must come from the model's get_image_features inside the run, since {reason}; got "
                "features from elsewhere"
            )
        if self.tower.layout == "tiles":
            size = int(self.vlm.base.image_seq_len)
            return [Piece(size)] * (vectors.shape[:-1].numel() // size)
        if vectors.ndim > 2:
            return [Piece(vectors.shape[1:-1].numel())] * len(vectors)
        return [Piece(len(vectors))]


def _squares_of(vlm: Vlm, inputs: dict[str, Any], patches: int) -> Tensor | None:
    """The visual token of each patch, as it must be where squares of patches are what `seen_of` takes them for."""
    merge, raster, config = vlm.merge, True, vlm.tower.config
    if vlm.family.layout == "packed":
        given = next((value for name, value in inputs.items() if name.endswith("grid_thw")), None)
        if not isinstance(given, Tensor):
            return None
        grids, raster = [tuple(each) for each in given.tolist()], vlm.family.raster
    else:
        height, width = (side // config.patch_size for side in inputs["pixel_values"].shape[-2:])
        grids = [(1, height, width)] * (patches // (height * width))
    made, first = torch.full((patches,), -1), [0, 0]
    for grid in grids:
        count = grid[0] * grid[1] * grid[2]
        if first[0] + count > patches or any(side % merge for side in grid[1:]):
            return None
        square = squares(torch.arange(count), grid, merge, raster)
        order = window_order_of(vlm, grid)
        square = square if order is None else square[order]
        made[first[0] + square] = (first[1] + torch.arange(len(square)))[:, None]
        first = [first[0] + count, first[1] + len(square)]
    return made


def _shape(value: Any) -> Any:
    """What of an argument the shapes of images depend on: sizes, and whole numbers themselves."""
    if isinstance(value, Tensor):
        whole = not value.is_floating_point() and value.numel() <= 4096
        return (tuple(value.shape), str(value.dtype), tuple(value.flatten().tolist()) if whole else None)
    if isinstance(value, (list, tuple)):
        return tuple(map(_shape, value))
    return repr(value)


def _counts(vectors: list[Tensor], inputs: dict[str, Any]) -> list[list[int]]:
    """How many visual tokens the images in each tensor have; an empty list where only the prompt tells."""
    grids = next((v for k, v in inputs.items() if k.endswith("grid_thw") and isinstance(v, Tensor)), None)
    sizes = [len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim == 2 and v.dtype == torch.long]
    pixels = next((v for k, v in inputs.items() if k.startswith("pixel_values") and isinstance(v, Tensor)), None)
    if len(vectors) == 1 and vectors[0].ndim == 2 and grids is not None and len(grids) > 1:
        patches, tokens = grids.prod(-1).tolist(), len(vectors[0])
        share = sum(patches) // max(1, tokens)
        even = share * tokens == sum(patches) and all(each % share == 0 for each in patches)
        return [[each // share for each in patches] if even else []]
    # One tensor for each image: as many as there are sizes, or as there are stacks of pixels.
    each_one = len(vectors) in sizes or (pixels is not None and pixels.ndim < 5 and len(pixels) == len(vectors))
    return [
        [each.shape[1:-1].numel()] * len(each) if each.ndim > 2 else [len(each)] if each_one and len(each) else []
        for each in vectors
    ]


def _with_grid(piece: Piece, patches: Sequence[int]) -> Piece:
    """A piece with the grid of its tokens, where these are squares of patches in a grid (T, H, W)."""
    frames, height, width = patches
    for side in range(1, 9):
        grid = (frames, height // side, width // side)
        whole = height % side == 0 and width % side == 0
        if whole and piece.apart is None and frames * grid[1] * grid[2] == piece.tokens:
            seen = None if piece.seen is None else replace(piece.seen, grid=grid)
            return replace(piece, grid=grid, seen=seen)
    return piece


def tensors_of(output: Any) -> list[Tensor]:
    """The features that a model has made, a tensor for each row or image; some give those of all tiles as one."""
    vectors = output.pooler_output
    return [vectors] if isinstance(vectors, Tensor) else list(vectors)


def mosaics(vlm: Vlm, image_sizes: Any, seen: list[Seen]) -> list[Piece]:
    """LLaVA-NeXT: an image as a whole and cut into crops, without what padded them, a newline behind every line.

    The model's own packing is run on numbers instead of features; so it is known which token of which crop went where.
    All of an image is one set of tokens with one budget, and newlines stay as they are.
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
