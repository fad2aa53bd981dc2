"""How a command ends: as right work, or with one sentence on stderr; a fault of ours shows where it lies."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from quickmerge.errors import QuickmergeError, QuickmergeWarning, first_sentence
from quickmerge.printable import clean, clean_name

__all__ = ["Ending", "end"]

WRONG, FAULT, INTERRUPTED = 2, 1, 130
REPORT = (
    "quickmerge: this is a fault of quickmerge itself: please report it, with the lines above and what "
    "quickmerge --version says"
)
PIPES = (errno.EPIPE, errno.EINVAL) if os.name == "nt" else (errno.EPIPE,)


class Ending:
    """What the options before the command say of its end."""

    debug = False


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    """What libraries warn each other's programmers of is not for who reads answers; what we warn of is."""
    if issubclass(category, QuickmergeWarning):
        print(f"quickmerge: {clean_name(message)}", file=sys.stderr)
    elif _debugs():
        print(clean_name(f"{filename}:{lineno}: {category.__name__}: {message}"), file=sys.stderr)


def end(command: Callable[[], object]) -> NoReturn:
    """Run a command and leave the process with its code.

    0 is right work, 2 one sentence on stderr about what was given or about the machine, 130 an interruption, and 1 a
    fault of ours, or that nobody reads the output any more.
    """
    Ending.debug = False
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what an old terminal has no letter for is no reason to break off
            stream.reconfigure(errors="backslashreplace")
    before = warnings.showwarning, logging.lastResort
    warnings.showwarning = _warned
    if not _debugs():
        logging.lastResort = logging.NullHandler()
    try:
        code = _code(command)
    finally:
        warnings.showwarning, logging.lastResort = before
    sys.exit(code)


def _code(command: Callable[[], object]) -> int:
    try:
        done = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAULT if stop.code else 0
    except BrokenPipeError:
        return _unread()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in PIPES:
            return _unread()
        return _told(error)
    return done if isinstance(done, int) else 0


def _told(error: Exception) -> int:
    sentence = _sentence(error)
    if sentence is None or _debugs():
        trace = "".join(traceback.format_exception(error))
        print(clean(trace), end="", file=sys.stderr)
    if sentence is None:
        print(REPORT, file=sys.stderr)
        return FAULT
    if sentence:
        print(f"quickmerge: {sentence}", file=sys.stderr)
    return WRONG


def _debugs() -> bool:
    return Ending.debug or os.environ.get("QUICKMERGE_DEBUG", "0") not in ("", "0")


def _sentence(error: Exception) -> str | None:
    """What to say of an error that is not ours, None where it is ours, "" where all is said already."""
    if isinstance(error, QuickmergeError):
        return clean_name(error)
    if hasattr(error, "format_message"):  # the command line could not be understood
        said = clean_name(error.format_message())
        context = getattr(error, "ctx", None)
        see = f" (see {context.command_path} --help)" if context is not None else ""
        return said.rstrip(".") + see if said else ""
    if type(error).__name__ == "Abort":  # typer's, where somebody was asked
        return "standard input ended before a question was answered"
    if isinstance(error, OSError):  # a disk, a permission, a name that is too long
        what = getattr(error, "filename", None)
        reason = error.strerror or first_sentence(error)
        return clean_name(reason if what is None else f"{_short(os.fsdecode(what))}: {reason}")
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return f"the memory of this machine does not suffice ({first_sentence(error)})"
    return None


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}... ({len(name)} characters)"


def _out_of_memory(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _unread() -> int:
    """Nobody reads the output any more, as behind ``| head``: say nothing, not even when Python flushes at its end."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # a stream that is no file, in a test
        pass
    return FAULT
