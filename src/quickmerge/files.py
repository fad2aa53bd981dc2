"""Reading text; and files and folders that appear whole or not at all, also when the disk fills up.

Everything that the package writes for its user goes through here. What is there already and is no regular file - a
device, a pipe, a named pipe - is written through and never replaced. Links are followed. Modes are what the umask asks
for; a file that is replaced keeps its own.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import re
import stat
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml  # type: ignore[import-untyped]
from safetensors import SafetensorError

from quickmerge.errors import QuickmergeError, door
from quickmerge.staging import Stage, new_part, new_stage, stages, sweep, sync, sync_all

__all__ = [
    "check_output",
    "follow",
    "read_settings",
    "read_text",
    "settle",
    "told",
    "write_bytes",
    "write_folder",
    "write_json",
]

PATIENCE = 5.0
"""Seconds that a reader of a named pipe is waited for."""
LINKS = 40
"""More links than that are a circle."""


MOST_TEXT = 2**28
"""Bytes of a text that a model is to read as a whole: no model has room for more."""


def read_text(path: Path, *, first: int | None = None, most: int | None = None) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    A pipe is read where it was handed over open, as ``/dev/stdin`` or ``<(command)``. Other pipes and devices may have
    no end, or no beginning, and are refused.

    Args:
        path: the file; ``-`` is standard input.
        first: read so many bytes from its start and no more; a character that they cut is left out.
        most: refuse a file of more bytes.

    Raises:
        QuickmergeError: the file can't be read, is empty, is too large or is not UTF-8 text.
    """
    path = Path("/dev/stdin") if str(path) == "-" else path
    wanted = first if most is None else most + 1
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and _descriptor(path) is None:
            raise QuickmergeError(f"{path} must be a regular file, got {_kind(mode)}")
        with path.open("rb") as file:
            data = file.read(-1 if wanted is None else wanted)
    except IsADirectoryError:
        raise QuickmergeError(f"{path} must be a text file, got a folder") from None
    except OSError as error:
        raise QuickmergeError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, QuickmergeError):
            raise
        raise QuickmergeError(f"{str(path)!r} can't be read: it is no name of a file ({error})") from None
    if most is not None and len(data) > most:
        raise QuickmergeError(f"{path} must have at most {most // 2**20} MiB to be read as a whole, it has more")
    if not data.strip():
        raise QuickmergeError(f"{path} must hold some text, got an empty file")
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=first is None or len(data) < first)
    except UnicodeDecodeError as error:
        raise QuickmergeError(f"{path} must be UTF-8 text, got other bytes at offset {error.start}") from None
    if not text.strip("\ufeff \t\r\n"):
        raise QuickmergeError(f"{path} must hold some text, got nothing but a byte order mark")
    if "\0" in text:
        raise QuickmergeError(f"{path} must be text, got binary data (a zero byte at offset {text.index(chr(0))})")
    return text


MOST_SETTINGS = 2**20
"""Bytes of a file with settings: what is longer is something else."""


class _Yaml(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.2's words alone: ``no`` and ``off`` are words, and ``12:30`` is no number of base 60."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _kind_of, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_kind_of}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Yaml.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))  # 010 is ten

SETTINGS: dict[str, Callable[[str], Any]] = {
    ".yaml": lambda text: yaml.load(text, _Yaml),
    ".yml": lambda text: yaml.load(text, _Yaml),
    ".toml": tomllib.loads,
    ".json": json.loads,
}
"""What reads settings, by the ending of a file."""


def read_settings(path: Path) -> dict[str, Any]:
    """Settings by name, from a YAML, TOML or JSON file.

    Raises:
        QuickmergeError: the file has another ending, can't be read or understood, or holds something else.
    """
    read = SETTINGS.get(path.suffix.lower())
    if read is None:
        raise QuickmergeError(f"{path} must be a .yaml, .toml or .json file")
    text = read_text(path, most=MOST_SETTINGS)
    with door(f"{path} can't be understood"):
        given = read(text)
    if not isinstance(given, dict):
        raise QuickmergeError(f"{path} must hold settings by name, got a {type(given).__name__}")
    for name in given:
        if not isinstance(name, str):
            raise QuickmergeError(
                f"{path} must hold settings by name, got the name {str(name)[:50]!r}, which is no text"
            )
    return given


def check_output(*paths: Path | None) -> None:
    """Before long work: make sure that every file that will be written can be; None is passed over.

    Raises:
        QuickmergeError: naming the first path that can't.
    """
    for path in paths:
        if path is None:
            continue
        with told(path, kept=False):
            descriptor = _descriptor(path)
            if descriptor is not None:
                os.fstat(descriptor)
                continue
            target = follow(path)
            if _writable(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                part, handle = new_part(target.parent)
                os.close(handle)
                part.unlink()


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder that appears as `target` whole or not at all, in the place of one that may be there already.

    Only one process may write a target at a time. A kill at any moment leaves the old folder or the new one; the
    next `write_folder` or `settle` removes what else is left. Where `target` is a link, the folder that it leads to is
    written.

    Args:
        target: where the folder shall be; parents are made.
        fill: writes the files into the empty folder that it is given.

    Raises:
        QuickmergeError: the disk is full or not writable, or `target` is no folder. What was there before still is.
    """
    with told(target):
        target = follow(target)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        settle(target.parent, target.name)
        stage = new_stage(target.parent, target.name)
        with stage.held():
            try:
                fill(stage.new)
                sync_all(stage)
                _swap_in(stage, target)
            finally:
                stage.remove()
        sync(target.parent)


def settle(parent: Path, name: str | None = None) -> None:
    """Tidy up after killed writes: bring back an old folder that was moved away, remove what is unfinished.

    Only what a write of this package has made and marked is touched, and nothing that a running one holds.

    Args:
        parent: the folder of the targets; it need not exist.
        name: the target's name; None means all.
    """
    for stage in stages(parent, name):
        with stage.held() as ours:
            if not ours:
                continue
            target = parent / stage.name
            if stage.old.exists() and not target.exists():
                os.rename(stage.old, target)
            stage.remove()
    if name is None:
        sweep(parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; what is no regular file is written through.

    Raises:
        QuickmergeError: the disk is full or not writable. What was at `path` before is still there.
    """
    with told(path):
        descriptor = _descriptor(path)
        if descriptor is not None:
            _write_open(descriptor, data)
            return
        target = follow(path)
        if not _writable(target):
            _write_through(target, data)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        part, handle = new_part(target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                _take_over(target, file.fileno())
                os.fsync(file.fileno())
                os.replace(part, target)  # the lock is held until it has its name
        finally:
            part.unlink(missing_ok=True)
        sync(target.parent)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, whole or not at all.

    Raises:
        QuickmergeError: as `write_bytes`.
    """
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # half of a surrogate pair is no UTF-8; as a backslash and its number JSON has it all the same
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def follow(path: Path) -> Path:
    """Where a path leads once every link in it is followed; nothing need be there.

    Raises:
        OSError: the links go round in a circle, or a file is where there must be a folder.
    """
    with contextlib.suppress(FileNotFoundError):
        os.stat(path)
    return Path(os.path.realpath(path))


@contextmanager
def told(path: Path, *, kept: bool = True) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into one sentence.

    Args:
        path: what is named.
        kept: whether to add that what was there before is kept.
    """
    with contextlib.suppress(OSError):
        try:
            os.stat(path)
        except ValueError as error:  # a zero byte, or half of a surrogate pair
            raise QuickmergeError(f"{str(path)!r} can't be written: it is no name of a file ({error})") from None
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk with its own error
        reason = getattr(error, "strerror", None) or error
        if not kept:
            raise QuickmergeError(f"{path} can't be written: {reason}") from error
        raise QuickmergeError(f"{path} can't be written ({reason}); what was there before is kept") from error


def _swap_in(stage: Stage, target: Path) -> None:
    if not target.exists():
        os.rename(stage.new, target)
        return
    # A folder can't be renamed over a full one. Between these two renames `settle` knows the way back.
    os.rename(target, stage.old)
    try:
        os.rename(stage.new, target)
    except BaseException:
        os.rename(stage.old, target)
        raise


def _writable(target: Path) -> bool:
    """Whether ``target`` is a regular file, or nothing yet; False for what must be written through.

    Raises:
        OSError: it is a folder, or may not be written.
    """
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return True
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return stat.S_ISREG(mode)


def _take_over(target: Path, handle: int) -> None:
    """Give an open file the mode and the owner of the regular file that it is about to replace."""
    try:
        old = target.stat()
    except FileNotFoundError:
        return
    if os.name != "nt":
        new = os.fstat(handle)
        if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
            with contextlib.suppress(OSError):  # only root gives files away
                os.fchown(handle, old.st_uid, old.st_gid)
        os.fchmod(handle, stat.S_IMODE(old.st_mode))


def _write_through(target: Path, data: bytes) -> None:
    if not stat.S_ISFIFO(target.stat().st_mode):
        handle = os.open(target, os.O_WRONLY)
    else:
        handle = _open_pipe(target)
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def _open_pipe(target: Path) -> int:
    # Opened in the ordinary way, a named pipe that nobody reads would be waited for without end.
    end = time.monotonic() + PATIENCE
    while True:
        try:
            handle = os.open(target, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > end:
                raise OSError(errno.ENXIO, "it is a named pipe that nobody reads") from None
            time.sleep(0.02)
        else:
            os.set_blocking(handle, True)
            return handle


def _write_open(descriptor: int, data: bytes) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()  # what was printed comes first
    # Opened anew by its path, a file that stdout was led into would be written from its beginning.
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(data)


def _descriptor(path: Path) -> int | None:
    """The number of our own open file that a path such as /dev/stdout or /dev/fd/63 stands for, None for others."""
    try:
        for _ in range(LINKS):
            text = os.path.abspath(path)
            match = re.fullmatch(r"/(?:dev/fd|proc/(self|thread-self|\d+)/fd)/(\d{1,9})", text)
            if match is not None and (match[1] or "self") in ("self", "thread-self", str(os.getpid())):
                return int(match[2])
            path = Path(text).parent / os.readlink(text)
    except (OSError, ValueError):
        pass
    return None


def _kind(mode: int) -> str:
    kinds = {"a named pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK, "a folder": stat.S_ISDIR}
    return next((name for name, test in kinds.items() if test(mode)), "a device")
