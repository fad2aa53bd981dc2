"""Draft heads as a folder: config.json and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from quickmerge.decoding.gumiho.config import GumihoConfig
from quickmerge.decoding.gumiho.network import GumihoNetwork
from quickmerge.errors import QuickmergeError
from quickmerge.models.part import CONFIG, WEIGHTS, open_part, save_part

__all__ = ["load", "save"]


def save(network: GumihoNetwork, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """Write both files, or neither; see `Gumiho.save_pretrained`."""
    state = {
        name: value.to(dtype if value.is_floating_point() else None) for name, value in network.state_dict().items()
    }
    save_part(folder, json.loads(network.config.to_json()), state)


def load(folder: Path | str) -> GumihoNetwork:
    """Read a network, in float32 and for inference; see `Gumiho.from_pretrained`."""
    part = open_part("draft heads", folder, f"draft heads must be a folder with {CONFIG} and {WEIGHTS}")
    config = GumihoConfig.from_data(part.config, part.folder / CONFIG)

    def check(state: Mapping[str, torch.Tensor]) -> None:
        drafted = state.get("drafted")
        if drafted is not None and not _are_ids(drafted, config.vocabulary):
            raise QuickmergeError(
                f"{part.weights} is damaged: drafted must be rising token ids below {config.vocabulary}"
            )

    return part.fill(lambda: GumihoNetwork(config), check)


def _are_ids(drafted: torch.Tensor, vocabulary: int) -> bool:
    rising = bool((drafted.diff() > 0).all())
    return drafted.dtype == torch.long and rising and int(drafted[0]) >= 0 and int(drafted[-1]) < vocabulary
