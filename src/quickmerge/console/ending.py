"""Whose fault an error is: that of what was given, of a stranger's model, or ours."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from quickmerge.errors import (
    QuickmergeError,
    QuickmergeWarning,
    UnsupportedModelError,
    clean,
    clean_name,
    first_sentence,
)

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Alone", "Ending", "end", "one_sentence"]


class Alone:
    """What a model does by itself, without anything of ours: run after an error, to see whether it can be run at all.

    Args:
        model: of transformers.
        run: runs it the way the command does.
    """

    def __init__(self, model: Any, run: Callable[[], object]) -> None:
        self.name = str(getattr(model, "name_or_path", "") or type(model).__name__)
        self.run = run

    @classmethod
    def writing(cls, model: Any, tokenizer: Any) -> Alone:
        """A language model: its tokenizer splits a text, it reads that, and writes with its own settings."""

        def run() -> None:
            import torch

            from quickmerge.models.chat import document_chat

            text, _ = document_chat(tokenizer, "", "The sea is calm. 1 2 3")
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"] or [0]], device=model.device)
            with torch.inference_mode():
                model(input_ids=ids)
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
            tokenizer.decode(out[0], skip_special_tokens=True)

        return cls(model, run)

    @classmethod
    def backbone(cls, model: Any) -> Alone:
        """A CALM, which is ours but for the model of transformers that reads the chunks: that reads two."""

        def run() -> None:
            import torch

            width = model.config.backbone.hidden_size
            with torch.inference_mode():
                model.backbone(inputs_embeds=torch.zeros(1, 2, width, device=model.device), use_cache=True)

        return cls(model, run)

    @classmethod
    def seeing(cls, model: Any, processor: Any, image: Image.Image) -> Alone:
        """A vision model: its processor prepares an image, and it looks at that."""

        def run() -> None:
            import torch

            with torch.inference_mode():
                model(**processor([image], return_tensors="pt"))

        return cls(model, run)

    @classmethod
    def asked(cls, model: Any, processor: Any, image: Image.Image) -> Alone:
        """A vision-language model: it is asked about an image, and answers with its own settings."""

        def run() -> None:
            import torch

            from quickmerge.models import ask_inputs

            with torch.inference_mode():
                model.generate(**ask_inputs(processor, [image], "What is this?").to(model.device), max_new_tokens=2)

        return cls(model, run)


@contextmanager
def one_sentence(alone: Alone | None = None) -> Iterator[None]:
    """Turn an error about settings, or about a stranger's model, into one that is told in one sentence.

    A ValueError of ours is about settings. Whatever else is raised while a model runs is the model's fault if it can't
    be run without anything of ours either, and ours if it can: then it passes as it is.
    """
    try:
        yield
    except (QuickmergeError, OSError, MemoryError):
        raise
    except Exception as error:
        if alone is not None and not _refused(error):
            try:
                alone.run()
            except Exception as own:
                raise UnsupportedModelError(f"the model {alone.name} can't be run ({first_sentence(own)})") from own
        if isinstance(error, ValueError):
            raise QuickmergeError(str(error)) from error
        raise


def _refused(error: Exception) -> bool:
    """Whether our own code refused a value, as it does with a ValueError; one that passed through us is not ours."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    home = Path(__file__).resolve().parents[1]
    inside = last is not None and home in Path(last.tb_frame.f_code.co_filename).resolve().parents
    return inside and isinstance(error, ValueError)


# How a command ends: as right work, or with one sentence on stderr; a fault of ours shows where it lies.


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
