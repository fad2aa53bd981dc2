"""Ctrl-C and SIGTERM wait for the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

__all__ = ["LateSignals"]


class LateSignals:
    """Within this context the two signals are only noted; a second Ctrl-C interrupts at once.

    A signal that came too late for anybody to ask is delivered when the context ends. In another thread than the
    main one, where Python allows no handlers, signals do what they always do.
    """

    CAUGHT = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> LateSignals:
        if threading.current_thread() is threading.main_thread():
            # What is ignored stays ignored: shells start programs in the background so.
            caught = [number for number in self.CAUGHT if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]
        if error is None and self.received is not None:
            os.kill(os.getpid(), self.received)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
