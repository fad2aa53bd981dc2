"""What a run shows on stderr while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Show", "say", "share_shown", "shown"]

Show = Callable[[int, float, float], None]
"""Called after a step with the steps done, the loss and the items per second."""


@contextmanager
def shown(done: int, steps: int, visible: bool) -> Iterator[Show]:
    """A progress bar of the steps, with the loss, the speed and the time left.

    Args:
        done: steps done before.
        steps: all steps.
        visible: False shows nothing; only one of several processes should.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from quickmerge.terminal import PlainColumn, Terminal

    bar = Progress(
        PlainColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[measured]}"),
        TimeRemainingColumn(),
        console=Terminal(stderr=True),
        transient=True,
        disable=not visible,
    )
    with bar:
        task = bar.add_task("training", completed=done, total=steps, measured="")

        def show(done: int, loss: float, speed: float) -> None:
            bar.update(task, completed=done, measured=f"loss {loss:.4g}, {speed:.3g} items/s, left")

        yield show


@contextmanager
def share_shown(what: str) -> Iterator[Callable[[float], None]]:
    """A progress bar of something that tells the share of it that is done."""
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    from quickmerge.terminal import PlainColumn, Terminal

    columns = (PlainColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def say(sentence: str) -> None:
    """Print a sentence on stderr as it is, below the bar if there is one."""
    from quickmerge.terminal import Terminal

    Terminal(stderr=True, soft_wrap=True).print(sentence, markup=False, highlight=False)
