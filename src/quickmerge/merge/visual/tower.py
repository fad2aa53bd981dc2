"""From the patches of a vision tower to the visual tokens that they become: attention received, squares, windows."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from quickmerge.errors import QuickmergeError
from quickmerge.merge.tokens.plan import to_members
from quickmerge.merge.tokens.saliency import AttentionTrace, bidirectional_attention, times_value_norm
from quickmerge.merge.vision.run import Level
from quickmerge.merge.visual.merged_tower import TowerRun
from quickmerge.models.attachment import stand_in
from quickmerge.models.decoder import AttentionFunction, watch_modules
from quickmerge.models.encoder import pixels_of, prefix_of
from quickmerge.models.vlm import Vlm

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Seen:
    """What the tower told of one image, tile or video whose tokens it made; None where nobody asked.

    ``grid`` (T, H, W) of the ``count`` visual tokens, where they form one; ``features (n, D)``, ``saliency (n,)`` and
    ``key (n, d)``. Where patches were merged inside the tower, ``leader (n,)`` is for each token the one that stands
    for the slot it is in, -1 if it was dropped; and what was measured of a slot is each of its patches'.
    """

    count: int
    grid: Grid | None
    features: Tensor | None = None
    saliency: Tensor | None = None
    key: Tensor | None = None
    leader: Tensor | None = None

    def at(self, index: Tensor) -> Seen:
        """The same of some of its tokens, ``index (k,)``."""
        told = [None if part is None else part[index.to(part.device)] for part in self.parts()]
        return Seen(len(index), self.grid, *told)

    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Features, saliency and keys."""
        return self.features, self.saliency, self.key


def received(trace: AttentionTrace, kind: str, *, class_token: bool, mask: Tensor | None = None) -> Tensor:
    """How much attention every token of a tower receives, ``(B, N)`` in float32 at least.

    From the class token, the first one: the sum over heads of its row, ``a_j = sum_h p_h0j`` (SCOPE, arXiv 2510.24214).
    From all tokens where there is none: mean over heads, sum over queries, ``a_j = sum_i mean_h p_hij``. With ``kind``
    ``"norm"`` the length of what it adds to the outputs instead, mean over heads of
    ``sqrt(mean_i ||p_hij v_hj||^2)``, i over the tokens that vote.

    Args:
        trace: the layer.
        kind: ``"attention"`` or ``"norm"``.
        class_token: whether the first token alone votes.
        mask: the tower's own, ``(B, 1, 1 or N, N)``, bool or added to the scores, the same for every query; what it
            hides does not vote.
    """
    b, _, n, _ = trace.query.shape
    rows = torch.zeros(b, 1, dtype=torch.long, device=trace.query.device)
    bias = None
    if not class_token:
        rows = torch.arange(n, device=trace.query.device).expand(b, n)
    if mask is not None:
        line = mask[:, 0, 0].expand(b, n)
        hidden = ~line if line.dtype == torch.bool else line < torch.finfo(line.dtype).min / 2
        # Slots that patches were merged to in the tower may count as their size.
        bias = torch.zeros(b, n, device=rows.device) if line.dtype == torch.bool else line.float()
        bias = bias.masked_fill(hidden, -torch.inf)
        rows = rows if class_token else torch.where(hidden, -1, rows)
    if kind == "norm":
        share = bidirectional_attention(trace, rows, bias, moment=2)
        return times_value_norm(share, trace.value).mean(1)
    share = bidirectional_attention(trace, rows, bias)
    out: Tensor = share.sum(1) if class_token else share.mean(1) * (rows >= 0).sum(-1, keepdim=True)
    return out


def window_order(grid: Grid, merge: int, window: int) -> Tensor:
    """The place that each visual token of an image has in a tower that reads it window by window: ``(n,)`` long.

    Frames stay apart. Windows of ``window`` x ``window`` tokens follow one another line by line, those at the right and
    lower edges smaller, and so do the tokens in each.
    """
    frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across = -(-width // window)
    rank = ((y // window * across + x // window) * window + y % window) * window + x % window
    order = rank.flatten().argsort().argsort()
    return (order + torch.arange(frames)[:, None] * height * width).flatten()


def squares(x: Tensor, grid: Grid, merge: int, raster: bool) -> Tensor:
    """Patches ``(T H W, ...)`` by the ``merge`` x ``merge`` squares that become one token: ``(n, merge^2, ...)``."""
    rest = x.shape[1:]
    if not raster:
        return x.reshape(-1, merge * merge, *rest)
    t, h, w = grid
    lines = x.reshape(t, h // merge, merge, w // merge, merge, *rest)
    return lines.transpose(2, 3).reshape(-1, merge * merge, *rest)


def seen_of(
    grid: Grid,
    merge: int,
    raster: bool,
    features: Tensor | None,
    saliency: Tensor | None,
    key: Tensor | None,
    order: Tensor | None = None,
) -> Seen:
    """Of patches, what is to be known of the tokens that squares of them make: means, and sums of saliency."""

    def pooled(x: Tensor | None, how: str) -> Tensor | None:
        if x is None:
            return None
        by_square = squares(x, grid, merge, raster)
        out = by_square.sum(1) if how == "sum" else by_square.to(torch.promote_types(x.dtype, torch.float32)).mean(1)
        return out if order is None else out[order.to(out.device)]

    shape = (grid[0], grid[1] // merge, grid[2] // merge)
    count = shape[0] * shape[1] * shape[2]
    return Seen(count, shape, pooled(features, "mean"), pooled(saliency, "sum"), pooled(key, "mean"))


def joined(parts: Sequence[Seen], index: Tensor) -> Seen:
    """The tokens ``index`` of several crops taken one after another; they form no grid."""
    given = list(zip(*(each.parts() for each in parts), strict=True))
    features, saliency, key = (None if t[0] is None else torch.cat(t)[index.to(t[0].device)] for t in given)
    leader = None
    if any(each.leader is not None for each in parts):
        every, start = [], 0
        for each in parts:
            own = torch.arange(each.count) if each.leader is None else each.leader.cpu()
            every.append(torch.where(own >= 0, own + start, -1))
            start += each.count
        leader = _leaders_among(torch.cat(every), index.cpu())
    return Seen(len(index), None, features, saliency, key, leader)


def _leaders_among(leader: Tensor, index: Tensor) -> Tensor:
    """Leaders ``(n,)`` of tokens of which only ``index (k,)`` are there, as numbers among these, ``(k,)``.

    A slot whose leader is not there is led by the first of its tokens that is.
    """
    here, slot = torch.arange(len(index)), leader[index]
    place = torch.full_like(leader, -1)
    place[index] = here
    first = torch.full_like(leader, len(index)).scatter_reduce(0, slot.clamp_min(0), torch.where(
        slot >= 0, here, len(index)), "amin")  # fmt: skip
    found = place[slot.clamp_min(0)]
    return torch.where(slot < 0, -1, torch.where(found >= 0, found, first[slot.clamp_min(0)]))


# Measuring the visual tokens while the vision tower makes them: attention, keys and features, as they are asked for.
#
# One row of the class token's attention, or the sums over the columns of the whole map, come from the queries and keys
# of one layer, seen through the attention registry. The tower keeps its fused attention, and no N x N map is kept.


MEASURED = frozenset({"tower", "attention", "norm", "key"})
"""What reducers ask for that only the tower can tell."""


class TowerWatch:
    """Looks at every forward of a vision tower while it is attached.

    Args:
        vlm: the model that holds it.
        asks: what the reducer wants to know, of `MEASURED`; nothing else is measured.
        clock: tells seconds.
        beside: the run that merges patches inside this tower, if one does. It must be attached after this: what is
            measured is then what its slots really attend to. Every patch is given what was measured of its slot in the
            layer that is looked at, and nothing where it was dropped below.
    """

    def __init__(
        self, vlm: Vlm, asks: frozenset[str], clock: Callable[[], float], beside: TowerRun | None = None
    ) -> None:
        self.vlm, self.asks, self.clock, self.beside = vlm, asks & MEASURED, clock, beside
        self.seen: list[Seen] = []
        """What was seen in the last forward."""
        self.seconds = self.own_seconds = 0.0
        """Seconds of the tower that nobody has taken into account yet, and those of them spent measuring."""
        self._parts: list[tuple[Tensor | None, Tensor | None]] = []
        self._began = 0.0

    def attach(self) -> list[Callable[[], None]]:
        """Hook the tower; returns how to undo it."""
        undo = [watch_modules(self.vlm.tower, [self.vlm.attention], self, self.vlm.tower.config)]
        undo.append(self.vlm.tower.register_forward_pre_hook(self._before).remove)
        undo.append(self.vlm.tower.register_forward_hook(self._after, with_kwargs=True).remove)
        return undo

    def account(self) -> tuple[float, float]:
        """Both seconds, and begin anew."""
        out = self.seconds, self.own_seconds
        self.seconds = self.own_seconds = 0.0
        return out

    def forget(self) -> None:
        """Drop everything that was seen."""
        self.account()
        self.seen, self._parts = [], []

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Called for every attention of the layer that is measured; a packed tower calls it image by image."""
        if self.asks & {"attention", "norm", "key"}:
            began = self.clock()
            with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
                self._parts.append(self._measure(args, kwargs))
            self.own_seconds += self.clock() - began
        return call(module, *args, **kwargs)

    def _measure(self, args: tuple[Any, ...], kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
        query, key, value = args[:3]
        mask = args[3] if len(args) > 3 else kwargs.get("attention_mask")
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        keys = key.to(torch.promote_types(key.dtype, torch.float32)).mean(1) if "key" in self.asks else None
        kind = next(iter(self.asks & {"attention", "norm"}), None)
        if kind is None:
            return None, keys
        # A tower of another layout than "patches" has no class token.
        first = self.vlm.encoder is not None and self._has_class_token()
        return received(AttentionTrace(query, key, value, scaling), kind, class_token=first, mask=mask), keys

    def _has_class_token(self) -> bool:
        return bool(self.vlm.tower.config.model_type != "siglip_vision_model")

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._parts, self._began = [], self.clock()

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ended = self.clock()
        with torch.no_grad():
            if self.beside is not None:
                level = self.beside.seen_by(self.vlm.block)
                self._parts = [(_of_slots(votes, level), _of_slots(keys, level)) for votes, keys in self._parts]
            read = {"patches": self._patches, "tiles": self._tiles, "packed": self._packed}
            self.seen = read[self.vlm.family.layout](args, kwargs, output)
        self._parts = []
        self.own_seconds += self.clock() - ended
        self.seconds += self.clock() - self._began

    # Layouts ----------------------------------------------------------------------------------------------------

    def _patches(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[Seen]:
        """Every patch a visual token; what stands in front of them is left out as the model does."""
        encoder, config = self.vlm.encoder, self.vlm.config
        assert encoder is not None
        pixels = pixels_of(args, kwargs)
        grid = encoder.grid(pixels)
        layers = config.vision_feature_layer
        states = [output.hidden_states[i] for i in ([layers] if isinstance(layers, int) else layers)]
        gone = 1 if config.vision_feature_select_strategy == "default" else 0
        count = states[0].shape[1] - gone
        # Registers, and a class token that stays, belong to no place in the image.
        whole = prefix_of(states[0].shape[1], grid, type(self.vlm.model).__name__) == gone
        features = torch.cat(states, -1)[:, gone:].detach() if "tower" in self.asks else None
        saliency, key = self._parts[-1] if self._parts else (None, None)
        told = [features, *(None if x is None else x[:, gone:] for x in (saliency, key))]
        leaders = None if self.beside is None else self.beside.leaders
        told.append(None if leaders is None else torch.where(leaders >= 0, leaders - gone, -1)[:, gone:])
        each = [[None] * len(pixels) if x is None else list(x) for x in told]
        return [Seen(count, grid if whole else None, *parts) for parts in zip(*each, strict=True)]

    def _tiles(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[Seen]:
        """Squares of patches of every tile, lines of patches one after another."""
        pixels, patch, merge = pixels_of(args, kwargs), self.vlm.tower.config.patch_size, self.vlm.merge
        grid: Grid = (1, pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        features = output.last_hidden_state.detach() if "tower" in self.asks else None
        saliency, key = self._parts[-1] if self._parts else (None, None)
        each = [[None] * len(pixels) if x is None else list(x) for x in (features, saliency, key)]
        return [seen_of(grid, merge, True, *parts) for parts in zip(*each, strict=True)]

    def _packed(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[Seen]:
        """Images and videos one after another in one sequence."""
        given = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        grids: list[Grid] = [tuple(each) for each in given.tolist()]
        merge, raster = self.vlm.merge, self.vlm.family.raster
        features = output.last_hidden_state.detach().flatten(0, -2) if "tower" in self.asks else None
        told = list(zip(*self._parts, strict=True)) if self._parts else [(None,), (None,)]
        saliency, key = (None if parts[0] is None else torch.cat(parts, 1)[0] for parts in told)
        sizes = [t * h * w for t, h, w in grids]
        split = [[None] * len(grids) if x is None else x.split(sizes) for x in (features, saliency, key)]
        window = getattr(self.vlm.tower.config, "window_size", None)
        seen = []
        for grid, vectors, votes, keys in zip(grids, *split, strict=True):
            order = None
            if window is not None:
                order = window_order(grid, merge, window // merge // self.vlm.tower.config.patch_size)
            seen.append(seen_of(grid, merge, raster, vectors, votes, keys, order))
        return seen


# Knowing of every feature that fills a placeholder which image it was made from.
#
# ``generate`` encodes images before anything else and then hands on features alone, so what they were made from has
# to be noted where they are made: a run stands in front of the model's ``get_image_features`` and
# ``get_video_features`` while it is attached.


OWN = ("vision_feature_layer", "vision_feature_select_strategy")
"""Settings of a call that must be the model's own, since the tower is watched where they say."""


def _of_slots(x: Tensor | None, level: Level | None) -> Tensor | None:
    """What was measured of slots ``(B, K, ...)`` as each patch's own, ``(B, N, ...)``."""
    return x if x is None or level is None else to_members(x, level.slot)


@dataclass(frozen=True)
class Piece:
    """Placeholders of one image: how many, which of them are ``apart``, no visual tokens, and what is known."""

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
            # Some models make the features of a video by the function for images.
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

        Args:
            vectors: the features of some images.

        Raises:
            QuickmergeError: if it was made elsewhere and something must be known of it.
        """
        if vectors in self._known:
            known: list[Piece] = self._known[vectors]
            return known
        hands_on = self.tower.beside is not None and not self.tower.beside.unmerge
        if self.tower.asks or hands_on or self.vlm.name == "llava_next":
            reason = "the reducer reads what the vision tower computes" if self.tower.asks else "they hold newlines too"
            reason = "they tell which patches were merged in the vision tower" if hands_on else reason
            raise QuickmergeError(
                f"mm_encoder_outputs must come from the model's get_image_features inside the run, since {reason}; got "
                "features from elsewhere"
            )
        if self.vlm.family.layout == "tiles":
            size = int(self.vlm.base.image_seq_len)
            return [Piece(size)] * (vectors.shape[:-1].numel() // size)
        return [Piece(len(vectors))]


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
