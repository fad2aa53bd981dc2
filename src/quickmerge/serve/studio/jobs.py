"""One request's work in a thread of its own: it tells how far it is, and can be stopped in the middle of a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from quickmerge.console.ending import one_sentence
from quickmerge.errors import QuickmergeError, first_sentence

__all__ = ["Job", "StoppedError", "Teller"]

T = TypeVar("T")
EVERY = 0.2
"""Seconds between two looks at what a job says."""


class StoppedError(BaseException):
    """The user does not want the rest. As an interruption it is nobody's fault, and not looked into."""


class Teller:
    """What a job says while it works, and whether it shall stop.

    Args:
        stop: is set by whoever stops it.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.stop = stop if stop is not None else threading.Event()
        self.words, self.done = "starting", 0.0
        self.parts: dict[str, Any] = {}
        self.began = time.monotonic()
        self.version = 0

    def say(self, words: str, done: float) -> None:
        """Tell what goes on, and which share of all is done.

        Raises:
            StoppedError: it shall stop.
        """
        self.check()
        self.words, self.done = words, min(1.0, max(0.0, done))
        self.version += 1

    def show(self, **parts: Any) -> None:
        """Hand out what is there already, by name; a later one takes the place of an earlier one.

        Raises:
            StoppedError: it shall stop.
        """
        self.check()
        self.parts = {**self.parts, **parts}
        self.version += 1

    def check(self) -> None:
        """Raise StoppedError if it shall stop."""
        if self.stop.is_set():
            raise StoppedError

    @contextmanager
    def inside(self, model: Any) -> Iterator[None]:
        """Let a model stop in front of any of its blocks: in the middle of a long prompt, too.

        The hooks go with the ``with`` block.
        """
        import torch

        def look(*_: Any) -> None:
            self.check()

        stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        hooks = [block.register_forward_pre_hook(look) for stack in stacks for block in stack]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Job(Generic[T]):
    """Work in a thread, watched from another.

    Args:
        work: gets the teller, and gives the result.
        stop: is set by whoever stops it.
    """

    def __init__(self, work: Callable[[Teller], T], stop: threading.Event | None = None) -> None:
        self.tell = Teller(stop)
        self.result: T | None = None
        self.error = ""
        self.fault: BaseException | None = None
        self.stopped = False
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)

    def _run(self, work: Callable[[Teller], T]) -> None:
        try:
            with one_sentence():
                self.result = work(self.tell)
        except StoppedError:
            self.stopped = True
        except QuickmergeError as error:
            self.error = str(error)
        except (OSError, MemoryError) as error:
            self.error = first_sentence(error)
        except BaseException as error:
            self.fault = error
            self.error = f"a fault of quickmerge itself: {first_sentence(error)}"

    @property
    def alive(self) -> bool:
        """Whether it is at work."""
        return self._thread.is_alive()

    def ended(self, seconds: float) -> bool:
        """Wait at most so long; whether it is over."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self.alive

    def watch(self) -> Iterator[Teller]:
        """Begin, and give the teller whenever it has said something, at most a few times a second.

        Whoever leaves early, as a page that is closed does, stops the work.
        """
        self._thread.start()
        seen = -1
        try:
            while self._thread.is_alive():
                if self.tell.version != seen:
                    seen = self.tell.version
                    yield self.tell
                self._thread.join(EVERY)
            if self.tell.version != seen:
                yield self.tell
        finally:
            if self._thread.is_alive():
                self.tell.stop.set()

    def finish(self) -> T:
        """Do it all, and give the result.

        Raises:
            StoppedError: it was stopped.
            QuickmergeError: something that was given can't be used.
        """
        for _ in self.watch():
            pass
        if self.stopped:
            raise StoppedError
        if self.fault is not None:
            raise self.fault
        if self.error:
            raise QuickmergeError(self.error)
        assert self.result is not None
        return self.result
