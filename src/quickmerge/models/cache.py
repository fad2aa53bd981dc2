"""Where quickmerge keeps what it downloads and converts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quickmerge.errors import CacheFolderError
from quickmerge.staging import new_stage, stages, sync_all

__all__ = ["cache_folder", "replacing_folder", "writable"]

ADVICE = "set QUICKMERGE_CACHE to a folder that you can write"


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """Name the cache folder, without creating it.

    Args:
        given: a folder that overrides the environment.

    Returns:
        `given`, else `$QUICKMERGE_CACHE`, else `$XDG_CACHE_HOME/quickmerge`, else `~/.cache/quickmerge`.

    Raises:
        CacheFolderError: it lies in the home of a user that this machine doesn't know.
    """
    if given is not None:
        return _absolute(given)
    if own := os.environ.get("QUICKMERGE_CACHE"):
        return _absolute(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return _absolute(shared) / "quickmerge"
    return _absolute("~/.cache/quickmerge")


def _absolute(folder: str | os.PathLike[str]) -> Path:
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError as error:  # no such user, or one without a home
        raise CacheFolderError(f"there is no cache folder {os.fspath(folder)!r} ({error}): {ADVICE}") from None


def writable(folder: Path) -> Path:
    """Create `folder` if need be, and prove that a file can be written in it.

    Raises:
        CacheFolderError: the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CacheFolderError(f"cannot write the cache folder {folder} ({error.strerror}): {ADVICE}") from error
    return folder


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Fill a folder that appears as `target` whole, or not at all.

    One process at a time gets past the entrance. Whoever comes second must look again whether `target` is there
    by then; leaving the block with `target` present keeps the one that is there.

    Yields:
        An empty folder beside `target`. It is renamed to `target` when the block ends well, removed otherwise.

    Raises:
        CacheFolderError: the parent folder cannot be written, or fills up.
    """
    from filelock import FileLock

    parent = writable(target.parent)
    # The lock is the kernel's: it ends with the process that holds it, so a killed run blocks nobody.
    with FileLock(parent / f".{target.name}.lock"):
        for left_over in stages(parent, target.name):
            left_over.remove()
        try:
            stage = new_stage(parent, target.name)
            try:
                yield stage.new
                if not target.exists():
                    sync_all(stage)  # with the modes of the umask, since a cache may be shared
                    os.rename(stage.new, target)
            finally:
                stage.remove()
        except OSError as error:
            raise CacheFolderError(f"cannot write into {parent} ({error.strerror or error}): {ADVICE}") from error
