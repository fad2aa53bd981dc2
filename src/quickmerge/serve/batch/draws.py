"""Sampling in which every row of a batch draws from a generator of its own.

`generate` draws for all rows of a batch from one generator, so what a row is given depends on who stands beside it.
Here the last of the logits processors draws, for each row from its own generator, and leaves only what was drawn;
greedy decoding then takes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from quickmerge.errors import UnsupportedModelError

__all__ = ["Draws", "row_seed", "sampling"]

TOP_K = 50
"""Of which `generate` draws where a model's generation config says nothing."""


def row_seed(seed: int, index: int) -> int:
    """The seed of a row's generator: a hash of the job's seed and the row's place, so that no two rows share draws."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "big") >> 1


class Draws(LogitsProcessor):  # type: ignore[misc]
    """Leaves in each row of the scores one token, drawn from the softmax of the row by the row's own generator.

    Args:
        seeds: one for each row.
        device: of the scores.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``(B, V)``, minus infinity but for the token that was drawn."""
        shares = scores.float().softmax(-1)
        drawn = torch.stack(
            [torch.multinomial(row, 1, generator=own) for row, own in zip(shares, self._generators, strict=True)]
        )
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def sampling(config: Any, temperature: float | None) -> LogitsProcessorList:
    """What `generate` does to the scores before it draws, by a model's generation config.

    Args:
        config: the generation config.
        temperature: in place of the config's; None leaves that.

    Raises:
        UnsupportedModelError: the config asks for a kind of sampling that is not known here.
    """
    if getattr(config, "top_h", None) is not None:
        raise UnsupportedModelError("the model's generation_config must not set top_h for a batch job that samples")
    heat = config.temperature if temperature is None else temperature
    top_k = TOP_K if config.top_k is None else config.top_k
    found = LogitsProcessorList()
    if heat is not None and heat != 1:
        found.append(TemperatureLogitsWarper(float(heat)))
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if config.top_p is not None and config.top_p < 1:
        found.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        found.append(MinPLogitsWarper(config.min_p))
    if config.typical_p is not None and config.typical_p < 1:
        found.append(TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff:
        found.append(EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff:
        found.append(EtaLogitsWarper(config.eta_cutoff))
    return found
