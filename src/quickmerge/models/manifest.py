"""A model folder in the cache: made once, with a manifest that says what each file must be."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quickmerge.errors import DamagedWeightsError
from quickmerge.models.cache import replacing_folder
from quickmerge.models.paths import read_json
from quickmerge.models.wheel import sha256_of

__all__ = ["MANIFEST", "build_once", "check_folder", "folder_name", "write_manifest"]

MANIFEST = "manifest.json"


def folder_name(name: str, weights_sha256: str, recipe: str) -> str:
    """What the folder of a converted model is called; it changes with the weights and with the conversion."""
    return f"{name}-{hashlib.sha256(f'{weights_sha256} {recipe}'.encode()).hexdigest()[:10]}"


def build_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Give `folder`, letting `fill` make it if it is not there yet, and see that it is whole.

    Args:
        folder: where it lies.
        fill: writes everything, the manifest too, into the empty folder that it is given.

    Raises:
        CacheFolderError: the cache cannot be written.
        DamagedWeightsError: what lies there is not what was written.
    """
    if not folder.exists():
        with replacing_folder(folder) as work:
            if not folder.exists():  # another process may have made it while we waited to get in
                fill(work)
    check_folder(folder)
    return folder


def check_folder(folder: Path, *, full: bool = False) -> None:
    """See that every file is the one that was written.

    Args:
        folder: what `build_once` returned.
        full: hash every file; otherwise only those whose time stamp has changed since they were written.

    Raises:
        DamagedWeightsError: a file is missing, or differs from what was written.
    """
    remedy = f"delete the folder {folder} and run again to rebuild it"
    try:
        listed = read_json(folder / MANIFEST)["files"]
        files = [(name, entry["bytes"], entry["mtime_ns"], entry["sha256"]) for name, entry in listed.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedWeightsError(f"{folder / MANIFEST} is missing or unreadable: {remedy}") from error
    for name, size, written_at, digest in files:
        path = folder / name
        if not path.is_file():
            raise DamagedWeightsError(f"{path} is missing: {remedy}")
        stat = path.stat()
        if stat.st_size != size:
            raise DamagedWeightsError(f"{path} is damaged ({stat.st_size} bytes instead of {size}): {remedy}")
        # Hashing half a gigabyte at every start would cost a second: a file that nobody touched is taken at its word.
        untouched = stat.st_mtime_ns == written_at
        if (full or not untouched) and sha256_of(path) != digest:
            raise DamagedWeightsError(f"{path} is damaged (its sha256 is not the one that was written): {remedy}")


def write_manifest(work: Path, facts: dict[str, Any], packages: Sequence[str]) -> None:
    """Write the manifest of a finished folder.

    Args:
        work: the folder.
        facts: what the model is and where it comes from.
        packages: those whose versions the conversion depends on.
    """
    files = {}
    for path in sorted(work.iterdir()):
        stat = path.stat()
        files[path.name] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(path)}
    versions = {name: importlib.metadata.version(name) for name in packages}
    (work / MANIFEST).write_text(json.dumps({**facts, "versions": versions, "files": files}, indent=2) + "\n")
