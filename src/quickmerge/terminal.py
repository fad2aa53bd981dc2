"""Showing texts of others in a terminal: letter by letter, whatever they hold."""

from __future__ import annotations

from typing import Any, TextIO

from rich.console import Console
from rich.progress import Task, TextColumn
from rich.status import Status
from rich.text import Text

from quickmerge.errors import clean

__all__ = ["PlainColumn", "Terminal", "plain", "say"]


def plain(text: object, style: str = "") -> Text:
    """A text that any console of rich prints letter by letter, cleaned of control characters."""
    return Text(clean(text), style=style)


class Terminal(Console):
    """rich's console, for which a text is a text: ``[red]`` and ``:smile:`` are printed as they are.

    Every string that is printed, alone or in a table, is cleaned of control characters. What is to be set off is given
    as a `rich.text.Text`, or with ``style=``; a ``Text`` of others' words has to be cleaned by whoever makes it.

    Args:
        stderr: write there in place of stdout.
        file: write to this stream instead.
        soft_wrap: leave it to the terminal to break long lines.
    """

    def __init__(self, *, stderr: bool = False, file: TextIO | None = None, soft_wrap: bool = False) -> None:
        super().__init__(stderr=stderr, file=file, soft_wrap=soft_wrap, markup=False, emoji=False)

    def render_str(self, text: str, **settings: Any) -> Text:
        """A string as rich prints it, cleaned and never parsed."""
        return super().render_str(clean(text), **{**settings, "markup": False, "emoji": False})

    def status(self, status: Any, **settings: Any) -> Status:
        """A spinner beside a sentence."""
        return super().status(plain(status) if isinstance(status, str) else status, **settings)


class PlainColumn(TextColumn):
    """A column of a progress bar with text that is never parsed; ``what`` names it, such as ``task.description``."""

    def __init__(self, what: str = "task.description") -> None:
        super().__init__(f"{{{what}}}", markup=False)

    def render(self, task: Task) -> Text:
        """The text of a task, cleaned."""
        return Text(clean(self.text_format.format(task=task)), style=self.style, justify=self.justify)


def say(sentence: str) -> None:
    """Print a sentence on stderr letter by letter, below the bar if there is one."""
    Terminal(stderr=True, soft_wrap=True).print(sentence, markup=False, highlight=False)
