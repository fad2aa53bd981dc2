"""What vLLM's vision towers tell of their tokens while they make them: attention received, and keys.

A hook on the projection to queries, keys and values of one layer reads what that layer is about to attend by; the
tower's own attention stays as it is. Where its heads are shared out over several processes (tensor parallel), each sees
a part of them, and sums over heads need one all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from quickmerge.errors import QuickmergeError
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.tokens.saliency import AttentionTrace
from quickmerge.merge.visual.tower import Grid, Seen, received, seen_of, window_order

__all__ = ["Heads", "PackedTower", "TowerHeads", "check_engine"]


def check_engine(vllm_config: Any) -> None:
    """Raise for settings of an engine under which a tower does not run as plain modules on every process."""
    compilation = vllm_config.compilation_config
    for name in ("compile_mm_encoder", "cudagraph_mm_encoder"):
        if getattr(compilation, name, False):
            raise QuickmergeError(
                f"{name} must be False with quickmerge's models in vLLM, which look at the vision tower while it runs"
            )
    mode = vllm_config.model_config.multimodal_config.mm_encoder_tp_mode
    if mode != "weights":
        raise QuickmergeError(
            f"mm_encoder_tp_mode must be 'weights' with quickmerge's models in vLLM, got {mode!r}, by which each "
            "process sees some of the images"
        )


class Heads:
    """What is measured of one layer's heads.

    Args:
        asks: what the reducer wants to know: of ``"attention"``, ``"norm"`` and ``"key"``.
        heads: of the layer in this process.
        class_token: whether the first token is a class token, whose attention alone is then read.
        shared: whether the layer's heads are shared out over the processes.
    """

    def __init__(self, reducer: Reducer, heads: int, *, class_token: bool, shared: bool) -> None:
        self.asks = reducer.needs.visual & {"attention", "norm", "key"}
        self.heads, self.class_token = heads, class_token
        self.ranks = get_tensor_model_parallel_world_size() if shared else 1

    @property
    def kind(self) -> str | None:
        """Which attention is measured, if any."""
        return next(iter(self.asks & {"attention", "norm"}), None)

    def measure(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Saliency ``(B, N)`` and keys ``(B, N, d)`` of queries, keys and values ``(B, heads, N, d)``, all heads' own.

        As `quickmerge.merge.visual.tower.received` says: sums over heads for a class token, means otherwise.
        """
        parts: list[Tensor] = []
        if self.kind is not None:
            trace = AttentionTrace(query, key, value, query.shape[-1] ** -0.5)
            votes = received(trace, self.kind, class_token=self.class_token)
            sums = self.class_token and self.kind == "attention"
            parts.append((votes if sums else votes / self.ranks)[..., None])
        if "key" in self.asks:
            precise = torch.promote_types(key.dtype, torch.float32)
            parts.append(key.to(precise).mean(1) / self.ranks)
        told = torch.cat(parts, -1)
        if self.ranks > 1:
            told = tensor_model_parallel_all_reduce(told)
        first = told[..., 0] if self.kind is not None else None
        return first, told[..., int(self.kind is not None) :] if "key" in self.asks else None


class TowerHeads(Heads):
    """`Heads` of a tower that reads images one by one, a row each: what its last layer was seen to project.

    Args:
        layer: the module that projects to queries, keys and values, side by side.
        reducer: asks.
        heads: see `Heads`.
        class_token: see `Heads`.
        shared: see `Heads`.
    """

    def __init__(self, layer: nn.Module, reducer: Reducer, heads: int, *, class_token: bool, shared: bool) -> None:
        super().__init__(reducer, heads, class_token=class_token, shared=shared)
        self.seen: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.asks:
            layer.register_forward_hook(self._see)

    @torch.no_grad()
    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in made.chunk(3, -1))
        self.seen = self.measure(query, key, value)

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """What was seen since the last time."""
        seen, self.seen = self.seen, (None, None)
        if self.asks and all(part is None for part in seen):
            raise RuntimeError("the attention of vLLM's vision tower was not called where quickmerge looks at it")
        return seen


class PackedTower:
    """What a tower of squares of patches tells, which reads images of any size one after another in one sequence.

    Args:
        visual: vLLM's tower, with ``blocks`` and a ``merger``.
        config: its configuration in transformers.
        reducer: asks.
    """

    def __init__(self, visual: Any, config: Any, reducer: Reducer) -> None:
        self.merge = int(config.spatial_merge_size)
        window = getattr(config, "window_size", None)
        self.window = None if window is None else window // self.merge // config.patch_size
        # Windowed blocks see a corner each; the last block that sees the whole image is asked.
        block = max(getattr(config, "fullatt_block_indexes", None) or [len(visual.blocks) - 1])
        attention = visual.blocks[block].attn
        heads = attention.attn.num_heads
        self.heads = Heads(reducer, heads, class_token=False, shared=attention.tp_size > 1)
        self.wants_features = "tower" in reducer.needs.visual
        self._attended: list[Tensor] | None = None
        self._states: Tensor | None = None
        if self.heads.asks:
            attention.attn.register_forward_pre_hook(self._attend, with_kwargs=True)
        if self.wants_features:
            # The merger itself may be compiled, and is then called past its hooks; its norm reads what it is given.
            norm = getattr(visual.merger, "ln_q", None) or visual.merger.norm
            norm.register_forward_pre_hook(self._merge)

    def _attend(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        self._attended = [given[name].detach() for name in ("query", "key", "value")]

    def _merge(self, module: nn.Module, args: Any) -> None:
        self._states = args[0].detach().reshape(-1, args[0].shape[-1])

    @torch.no_grad()
    def take(self, grids: list[Grid]) -> list[Seen]:
        """What was seen of images of these ``grids`` (T, H, W) of patches since the last time."""
        sizes = [t * h * w for t, h, w in grids]
        found: Any
        for what, wanted, found in (
            ("merger", self.wants_features, self._states),
            ("attention", bool(self.heads.asks), self._attended),
        ):
            if wanted and found is None:
                raise RuntimeError(f"the {what} of vLLM's vision tower was not called where quickmerge looks at it")
        features: Any = [None] * len(grids) if self._states is None else torch.split(self._states, sizes)
        votes: list[Tensor | None] = [None] * len(grids)
        keys: list[Tensor | None] = [None] * len(grids)
        if self._attended is not None:
            parts = [torch.split(part.flatten(0, 1), sizes) for part in self._attended]  # (patches, heads, d) each
            for index, each in enumerate(zip(*parts, strict=True)):
                told = self.heads.measure(*(x.transpose(0, 1)[None] for x in each))
                votes[index], keys[index] = (None if x is None else x[0] for x in told)
        self._attended, self._states = None, None
        seen = []
        for grid, vectors, vote, key in zip(grids, features, votes, keys, strict=True):
            order = None if self.window is None else window_order(grid, self.merge, self.window)
            seen.append(seen_of(grid, self.merge, False, vectors, vote, key, order))
        return seen
