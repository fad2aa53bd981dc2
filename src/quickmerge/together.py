"""Files that belong together, replaced all at once among others of a folder: those of a trained part.

A file can be replaced at once, a set of them can't. So they are written aside, into a stage within the folder, and a
list of them is put down last. From then on the write counts as done: whoever comes next, to read or to write, moves
what a kill has left unmoved. Before it, nothing has been touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from quickmerge.errors import QuickmergeError
from quickmerge.files import follow, told, write_json
from quickmerge.staging import Stage, new_stage, stages, sweep, sync, sync_all

__all__ = ["complete", "write_together"]

ENDING, NAME, LIST = "quickmerge-files", "parts", "list.json"
PATIENCE = 10.0
"""Seconds that another process, which is moving files, is waited for."""


def write_together(folder: Path, fill: Callable[[Path], None], stale: re.Pattern[str] | None = None) -> None:
    """Write some files of a folder, all of them or none; other files stay. A kill leaves the old ones or the new ones.

    Args:
        folder: where they shall be; made if need be. Where it is a link, the folder that it leads to is written.
        fill: writes the files, in folders too, into the empty folder that it is given.
        stale: files of an earlier write that are none of the new ones, by their paths from the folder; they go.

    Raises:
        QuickmergeError: the disk is full or not writable, or another process is writing these files. What was there
            before still is.
    """
    with told(folder):
        folder = follow(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        stage = new_stage(folder, NAME, ENDING)
        with stage.held():
            try:
                if any(not _is_free(other) for other in stages(folder, NAME, ENDING) if other != stage):
                    raise QuickmergeError(f"{folder} is being written by another process")
                fill(stage.new)
                sync_all(stage)
                files = sorted(path.relative_to(stage.new).as_posix() for path in stage.new.rglob("*")
                               if path.is_file())  # fmt: skip
                old = [] if stale is None else _stale(folder, files, stale)
                for name in files:
                    _place(folder, name)  # before it counts: what can't be moved in must not be promised
                write_json(stage.folder / LIST, {"files": files, "stale": old})
            except BaseException:
                stage.remove()
                raise
            _move_in(stage, folder)
        sync(folder)


def complete(folder: Path) -> None:
    """Before the files of a folder are read: move in what a kill has left written but unmoved.

    Raises:
        QuickmergeError: it can't be moved, or another process is about it for long.
    """
    end = time.monotonic() + PATIENCE
    while pending := [stage for stage in stages(folder, NAME, ENDING) if (stage.folder / LIST).exists()]:
        for stage in pending:
            with stage.held() as ours, told(folder):
                if ours:
                    _move_in(stage, folder)
        if time.monotonic() > end:
            raise QuickmergeError(f"{folder} is being written by another process: try again once it is done")
        time.sleep(0.01)


def _settle(folder: Path) -> None:
    complete(folder)
    for stage in stages(folder, NAME, ENDING):
        with stage.held() as ours:
            if ours:
                stage.remove()
    sweep(folder)


def _is_free(stage: Stage) -> bool:
    with stage.held() as ours:
        return ours or not stage.mark.exists()


def _stale(folder: Path, files: list[str], stale: re.Pattern[str]) -> list[str]:
    places = {PurePosixPath(name).parent for name in files} | {PurePosixPath()}
    places |= {PurePosixPath(entry) for entry in os.listdir(folder) if (folder / entry).is_dir()}
    found = [place / entry for place in sorted(places) if (folder / place).is_dir()
             for entry in sorted(os.listdir(folder / place))]  # fmt: skip
    return [
        str(path)
        for path in found
        if stale.fullmatch(str(path)) and str(path) not in files and not (folder / path).is_dir()
    ]


def _move_in(stage: Stage, folder: Path) -> None:
    try:
        listed: Any = json.loads((stage.folder / LIST).read_bytes())
        files, stale = [str(name) for name in listed["files"]], [str(name) for name in listed["stale"]]
    except FileNotFoundError:
        return  # somebody else has done it
    except (ValueError, KeyError, TypeError):
        raise QuickmergeError(f"{stage.folder} is damaged: delete it") from None
    for name in stale:
        path = _place(folder, name)
        if not path.is_dir():
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                if path.parent != folder:
                    path.parent.rmdir()  # which an empty folder alone lets happen
    for name in files:
        source, path = stage.new / PurePosixPath(name), _place(folder, name)
        try:
            mode = source.lstat().st_mode
        except FileNotFoundError:
            continue  # moved before the kill
        if not stat.S_ISREG(mode):
            raise QuickmergeError(f"{source} must be a regular file: delete {stage.folder}")
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, path)
    for place in {_place(folder, name).parent for name in files}:
        with contextlib.suppress(OSError):
            sync(place)
    stage.remove()


def _place(folder: Path, name: str) -> Path:
    """Where a listed file goes, which is nowhere else than below the folder: the list may be a stranger's."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or any(part in ("", ".", "..") or "\\" in part for part in parts):
        raise QuickmergeError(f"{folder} holds an unfinished write with the odd file name {name!r}: delete it")
    path = folder.joinpath(*parts)
    real, inside = Path(os.path.realpath(path.parent)), Path(os.path.realpath(folder))
    if real != inside and inside not in real.parents:
        raise QuickmergeError(f"{path.parent} must lie in {folder}, but is a link to {real}")
    if path.is_dir() and not path.is_symlink():
        raise QuickmergeError(f"{path} must be a file, but is a folder: move it away")
    return path
