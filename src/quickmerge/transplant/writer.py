"""Writing the new model folder: weights streamed file by file, restartable, and in place whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError
from quickmerge.files import follow, write_folder, write_json
from quickmerge.locks import sole_writer
from quickmerge.together import write_together
from quickmerge.transplant.checkpoint import INDEX, Checkpoint, Piece, copy_piece, file_sha256, write_safetensors

__all__ = ["MANIFEST", "SIDE", "check_out", "write_model"]

MANIFEST = "transplant.json"
SIDE = "transplant"
"""The folder of side files. Some programs read every safetensors file that lies beside the weights: not these."""
JOURNAL = "progress.json"
LOCK = "lock"
STALE = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|transplant/.*|additional_chat_templates/.*"
    r"|(tokenizer|tokenizer_config|added_tokens|special_tokens_map|vocab|generation_config)\.json|merges\.txt"
    r"|chat_template\.jinja|tokenizer\.model"
)
"""What an earlier transplant may have had that the new one has not, and that would be read with it."""
RESERVE = 2**20
"""Bytes that the small files may take, for the check of what is free."""


def check_out(out: Path, *others: Path) -> None:
    """Before long work: see that ``out`` can be written and that nothing of the user's would go.

    Raises:
        QuickmergeError: it is one of the folders that are read, holds something else, or can't be made.
    """
    if any(out.resolve() == other.resolve() for other in others):
        raise QuickmergeError(f"out must be another folder than those that are read, got {out}")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise QuickmergeError(
            f"out must be a new folder, or one that a transplant wrote, got {out}, which holds others"
        )
    if out.exists() and not out.is_dir():
        raise QuickmergeError(f"out must be a folder, got the file {out}")
    with _told(out, None):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        probe = _work(out)
        _check_work(probe)
        existed = probe.is_dir()
        probe.mkdir(exist_ok=True)
        if not existed:
            probe.rmdir()


def write_model(
    out: Path,
    checkpoint: Checkpoint,
    replaced: Mapping[str, Piece],
    finish: Callable[[Path, dict[str, dict[str, Any]]], None],
    *,
    side: Mapping[str, tuple[Piece, ...]] | None = None,
    total: Callable[[int], None] | None = None,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write the weights of the base with some tensors replaced, then the small files, then put the folder in place.

    Finished files stay in a hidden folder beside ``out`` when a run is cut short, and the next one takes those whose
    hash is right and that come from the same base and the same rows. Nothing is held but a part of a tensor.

    Args:
        out: the folder.
        checkpoint: the base's weights.
        replaced: by name, what takes the place of a tensor.
        finish: writes everything else into the folder that it is given, knowing size and hash of the weights' files.
        side: further safetensors files, by name, for the folder of side files.
        total: told how many bytes will be written.
        advance: told how many bytes were written, after each part.

    Raises:
        QuickmergeError: the disk is full or not writable, or another run writes here. Nothing is at ``out`` then but
            what was there before.
    """
    files: dict[str, list[Piece]] = {
        name: [replaced.get(entry.name, copy_piece(entry)) for entry in entries]
        for name, entries in checkpoint.files.items()
    }
    files |= {f"{SIDE}/{name}": list(pieces) for name, pieces in (side or {}).items()}
    sizes = {name: sum(piece.size for piece in pieces) for name, pieces in files.items()}
    work = _work(out)
    _check_work(work)
    with _told(out, work):
        work.mkdir(parents=True, exist_ok=True)
        with sole_writer(out, work / LOCK, keep=True):  # what a later run goes on from is known by it
            done = _resume(work, _fingerprint(checkpoint, replaced))
            todo = {name: pieces for name, pieces in files.items() if name not in done["files"]}
            if total is not None:
                total(sum(sizes[name] for name in todo))
            _check_room(out, sum(sizes[name] for name in todo))
            for name, pieces in todo.items():
                path = work / name
                path.parent.mkdir(exist_ok=True)
                digest = write_safetensors(path, pieces, advance)
                done["files"][name] = {"bytes": path.stat().st_size, "sha256": digest}
                write_json(work / JOURNAL, done)
            if checkpoint.sharded:
                _write_index(work, checkpoint, files)
            finish(work, {name: done["files"][name] for name in files})
            if out.is_dir() and any(out.iterdir()):
                write_together(out, lambda folder: _move(work, folder), STALE)  # the user may have put files there
            else:
                write_folder(out, lambda folder: _move(work, folder))
            shutil.rmtree(work, ignore_errors=True)


def _work(out: Path) -> Path:
    out = follow(out)  # beside what a link leads to, which may be on another disk
    return out.parent / f".{out.name}.transplant"


def _check_work(work: Path) -> None:
    """Leave alone what has the name of our work by chance: ours holds a lock from its first moment."""
    if work.exists() and (not work.is_dir() or (any(work.iterdir()) and not (work / LOCK).exists())):
        raise QuickmergeError(f"{work} is in the way, and is no unfinished transplant: move it")


def _fingerprint(checkpoint: Checkpoint, replaced: Mapping[str, Piece]) -> str:
    """What the finished files of an earlier run must come from to be of use: these very files, these very rows."""
    digest = hashlib.sha256()
    for name in checkpoint.files:
        stat = (checkpoint.folder / name).stat()
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    for name, piece in sorted(replaced.items()):
        digest.update(f"{name} {piece.dtype} {piece.shape}\n".encode())
        for part in piece.chunks():
            digest.update(part)
    return digest.hexdigest()


def _resume(work: Path, fingerprint: str) -> dict[str, Any]:
    """The journal of an earlier run, without the files that are not whole; everything else in the folder goes."""
    try:
        done = json.loads((work / JOURNAL).read_text(encoding="utf-8"))
        listed = dict(done["files"]) if done["fingerprint"] == fingerprint else {}
    except (OSError, ValueError, KeyError, TypeError):
        listed = {}
    whole = {
        name: entry for name, entry in listed.items()
        if (work / name).is_file() and file_sha256(work / name) == entry["sha256"]
    }  # fmt: skip
    for path in sorted(work.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.name != LOCK and path.relative_to(work).as_posix() not in whole:
            path.unlink()
    return {"fingerprint": fingerprint, "files": whole}


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed + RESERVE:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} free")


def _write_index(work: Path, checkpoint: Checkpoint, files: Mapping[str, list[Piece]]) -> None:
    old = json.loads((checkpoint.folder / INDEX).read_text(encoding="utf-8"))
    weights = {name: pieces for name, pieces in files.items() if name in checkpoint.files}
    meta = dict(old.get("metadata") or {})
    meta.pop("total_parameters", None)  # it can't be told for packed dtypes
    meta["total_size"] = sum(piece.size for pieces in weights.values() for piece in pieces)
    write_json(work / INDEX, {"metadata": meta, "weight_map": old["weight_map"]})


def _move(work: Path, folder: Path) -> None:
    for path in sorted(work.iterdir()):
        if path.name not in (JOURNAL, LOCK):
            os.replace(path, folder / path.name)


@contextmanager
def _told(out: Path, work: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = ""
        if work is not None and (work / JOURNAL).is_file():
            kept = f"; finished files are kept in {work} for the next run"
        elif work is not None:
            shutil.rmtree(work, ignore_errors=True)
        raise QuickmergeError(f"{out} can't be written ({error.strerror or error}){kept}") from error
