"""From the patches of a vision tower to the visual tokens that they become: attention received, squares, windows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from quickmerge.errors import UnsupportedModelError
from quickmerge.merge.tokens.plan import to_members
from quickmerge.merge.tokens.saliency import AttentionTrace, bidirectional_attention, times_value_norm
from quickmerge.merge.vision.run import Level
from quickmerge.merge.visual.made_of import Making
from quickmerge.merge.visual.merged_tower import TowerRun
from quickmerge.models.attachment import stands_aside
from quickmerge.models.decoder import AttentionFunction, watch_modules
from quickmerge.models.encoder import pixels_of, prefix_of
from quickmerge.models.moved import onto
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
        told = [None if part is None else part[onto(index, part.device)] for part in self.parts()]
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
        return out if order is None else out[onto(order, out.device)]

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


def _of_slots(x: Tensor | None, level: Level | None) -> Tensor | None:
    """What was measured of slots ``(B, K, ...)`` as each patch's own, ``(B, N, ...)``."""
    return x if x is None or level is None else to_members(x, level.slot)


def window_order_of(vlm: Vlm, grid: Grid) -> Tensor | None:
    """The `window_order` of an image in a model's tower; None where it reads no windows."""
    window = getattr(vlm.tower.config, "window_size", None)
    if window is None or vlm.family.layout != "packed":
        return None
    return window_order(grid, vlm.merge, window // vlm.merge // vlm.tower.config.patch_size)


TRIED: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""The layouts of base models with squares of patches whose first image has been looked at, by `made_of`."""


def layout_of(vlm: Vlm) -> str:
    """The layout of a model, as far as it is known."""
    return TRIED.get(vlm.base, vlm.family.layout)


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
        clock: is read before and after, as `quickmerge.bench.harness.mark` is.
        beside: the run that merges patches inside this tower, if one does. It must be attached after this: what is
            measured is then what its slots really attend to. Every patch is given what was measured of its slot in the
            layer that is looked at, and nothing where it was dropped below.
    """

    def __init__(
        self, vlm: Vlm, asks: frozenset[str], clock: Callable[[], Any], beside: TowerRun | None = None
    ) -> None:
        self.vlm, self.asks, self.clock, self.beside = vlm, asks & MEASURED, clock, beside
        self.seen: list[Seen] = []
        """What was seen in the last forward."""
        self.seconds = self.own_seconds = 0.0
        """Seconds of the tower that nobody has taken into account yet, and those of them spent measuring."""
        self.making: Making | None = None
        """How the patches at hand become visual tokens, where that is found out image by image."""
        self._parts: list[tuple[Tensor | None, Tensor | None]] = []
        self._states: list[Tensor] = []
        self._began: Any = 0.0
        self.layout = layout_of(vlm)
        """How the patches become visual tokens; that of the family, unless the first image has shown another."""
        every = [each.attention for each in vlm.blocks]
        self._watched: list[Any] = [vlm.attention] if vlm.family.layout == "patches" else every
        self._own = next((i for i, each in enumerate(self._watched) if each is vlm.attention), -1)

    def attach(self) -> list[Callable[[], None]]:
        """Hook the tower; returns how to undo it."""
        tower = self.vlm.tower
        if tower is None:
            return []
        undo: list[Callable[[], None]] = []
        others = {id(each.tower): each.tower for each in self.vlm.blocks if each.tower is not tower}
        if self.vlm.blocks or self.vlm.attention is not None:
            undo.append(watch_modules(tower, self._watched, self, tower.config))
            # Where several towers look, all of them are watched, with one numbering.
            undo.extend(watch_modules(other, [], self, other.config) for other in others.values())
        if "tower" in self.asks:
            for index, each in enumerate(self.vlm.blocks):
                undo.append(each.block.register_forward_hook(functools.partial(self._state, index)).remove)
        for each in (tower, *others.values()):
            undo.append(each.register_forward_pre_hook(self._before).remove)
            undo.append(each.register_forward_hook(self._after, with_kwargs=True).remove)
        return undo

    def begin(self, making: Making | None) -> None:
        """Images are about to be encoded, whose patches become visual tokens as ``making`` says."""
        self.making, self._parts, self._states = making, [], []

    def account(self) -> tuple[float, float]:
        """Both seconds, and begin anew."""
        out = self.seconds, self.own_seconds
        self.seconds = self.own_seconds = 0.0
        return out

    def forget(self) -> None:
        """Drop everything that was seen."""
        self.account()
        self.seen = []
        self.begin(None)

    def _state(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        if self.making is not None and index == self.making.block and not stands_aside():
            self._states.append((output[0] if isinstance(output, tuple) else output).detach())

    def traced(self) -> Seen:
        """What was seen of all visual tokens of the images at hand, one after another.

        Raises:
            UnsupportedModelError: if the block that is read didn't call the attention function for all of its tokens.
        """
        assert self.making is not None
        making, patches = self.making, len(self.making.token)
        told: dict[str, Tensor | None] = {"features": None, "saliency": None, "key": None}
        if self._states:
            told["features"] = torch.cat([state.flatten(0, -2) for state in self._states])
        for name, parts in zip(("saliency", "key"), zip(*self._parts, strict=True), strict=False):
            if all(part is not None for part in parts):
                told[name] = torch.cat([part.flatten(0, 1) for part in parts])
        wanted = {"features": "tower", "saliency": "attention", "key": "key"}
        for name, asked in wanted.items():
            part = told[name]
            asks = asked in self.asks or (name == "saliency" and "norm" in self.asks)
            if asks and (part is None or len(part) != patches):
                raise UnsupportedModelError(
                    f"reducer asks what the vision tower of {type(self.vlm.model).__name__} attends to, and its blocks "
                    f"called transformers' attention function for {0 if part is None else len(part)} of {patches} "
                    "tokens: a method that asks nothing of the tower would do, or a layer inside the language model"
                )
        features, saliency, key = told["features"], told["saliency"], told["key"]
        return Seen(
            making.count, None,
            None if features is None else making.means(features),
            None if saliency is None else making.sums(saliency),
            None if key is None else making.means(key),
        )  # fmt: skip

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Called for every attention of the layer that is measured; a packed tower calls it image by image."""
        measured = self._own if self.layout != "traced" or self.making is None else self.making.block
        if layer == measured and self.asks & {"attention", "norm", "key"}:
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
        # A tower that makes squares of its patches has no class token.
        first = self.layout in ("patches", "traced") and self._has_class_token()
        return received(AttentionTrace(query, key, value, scaling), kind, class_token=first, mask=mask), keys

    def _has_class_token(self) -> bool:
        names = (name.rpartition(".")[2] for name, _ in self.vlm.tower.named_parameters())
        return any(name in ("cls_token", "class_token", "class_embedding") for name in names)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if stands_aside():
            return
        self._began = self.clock()
        if self.layout != "traced":
            self._parts = []

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if stands_aside():
            return
        ended = self.clock()
        if self.layout in ("traced", "closed"):
            self.seconds += ended - self._began
            return
        with torch.no_grad():
            if self.beside is not None:
                level = self.beside.seen_by(self.vlm.block)
                self._parts = [(_of_slots(votes, level), _of_slots(keys, level)) for votes, keys in self._parts]
            read = {"patches": self._patches, "tiles": self._tiles, "packed": self._packed}
            self.seen = read[self.layout](args, kwargs, output)
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
        joined_already = None
        if features is not None and len(features) * merge * merge == sum(sizes) and merge > 1:
            # What the tower hands out last is of squares already.
            joined_already, features = features.split([n // merge**2 for n in sizes]), None
        split = [[None] * len(grids) if x is None else x.split(sizes) for x in (features, saliency, key)]
        seen = []
        for i, (grid, vectors, votes, keys) in enumerate(zip(grids, *split, strict=True)):
            what = seen_of(grid, merge, raster, vectors, votes, keys, window_order_of(self.vlm, grid))
            seen.append(what if joined_already is None else replace(what, features=joined_already[i]))
        return seen
