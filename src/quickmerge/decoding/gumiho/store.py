"""Draft heads as a folder: config.json and model.safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from quickmerge.decoding.gumiho.config import GumihoConfig
from quickmerge.decoding.gumiho.network import GumihoNetwork
from quickmerge.errors import QuickmergeError
from quickmerge.files import write_bytes
from quickmerge.models.folder import check_safetensors

__all__ = ["load", "save"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(network: GumihoNetwork, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write both files, each whole or not at all; see `Gumiho.save_pretrained`."""
    state = {
        name: value.detach().to(dtype if value.is_floating_point() else None).cpu().contiguous()
        for name, value in network.state_dict().items()
    }
    write_bytes(folder / WEIGHTS, to_bytes(state, metadata={"format": "pt"}))
    write_bytes(folder / CONFIG, network.config.to_json().encode())


def load(folder: Path) -> GumihoNetwork:
    """Read a network, in float32 and for inference; see `Gumiho.from_pretrained`."""
    wrong = f"draft heads must be a folder with {CONFIG} and {WEIGHTS}"
    if not folder.is_dir():
        raise QuickmergeError(f"{wrong}, got {folder}, which is none")
    config = GumihoConfig.read(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        raise QuickmergeError(f"{wrong}, {path} is missing")
    check_safetensors(path)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise QuickmergeError(f"{path} is damaged ({error}): train or copy the draft heads again") from None
    network = GumihoNetwork(config)
    wanted = network.state_dict()
    for name in sorted(set(wanted) | set(state)):
        if name not in wanted or name not in state:
            side = "lacks" if name in wanted else "has the unknown entry"
            raise QuickmergeError(f"{path} does not fit its {CONFIG}: it {side} {name}")
        given, shape = state[name], wanted[name].shape
        if given.shape != shape:
            raise QuickmergeError(
                f"{path} does not fit its {CONFIG}: {name} must have shape {tuple(shape)}, got {tuple(given.shape)}"
            )
        if not bool(given.isfinite().all()):
            raise QuickmergeError(f"{path} is damaged: {name} holds values that are not finite")
    drafted = state.get("drafted")
    if drafted is not None and not _are_ids(drafted, config.vocabulary):
        raise QuickmergeError(f"{path} is damaged: drafted must be rising token ids below {config.vocabulary}")
    network.load_state_dict(state)
    return network.eval()


def _are_ids(drafted: torch.Tensor, vocabulary: int) -> bool:
    rising = bool((drafted.diff() > 0).all())
    return drafted.dtype == torch.long and rising and int(drafted[0]) >= 0 and int(drafted[-1]) < vocabulary
