"""Where quickmerge keeps what it downloads and converts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quickmerge.errors import CacheFolderError

__all__ = ["cache_folder", "replacing_folder", "writable"]

ADVICE = "set QUICKMERGE_CACHE to a folder that you can write"


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """Name the cache folder, without creating it.

    Args:
        given: a folder that overrides the environment.

    Returns:
        `given`, else `$QUICKMERGE_CACHE`, else `$XDG_CACHE_HOME/quickmerge`, else `~/.cache/quickmerge`.
    """
    if given is not None:
        return Path(given).expanduser().absolute()
    if own := os.environ.get("QUICKMERGE_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "quickmerge"
    return Path("~/.cache/quickmerge").expanduser().absolute()


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
        for left_over in parent.glob(f".{target.name}.*.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=parent))
        try:
            yield work
            if not target.exists():
                work.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
                os.rename(work, target)
        except OSError as error:
            raise CacheFolderError(f"cannot write into {parent} ({error.strerror or error}): {ADVICE}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
