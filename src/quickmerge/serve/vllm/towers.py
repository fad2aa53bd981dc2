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
from quickmerge.merge.visual.tower import received

__all__ = ["Heads", "check_engine"]


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
            f"mm_encoder_tp_mode must be 'weights' with quickmerge's models in vLLM, got {mode!r}, by which each process "
            "sees some of the images"
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
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in made.chunk(3, -1)
        )
        self.seen = self.measure(query, key, value)

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """What was seen since the last time."""
        seen, self.seen = self.seen, (None, None)
        return seen
