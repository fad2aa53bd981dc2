"""Whether a run may go on from what `out` holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError
from quickmerge.training.checkpoint import Checkpoint, folders, newest
from quickmerge.training.config import TrainingConfig

__all__ = ["check_same", "find", "run_identity"]

FREE = ("max_minutes", "save_every", "log_every")
"""Settings that change nothing about what is learnt."""


def run_identity(
    config: TrainingConfig, fingerprint: Mapping[str, Any] | None, items: int, processes: int
) -> dict[str, Any]:
    """All that decides on the course of a run, as JSON holds it.

    Raises:
        QuickmergeError: the fingerprint is nothing that JSON can hold.
    """
    try:
        given = json.loads(json.dumps(dict(fingerprint or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise QuickmergeError(f"fingerprint must hold only what JSON can ({error})") from None
    return {"config": config.to_dict(), "fingerprint": given, "items": items, "processes": processes}


def find(out: Path, resume: bool) -> tuple[Checkpoint | None, list[str]]:
    """What to go on from, and warnings about damaged checkpoints.

    Returns:
        None instead of a checkpoint if `resume` is False.

    Raises:
        QuickmergeError: `resume` is True without a checkpoint, or False with one.
    """
    if not resume:
        if there := folders(out):
            raise QuickmergeError(f"{there[-1]} is there already: use resume=True to go on from it, or another folder")
        return None, []
    found, damaged = newest(out)
    if found is None:
        raise QuickmergeError(f"nothing to resume: no folder {out / 'checkpoints' / 'step-*'} was found")
    return found, damaged


def check_same(out: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """See that a run is resumed as what it was.

    Settings that change nothing about what is learnt may differ, and with a constant schedule `steps` may grow.

    Args:
        out: the output folder.
        then: the `run_identity` in the checkpoint, possibly among other things.
        now: this call's.

    Raises:
        QuickmergeError: it differs; the message names the first difference and both values.
    """
    for part, name in (("config", "config "), ("fingerprint", "fingerprint ")):
        before, after = then.get(part, {}), now[part]
        for key in sorted(before.keys() | after.keys()):
            old, new = before.get(key), after.get(key)
            if old != new and not (part == "config" and _may_change(key, old, new, after)):
                raise _differs(out, name + key, old, new)
    for key, name in (("items", "the dataset's length"), ("processes", "the number of processes")):
        if then.get(key) != now[key]:
            raise _differs(out, name, then.get(key), now[key])


def _may_change(key: str, old: Any, new: Any, config: Mapping[str, Any]) -> bool:
    grown = key == "steps" and config["schedule"] == "constant" and isinstance(old, int) and new > old
    return key in FREE or grown


def _differs(out: Path, name: str, old: Any, new: Any) -> QuickmergeError:
    return QuickmergeError(
        f"{name} was {old!r} when {out} was begun and is {new!r} now: make them the same, or use another folder"
    )
