"""Trackers that show a run while it goes on: accelerate's, fed from what goes into ``metrics.jsonl``."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]

from quickmerge.errors import QuickmergeError, door, first_sentence
from quickmerge.files import write_json
from quickmerge.terminal import say
from quickmerge.training.config import TrainingConfig

__all__ = ["STATE", "Trackers"]

PROJECT = "quickmerge"
STATE = "trackers.json"
"""In the folder of a run: its name with the trackers, and up to which step each was told."""


class Trackers:
    """The trackers of a run, in the main process; without ``config.log_with`` there are none, and nothing happens.

    A step is told to a tracker once, whatever becomes of the run: what has been told is written down before it is. So
    a run that is resumed from an earlier checkpoint is silent until it is further than it was, and a tracker that is
    added later is told what it has missed.

    Args:
        accelerator: was made with ``log_with``.
        config: the settings of the run.
        out: its folder.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, out: Path) -> None:
        self.accelerator = accelerator
        self.config = config
        self.out = out
        self.run = ""
        self.told: dict[str, int] = {}
        self.silent: set[str] = set()
        self.asked = config.log_with is not None and bool(accelerator.is_main_process)

    def begin(self, resume: bool) -> None:
        """Open the run, or open it again, and tell what is in ``metrics.jsonl`` and was not told yet.

        Raises:
            QuickmergeError: a tracker can't begin, as one that wants to be logged in.
        """
        if not self.asked:
            return
        self.run, self.told = self._before() if resume else (uuid.uuid4().hex[:12], {})
        name = f"{self.out.name}-{self.run}"
        with door(f"log_with {self.config.log_with} can't begin"):
            self.accelerator.init_trackers(PROJECT, init_kwargs={
                "wandb": {"id": self.run, "name": name, "resume": "allow", "dir": str(self.out)},
                "trackio": {"name": name, "resume": "allow"},
            })  # fmt: skip
            for tracker in self.accelerator.trackers:
                if tracker.name not in self.told:
                    tracker.store_init_configuration(self._settings())
        for text in (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            self.tell(json.loads(text))

    def tell(self, line: Mapping[str, Any]) -> None:
        """Tell a line of ``metrics.jsonl`` to those that do not know it. One that fails is told no more."""
        step = int(line["step"])
        due = [
            tracker
            for tracker in (self.accelerator.trackers if self.asked else [])
            if tracker.name not in self.silent and step > self.told.get(tracker.name, 0)
        ]
        if not due:
            return
        self.told |= {tracker.name: step for tracker in due}
        write_json(self.out / STATE, {"run": self.run, "told": self.told})
        values = {name: value for name, value in line.items() if name != "step" and value is not None}
        for tracker in due:
            try:
                tracker.log(values, step=step)
            except Exception as error:  # a network that is gone is no reason to stop a training
                self.silent.add(tracker.name)
                say(f"warning: {tracker.name} is told no more ({first_sentence(error)}); metrics.jsonl goes on")

    def end(self) -> None:
        """Let them finish what they still have to send."""
        for tracker in self.accelerator.trackers if self.asked else []:
            try:
                tracker.finish()
            except Exception as error:
                say(f"warning: {tracker.name} did not finish ({first_sentence(error)})")

    def _before(self) -> tuple[str, dict[str, int]]:
        """What a run was called, and what was told, if it had trackers."""
        try:
            found = json.loads((self.out / STATE).read_text(encoding="utf-8"))
            return str(found["run"]), {str(name): int(step) for name, step in found["told"].items()}
        except FileNotFoundError:
            return uuid.uuid4().hex[:12], {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise QuickmergeError(
                f"{self.out / STATE} is damaged: remove it, and the trackers get the whole run as a new one"
            ) from None

    def _settings(self) -> dict[str, Any]:
        """The settings as all trackers can hold them."""
        given = self.config.to_dict()
        return {name: str(value) if isinstance(value, list) else value for name, value in given.items()
                if value is not None}  # fmt: skip
