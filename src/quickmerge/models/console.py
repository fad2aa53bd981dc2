"""One quiet voice: our own status line on stderr, and nobody else's."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from quickmerge.models.compat import library_logging

__all__ = ["saying", "transformers_silenced"]


@contextmanager
def saying(message: str, *, progress: bool, only_on_terminal: bool = False) -> Iterator[None]:
    """Show `message` with a spinner while the block runs, or as one plain line where there is no terminal.

    Args:
        message: what goes on.
        progress: False says nothing at all.
        only_on_terminal: leave out the plain line, for what takes a second or two.
    """
    if not progress:
        yield
        return
    from quickmerge.terminal import Terminal

    # this very stream, and not whatever sys.stderr is later: `transformers_silenced` replaces that one
    console = Terminal(file=sys.stderr)
    if not console.is_terminal:
        if not only_on_terminal:
            console.print(message, highlight=False, soft_wrap=True)
        yield
        return
    with console.status(message):
        yield


@contextmanager
def transformers_silenced() -> Iterator[None]:
    """Keep the bars and warnings of transformers off the screen; the caller reports what matters itself."""
    logging = library_logging()
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # some of its bars ask no setting
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
