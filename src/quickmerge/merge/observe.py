"""Measuring a model as it is, with the instruments that measure a reduced one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.merge.reducers.baselines import Uniform
from quickmerge.merge.summary import RunStats, VisualStats
from quickmerge.merge.text.run import Run
from quickmerge.models.decoder import AttentionFunction, find_decoder
from quickmerge.models.vlm import Vlm, find_vlm, holds_vlm


class ObserveRun(Run):
    """A run that changes nothing: attention and blocks are not even looked at, only the decoder's calls are timed."""

    mode = "none"
    watches_attention = False
    eager = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.vlm: Vlm | None = find_vlm(model) if holds_vlm(model) else None
        self._tower_seconds = self._tower_began = 0.0
        self._ids: Tensor | None = None
        super().__init__(find_decoder(model) if self.vlm is None else self.vlm.decoder, Uniform(keep=1.0))

    def _stats(self) -> RunStats:
        kind = RunStats if self.vlm is None else VisualStats
        return kind(mode=self.mode, reducer="none")

    def _attach(self) -> None:
        super()._attach()
        if self.vlm is not None:
            self._note(self.vlm.tower.register_forward_pre_hook(self._before_tower))
            self._note(self.vlm.tower.register_forward_hook(self._after_tower))
            self._note(self.vlm.base.register_forward_pre_hook(self._before_base, with_kwargs=True))

    def _before_tower(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._tower_began = self.clock()

    def _after_tower(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._tower_seconds += self.clock() - self._tower_began

    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = args[0] if args else kwargs.get("input_ids")

    def begin(self, prompt: bool, inputs: dict[str, Any]) -> dict[str, Any]:
        """Count the tokens of a prompt."""
        if prompt:
            ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            mask = inputs.get("attention_mask")
            counts = float(ids.shape[1]) if mask is None else float(mask.sum(-1).float().mean())
            self.stats.rows, self.stats.tokens_in = ids.shape[0], counts
            if self.vlm is not None and isinstance(self.stats, VisualStats):
                kinds = [token for kind in ("image", "video") if (token := self.vlm.token(kind)) is not None]
                visual = 0 if self._ids is None else sum(int((self._ids == token).sum()) for token in kinds)
                self.stats.visual_in = self.stats.visual_kept = visual / len(ids)
                self.stats.tower_seconds, self._tower_seconds = self._tower_seconds, 0.0
        return {}

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Never called."""
        return call(module, *args, **kwargs)

    def _block_hook(self, index: int) -> Callable[..., Any] | None:
        return None

    def tokens_per_layer(self) -> list[float]:
        """Every block reads every token."""
        return [self.stats.tokens_in] * len(self.decoder)

    def forget(self) -> None:
        """Drop the ids of the last prompt; nothing else is kept."""
        self._ids = None


def observe(model: PreTrainedModel) -> ObserveRun:
    """Time a model as it is: ``with observe(model) as run: model.generate(...)`` and then ``run.summary()``.

    Raises:
        UnsupportedModelError: for a model that could not be reduced either.
    """
    return ObserveRun(model)
