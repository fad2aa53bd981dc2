"""From a plan and approximated rows to a model folder."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.errors import QuickmergeError
from quickmerge.files import write_json
from quickmerge.vocabulary.checkpoint import Checkpoint
from quickmerge.vocabulary.manifest import (
    DROPPED,
    FORMAT,
    ROWS,
    Former,
    origin_of,
    tensor_sha256,
    vocabulary_sha256,
)
from quickmerge.vocabulary.matrices import Matrices
from quickmerge.vocabulary.plan import KINDS, Plan
from quickmerge.vocabulary.rebuild import Made
from quickmerge.vocabulary.rows import Side, assemble, usual_bias
from quickmerge.vocabulary.settings import (
    Template,
    copy_companions,
    former_ids,
    new_settings,
    read_settings,
    write_tokenizer,
)
from quickmerge.vocabulary.stream import Piece, tensor_piece
from quickmerge.vocabulary.templates import of_tokenizer
from quickmerge.vocabulary.tokens import Vocabulary
from quickmerge.vocabulary.writer import MANIFEST, write_model

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Transplant", "write_transplant"]


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
