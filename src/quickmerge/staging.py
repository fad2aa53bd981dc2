"""Work in progress beside what is being written, made so that nothing of the user's can be taken for it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PART", "Stage", "hold", "new_part", "new_stage", "stages", "sweep", "sync", "sync_all"]

STAGE = "quickmerge"
"""Ending of a stage's name: ``.<name>.<32 hexadecimal digits>.quickmerge``."""
PART = "quickmerge-part"
"""Ending of the name of a single file that is being written: ``.<32 hexadecimal digits>.quickmerge-part``."""
_NUMBER = "[0-9a-f]{32}"


@dataclass(frozen=True)
class Stage:
    """A hidden folder for one write, known by a file in it that repeats the number in its name.

    Whoever writes holds a lock on that file, which the kernel releases when the process ends, however it ends. So a
    stage that is held is in use, and one that is not was left by a kill.

    Attributes:
        folder: the stage itself.
        name: what is being written.
        mark: the file that tells that it is ours.
    """

    folder: Path
    name: str
    mark: Path

    @property
    def new(self) -> Path:
        """The folder that is being filled."""
        return self.folder / "new"

    @property
    def old(self) -> Path:
        """Where what was there before is put aside."""
        return self.folder / "old"

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Hold the stage's lock within the block; False if somebody else does, or the stage is gone."""
        try:
            handle = os.open(self.mark, os.O_RDWR)
        except OSError:
            yield False
            return
        try:
            yield hold(handle)
        finally:
            os.close(handle)

    def remove(self) -> None:
        """Delete it. What was put aside loses its name first: half of it must never be brought back."""
        gone = self.folder / "gone"
        with contextlib.suppress(OSError):
            os.rename(self.old, gone)
        with contextlib.suppress(OSError):
            # the mark goes last, so that a stage is known for what it is to the end
            for name in sorted(os.listdir(self.folder), key=lambda name: name == self.mark.name):
                path = self.folder / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            self.folder.rmdir()


def new_stage(parent: Path, name: str, ending: str = STAGE) -> Stage:
    """Make an empty stage in ``parent``; its folders and files have the modes that the umask asks for."""
    number = secrets.token_hex(16)
    stage = _stage(parent / f".{name}.{number}.{ending}", name, number)
    stage.folder.mkdir()
    os.close(os.open(stage.mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    stage.new.mkdir()
    return stage


def stages(parent: Path, name: str | None = None, ending: str = STAGE) -> list[Stage]:
    """The stages in ``parent``, of one name or of all, whether in use or left over; sorted by name."""
    form = re.compile(rf"\.(?P<name>.+)\.(?P<number>{_NUMBER})\.{re.escape(ending)}", re.DOTALL)
    found = []
    try:
        entries = sorted(os.listdir(parent))
    except OSError:
        return []
    for entry in entries:
        match = form.fullmatch(entry)
        if match is None or (name is not None and match["name"] != name):
            continue
        stage = _stage(parent / entry, match["name"], match["number"])
        if _is(stage.folder, stat.S_ISDIR) and _is(stage.mark, stat.S_ISREG):
            found.append(stage)
        elif _is(stage.folder, stat.S_ISDIR):
            with contextlib.suppress(OSError):
                stage.folder.rmdir()  # killed before its mark was made: only an empty folder goes
    return found


def _stage(folder: Path, name: str, number: str) -> Stage:
    return Stage(folder, name, folder / f"quickmerge-{number}")


def _is(path: Path, kind: object) -> bool:
    try:
        return bool(kind(os.lstat(path).st_mode))  # type: ignore[operator]
    except OSError:
        return False


def new_part(parent: Path) -> tuple[Path, int]:
    """Make an empty file for a single write, with the mode that the umask asks for; its path and its held handle."""
    path = parent / f".{secrets.token_hex(16)}.{PART}"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    hold(handle)
    return path, handle


def sweep(parent: Path) -> None:
    """Remove the single files in ``parent`` that killed writes have left."""
    form = re.compile(rf"\.{_NUMBER}\.{PART}")
    with contextlib.suppress(OSError):
        for entry in os.listdir(parent):
            path = parent / entry
            if not form.fullmatch(entry) or not _is(path, stat.S_ISREG):
                continue
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_WRONLY)
                try:
                    if hold(handle):
                        path.unlink()
                finally:
                    os.close(handle)


def hold(handle: int) -> bool:
    """Lock an open file until it is closed or the process ends; False if somebody else has it locked.

    True, too, where there are no locks: on Windows, which deletes no open files anyway, and on a few network disks.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def sync_all(stage: Stage) -> None:
    """Bring what is in the stage's new folder to the disk, with the modes that the umask asks for."""
    # Libraries write weights for the owner alone, and temporary folders are private.
    file_mode = stat.S_IMODE(stage.mark.stat().st_mode)
    folder_mode = stat.S_IMODE(stage.folder.stat().st_mode)
    for path in [*stage.new.rglob("*"), stage.new]:
        if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
            continue  # it is somebody else's file, too, on the disk already, and its mode is not ours to change
        path.chmod(folder_mode if path.is_dir() else file_mode)
        sync(path)


def sync(path: Path) -> None:
    """Bring a file or the entries of a folder to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and keeps their entries itself
    handle = os.open(path, os.O_RDONLY if path.is_dir() or not os.access(path, os.W_OK) else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
