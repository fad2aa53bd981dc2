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
from safetensors import SafetensorError

from quickmerge.errors import DamagedWeightsError, QuickmergeError, as_index
from quickmerge.vocabulary.checkpoint import read_entries
from quickmerge.vocabulary.stream import file_sha256
from quickmerge.vocabulary.templates import Templates, as_templates
from quickmerge.vocabulary.writer import MANIFEST, SIDE

if TYPE_CHECKING:
    from torch import Tensor

    from quickmerge.vocabulary.plan import Plan
    from quickmerge.vocabulary.tokens import Vocabulary

__all__ = ["DROPPED", "ROWS", "Former", "origin_of", "read_former", "tensor_sha256", "vocabulary_sha256"]

FORMAT = 1
MOST_BYTES = 64 * 2**20
"""Larger manifests are not read."""
MOST_ROWS = 2**26
"""Of a matrix; the largest vocabularies have some 2^18."""
SETTINGS = ("config.json", "generation_config.json")
CHANGED = ("vocab_size", "text_config", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
"""What a transplant changes in these, beside the ids of tokens with a role."""
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
    template: tuple[Templates | None] | None = None
    """The chat template that it had, or that it had none; None where an older release didn't write it down."""

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
    if path.stat().st_size > MOST_BYTES:
        raise _altered(path, f"it is larger than {MOST_BYTES // 2**20} MB")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        number, base = data["format"], data["base"]
        vocabulary, rows, settings = str(base["vocabulary_sha256"]), as_index(base["rows"]), base["settings"]
        hashes = {name: data["files"][f"{SIDE}/{name}"]["sha256"] for name in (ROWS, DROPPED)}
        template = (as_templates(base["chat_template"], "chat_template"),) if "chat_template" in base else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _altered(path, "it is not a manifest of a transplant") from error
    if number != FORMAT:
        raise QuickmergeError(f"{path} must be of format {FORMAT}, got {number}: a later release wrote it")
    _check_settings(path, settings)
    for name, expected in hashes.items():
        if file_sha256(folder / SIDE / name) != expected:
            raise _altered(folder / SIDE / name, f"it is another file than {MANIFEST} says")
    try:
        with safe_open(folder / SIDE / ROWS, framework="np") as file:
            origin = file.get_tensor("origin")
        with safe_open(folder / SIDE / DROPPED, framework="np") as file:
            put_aside = file.get_tensor("ids")
            lengths = {name: file.get_slice(name).get_shape()[:1] for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError) as error:
        raise _altered(folder / SIDE, "a file of it is not what a transplant writes") from error
    if rows is None or not 0 < rows <= MOST_ROWS:
        raise _altered(path, f"base.rows must be a whole number from 1 to {MOST_ROWS}, got {rows!r}")
    for name, ids, least in (("origin", origin, -1), ("ids", put_aside, 0)):
        if ids.ndim != 1 or ids.dtype != np.int64 or bool(((ids < least) | (ids >= rows)).any()):
            raise _altered(folder / SIDE, f"{name} must be ids from {least} to {rows - 1}")
    if bool((np.diff(put_aside) <= 0).any()):
        raise _altered(folder / SIDE / DROPPED, "ids must rise")
    if any(length != [len(put_aside)] for length in lengths.values()):
        raise _altered(folder / SIDE / DROPPED, "it must hold a row for each of its ids")
    return Former(folder, vocabulary, rows, origin, put_aside, settings, template)


def _check_settings(path: Path, settings: Any) -> None:
    """Only what a transplant changes may come back, and into no other files."""
    if not isinstance(settings, dict) or not set(settings) <= set(SETTINGS):
        raise _altered(path, f"base.settings must be of {' and '.join(SETTINGS)}")
    for name, values in settings.items():
        if not isinstance(values, dict):
            raise _altered(path, f"base.settings of {name} must be a JSON object")
        for key in values:
            if key not in CHANGED and not key.endswith(("_token_id", "_token_index", "_index")):
                raise _altered(path, f"base.settings of {name} has {key!r}, which no transplant changes")


def _altered(path: Path, why: str) -> DamagedWeightsError:
    return DamagedWeightsError(f"{path} is damaged ({why}): copy the folder again")


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
