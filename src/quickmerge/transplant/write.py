"""``transplant.json``: what was done to a model's vocabulary, and what it takes to undo it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from quickmerge.errors import DamagedWeightsError, QuickmergeError, as_index
from quickmerge.files import write_json
from quickmerge.models.chat import Templates, as_templates
from quickmerge.transplant.checkpoint import Checkpoint, Matrices, Piece, file_sha256, read_entries, tensor_piece
from quickmerge.transplant.rebuild import Made
from quickmerge.transplant.rows import KINDS, Plan, Side, assemble, usual_bias
from quickmerge.transplant.settings import (
    Template,
    copy_companions,
    former_ids,
    new_settings,
    of_tokenizer,
    read_settings,
    write_tokenizer,
)
from quickmerge.transplant.tokens import Vocabulary
from quickmerge.transplant.writer import MANIFEST, SIDE, write_model

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DROPPED",
    "ROWS",
    "Former",
    "Transplant",
    "origin_of",
    "read_former",
    "tensor_sha256",
    "vocabulary_sha256",
    "write_transplant",
]


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


# From a plan and approximated rows to a model folder.


@dataclass(frozen=True)
class Transplant:
    """All that is known when it comes to writing."""

    base: str
    donor: str | None
    tokenizer_name: str
    folder: Path
    checkpoint: Checkpoint
    matrices: Matrices
    plan: Plan
    made: Mapping[Side, Made]
    former: Former | None
    """Where this is the way back."""
    ours: Vocabulary
    theirs: Vocabulary
    old_tokenizer: Any
    tokenizer: Any
    template: Template
    method: str
    k: int | None
    clip: float | None
    seed: int
    keep_dropped: bool

    def changed(self, settings: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """By file, the base's settings that are others now, for the way back; what it had not is None."""
        changed = {}
        for name, new in settings.items():
            old = read_settings(self.folder / name) or {}
            changed[name] = {key: old.get(key) for key in new if key not in old or old[key] != new[key]}
        return changed


def write_transplant(work: Transplant, out: Path | None, progress: Callable[[str, int, int], None] | None) -> list[str]:
    """Write the folder; None checks what can be checked without.

    Returns:
        A sentence for each setting that had to be left out.

    Raises:
        QuickmergeError: a setting has no counterpart, or the folder can't be written.
    """
    settings, notes = _settings(work)
    if out is None:
        return notes
    replaced, sides = _matrices(work)
    total = [0, 0]

    def begin(amount: int) -> None:
        total[1] = amount

    def advance(amount: int) -> None:
        total[0] += amount
        if progress is not None:
            progress("writing", total[0], total[1])

    def finish(folder: Path, files: dict[str, dict[str, Any]]) -> None:
        for name, data in settings.items():
            write_json(folder / name, data)
        write_tokenizer(folder, work.tokenizer, work.old_tokenizer, work.template)
        copy_companions(work.folder, folder)
        write_json(folder / MANIFEST, _manifest(work, files, replaced, settings))

    write_model(out, work.checkpoint, replaced, finish, side=sides, total=begin, advance=advance)
    return notes


def _settings(work: Transplant) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The config files by name, and what had to be left out of them."""
    ids = former_ids(work.plan.copied, {o: i for o, i in work.plan.special.items() if o not in work.plan.rivals})
    files: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    further: list[str]
    config = read_settings(work.folder / "config.json")
    if config is None:
        raise QuickmergeError(f"{work.folder} must hold a config.json, got none")
    for name, given, size in (
        ("config.json", config, work.plan.size),
        ("generation_config.json", read_settings(work.folder / "generation_config.json"), None),
    ):
        if given is None:
            continue
        if work.former is not None:
            new, further = work.former.restored(name, given, size), []
        elif work.plan.identical:
            new, further = {**given}, []
            _resize(new, work.plan.size if size is not None else None)
        else:
            new, further = new_settings(given, ids, work.theirs.roles, size=size)
            _stop_on_twins(new, work)
        files[name] = new
        notes += [f"{name}: {note}" for note in further]
    return files, list(dict.fromkeys(notes))


def _resize(settings: dict[str, Any], size: int | None) -> None:
    if size is None:
        return
    if "vocab_size" in settings:
        settings["vocab_size"] = size
    if isinstance(settings.get("text_config"), dict) and "vocab_size" in settings["text_config"]:
        settings["text_config"] = {**settings["text_config"], "vocab_size": size}


def _stop_on_twins(settings: dict[str, Any], work: Transplant) -> None:
    """In a tied matrix a second token with the row of eos is as likely as eos: generation has to stop on it as well."""
    value = settings.get("eos_token_id")
    if value is None or work.matrices.output is not None:
        return
    ends = value if isinstance(value, list) else [value]
    rows = {work.plan.special[one][0] for one in ends if one in work.plan.special}
    twins = [own for own in work.plan.rivals if work.plan.special[own][0] in rows and own not in ends]
    if twins:
        settings["eos_token_id"] = [*ends, *twins]


def _matrices(work: Transplant) -> tuple[dict[str, Piece], dict[str, tuple[Piece, ...]]]:
    """What takes the place of tensors of the base, by name; and the side files."""
    import torch

    plan, replaced = work.plan, {}
    dropped = torch.from_numpy(plan.dropped)
    aside: list[Piece] = [tensor_piece("ids", dropped)]
    for side, entry in (("input", work.matrices.input), ("output", work.matrices.output), ("bias", work.matrices.bias)):
        if entry is None:
            continue
        base = work.checkpoint.read(entry.name)
        part: Side = side  # type: ignore[assignment]
        back = None if work.former is None else work.former.tensor(side, plan.restored)
        new = assemble(plan, base, _made(work, part, base), part, put_aside=back)
        for name in [entry.name, *(twin.name for twin in work.matrices.twins if side == "input")]:
            replaced[name] = tensor_piece(name, new)
        aside.append(tensor_piece(side, base[dropped]))
    kind, origin = torch.from_numpy(plan.kinds()), torch.from_numpy(origin_of(plan))
    sides: dict[str, tuple[Piece, ...]] = {ROWS: (tensor_piece("origin", origin), tensor_piece("kind", kind))}
    # the way back from an identical vocabulary is the folder itself
    if work.keep_dropped and not plan.identical:
        sides[DROPPED] = tuple(aside)
    return replaced, sides


def _made(work: Transplant, side: Side, base: Tensor) -> Tensor:
    return work.made[side].rows if side in work.made else usual_bias(work.plan, base)


def _manifest(
    work: Transplant,
    files: Mapping[str, dict[str, Any]],
    replaced: Mapping[str, Piece],
    settings: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    plan, matrices = work.plan, work.matrices
    entries = [entry for entry in (matrices.input, matrices.output, matrices.bias) if entry is not None]
    return {
        "format": FORMAT,
        "base": {
            "name": work.base, "rows": matrices.rows, "vocabulary_sha256": vocabulary_sha256(work.ours),
            "tensors": {entry.name: tensor_sha256(entry.chunks) for entry in entries},
            "settings": work.changed(settings), "chat_template": of_tokenizer(work.old_tokenizer),
        },
        "donor": work.donor,
        "tokenizer": {"name": work.tokenizer_name, "vocabulary_sha256": vocabulary_sha256(work.theirs)},
        "rows": plan.size,
        "counts": plan.counts(),
        "kinds": list(KINDS),
        "special": {str(own): list(ids) for own, ids in plan.special.items()},
        "unmapped": {str(one): work.theirs.by_id[one].text for one in plan.unmapped if one in work.theirs.by_id},
        "dropped": len(plan.dropped),
        "way_back": work.former is not None,
        "method": {"name": work.method, "k": work.k, "clip": work.clip, "seed": work.seed},
        "matrices": {side: made.as_dict() for side, made in work.made.items()},
        "tensors": {name: tensor_sha256(piece.chunks) for name, piece in replaced.items()},
        "chat_template": {"from": work.template.source, "why": work.template.why},
        "files": dict(files),
        "versions": {name: importlib.metadata.version(name) for name in ("quickmerge", "transformers", "torch")},
    }  # fmt: skip
