"""Measuring the visual tokens while the vision tower makes them: attention, keys and features, as they are asked for.

One row of the class token's attention, or the sums over the columns of the whole map, come from the queries and keys of
one layer, seen through the attention registry. The tower keeps its fused attention, and no N x N map is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quickmerge.hosts.attention import AttentionFunction, watch_modules
from quickmerge.hosts.encoder import pixels_of, prefix_of
from quickmerge.hosts.tower_tokens import Grid, Seen, received, seen_of, window_order
from quickmerge.hosts.vlm_structure import Vlm
from quickmerge.tokens.saliency import AttentionTrace

MEASURED = frozenset({"tower", "attention", "norm", "key"})
"""What reducers ask for that only the tower can tell."""


class TowerWatch:
    """Looks at every forward of a vision tower while it is attached.

    Args:
        vlm: the model that holds it.
        asks: what the reducer wants to know, of `MEASURED`; nothing else is measured.
        clock: tells seconds.
    """

    def __init__(self, vlm: Vlm, asks: frozenset[str], clock: Callable[[], float]) -> None:
        self.vlm, self.asks, self.clock = vlm, asks & MEASURED, clock
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
        """Called for every attention of the layer that is measured; a packed tower calls it picture by picture."""
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
        # Registers, and a class token that stays, belong to no place in the picture.
        whole = prefix_of(states[0].shape[1], grid, type(self.vlm.model).__name__) == gone
        features = torch.cat(states, -1)[:, gone:].detach() if "tower" in self.asks else None
        saliency, key = self._parts[-1] if self._parts else (None, None)
        told = [features, *(None if x is None else x[:, gone:] for x in (saliency, key))]
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
        """Pictures and videos one after another in one sequence."""
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
