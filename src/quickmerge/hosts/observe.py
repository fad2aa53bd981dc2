"""Measuring a model as it is, with the instruments that measure a reduced one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from quickmerge.hosts.attention import AttentionFunction
from quickmerge.hosts.causal_lm import Run
from quickmerge.hosts.structure import find_decoder
from quickmerge.reducers.uniform import Uniform


class ObserveRun(Run):
    """A run that changes nothing: attention and blocks are not even looked at, only the decoder's calls are timed."""

    mode = "none"
    watches_attention = False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(find_decoder(model), Uniform(keep=1.0))

    def begin(self, prompt: bool, inputs: dict[str, Any]) -> dict[str, Any]:
        """Count the tokens of a prompt."""
        if prompt:
            ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            mask = inputs.get("attention_mask")
            counts = float(ids.shape[1]) if mask is None else float(mask.sum(-1).float().mean())
            self.stats.reducer, self.stats.rows, self.stats.tokens_in = "none", ids.shape[0], counts
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
        """Nothing is kept."""


def observe(model: PreTrainedModel) -> ObserveRun:
    """Time a model as it is: ``with observe(model) as run: model.generate(...)`` and then ``run.summary()``.

    Raises:
        UnsupportedModelError: for a model that could not be reduced either.
    """
    return ObserveRun(model)
