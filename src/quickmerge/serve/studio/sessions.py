"""What one user has: a run at work, and the runs that are done, so that a share that was tried is there at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from quickmerge.errors import QuickmergeError
from quickmerge.serve.studio.jobs import Job, Teller

__all__ = ["Session"]

T = TypeVar("T")
MOST = 32
"""Runs that are remembered, and texts of which is known what the plain model does."""
PATIENCE = 10.0
"""Seconds that a new run waits for one that was stopped."""


class Session:
    """One browser tab. A copy of it is a new one: gradio copies what a state begins with, once for each user."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._job: Job[Any] | None = None
        self._runs: OrderedDict[Hashable, Any] = OrderedDict()
        self._shown: dict[str, Hashable] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return Session()

    def begin(self, work: Callable[[Teller], T]) -> Job[T]:
        """A job of this user's, to be watched.

        Raises:
            QuickmergeError: another one is at work.
        """
        if self._job is not None and self._stop.is_set():
            self._job.ended(PATIENCE)  # what was stopped ends at the model's next block
        if self._job is not None and self._job.alive:
            raise QuickmergeError("a run of yours is at work: stop it first, or wait for its end")
        self._stop = threading.Event()
        self._job = job = Job(work, self._stop)
        return job

    def stop(self) -> bool:
        """Stop what is at work; False if nothing is."""
        working = self._job is not None and self._job.alive
        if working and self._job is not None:
            self._job.tell.words = "stopping"
            self._job.tell.version += 1
        self._stop.set()
        return working

    # What was done ------------------------------------------------------------------------------------------------

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made under this key, or make it; the oldest goes where there are too many."""
        if key in self._runs:
            self._runs.move_to_end(key)
        else:
            self._runs[key] = make()
            while len(self._runs) > MOST:
                self._runs.popitem(last=False)
        found: T = self._runs[key]
        return found

    def keep_run(self, group: Hashable, keep: float, run: Any) -> None:
        """Remember a run of a share, beside others of the same text, model and recipe."""
        self._runs.pop(("run", group, keep), None)
        self.once(("run", group, keep), lambda: run)

    def runs_of(self, group: Hashable) -> dict[float, Any]:
        """The runs of one text, model and recipe by their share, from the smallest on."""
        wanted = [key for key in self._runs if isinstance(key, tuple) and key[:2] == ("run", group)]
        found = {key[2]: self._runs[key] for key in wanted}
        return dict(sorted(found.items()))

    def look_at(self, place: str, group: Hashable) -> None:
        """Note of which group a place of the page shows runs."""
        self._shown[place] = group

    def shown(self, place: str) -> dict[float, Any]:
        """The runs that a place of the page can show, by their share."""
        return self.runs_of(self._shown[place]) if place in self._shown else {}
