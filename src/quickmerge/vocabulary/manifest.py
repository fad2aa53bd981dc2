"""``transplant.json``: what was done to a model's vocabulary, and what it takes to undo it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quickmerge.errors import DamagedWeightsError, QuickmergeError
from quickmerge.vocabulary.checkpoint import read_entries
from quickmerge.vocabulary.writer import MANIFEST, SIDE

if TYPE_CHECKING:
    from torch import Tensor

    from quickmerge.vocabulary.plan import Plan
    from quickmerge.vocabulary.tokens import Vocabulary

__all__ = ["DROPPED", "ROWS", "Former", "origin_of", "read_former", "tensor_sha256", "vocabulary_sha256"]

FORMAT = 1
ROWS = "rows.safetensors"
"""``origin (V,)``: the base id that each row was copied from, or -1. ``kind (V,)``: its place in ``KINDS``."""
DROPPED = "dropped_rows.safetensors"
"""``ids (R,)``, and ``input``, ``output`` and ``bias`` rows ``(R, ...)`` of base tokens that nobody took over."""


@dataclass(frozen=True)
class Former:
    """What a model folder knows of the vocabulary that it had before a transplant."""

    folder: Path
    vocabulary: str
    """Its sha256."""
    rows: int
    """How many rows its matrices had."""
    origin: NDArray[np.int64]
    """``(V,)``, for each row as it is the id that it had, or -1."""
    put_aside: NDArray[np.int64]
    """Former ids whose rows are in the side file."""
    settings: dict[str, dict[str, Any]]
    """By file, the settings that the transplant changed, as they were."""

    def restored(self, name: str, settings: dict[str, Any], size: int | None) -> dict[str, Any]:
        """A config with the former settings; ``size`` is its ``vocab_size``, None where it has none."""
        new = {**settings, **self.settings.get(name, {})}
        if size is not None and "vocab_size" in new:
            new["vocab_size"] = size
        if size is not None and isinstance(new.get("text_config"), dict) and "vocab_size" in new["text_config"]:
            new["text_config"] = {**new["text_config"], "vocab_size": size}
        return new

    def tensor(self, side: str, ids: NDArray[np.int64]) -> Tensor:
        """The rows that were put aside of the former ``ids``, for one of ``input``, ``output`` and ``bias``."""
        import torch
        from safetensors import safe_open

        places = np.searchsorted(self.put_aside, ids)
        with safe_open(self.folder / SIDE / DROPPED, framework="pt") as file:
            rows: Tensor = file.get_tensor(side)
        return rows[torch.from_numpy(places)]


def read_former(folder: Path) -> Former | None:
    """What a model folder knows of its former vocabulary; None if it is not the result of a transplant.

    Raises:
        QuickmergeError: its manifest is of a later format.
        DamagedWeightsError: its manifest or its side files are damaged.
    """
    path = folder / MANIFEST
    if not path.is_file() or not (folder / SIDE / DROPPED).is_file():
        return None
    from safetensors import safe_open

    for name in (ROWS, DROPPED):
        if not (folder / SIDE / name).is_file():
            raise DamagedWeightsError(f"{folder / SIDE / name} is missing: copy the folder again")
        read_entries(folder / SIDE / name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        number, base = data["format"], data["base"]
        vocabulary, rows, settings = str(base["vocabulary_sha256"]), int(base["rows"]), dict(base["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedWeightsError(f"{path} is damaged (it is not a manifest of a transplant): copy it again") from error
    if number != FORMAT:
        raise QuickmergeError(f"{path} must be of format {FORMAT}, got {number}: a later release wrote it")
    with safe_open(folder / SIDE / ROWS, framework="np") as file:
        origin = file.get_tensor("origin")
    with safe_open(folder / SIDE / DROPPED, framework="np") as file:
        put_aside = file.get_tensor("ids")
    return Former(folder, vocabulary, rows, origin, put_aside, settings)


def origin_of(plan: Plan) -> NDArray[np.int64]:
    """``(V,)``: the base id that each row was copied from bit for bit in every matrix, or -1."""
    origin = np.full(plan.size, -1, np.int64)
    origin[plan.copied[:, 0]] = plan.copied[:, 1]
    for own, ids in plan.special.items():
        if len(ids) == 1 and own not in plan.rivals:
            origin[own] = ids[0]
    return origin


def vocabulary_sha256(vocabulary: Vocabulary) -> str:
    """A hash of which text has which id, whatever file it came from."""
    digest = hashlib.sha256()
    for token in vocabulary.tokens:
        digest.update(json.dumps([token.id, token.text, token.special]).encode())
    return digest.hexdigest()


def tensor_sha256(chunks: Callable[[], Any]) -> str:
    """A hash of a tensor's bytes."""
    digest = hashlib.sha256()
    for part in chunks():
        digest.update(part)
    return digest.hexdigest()
