"""What ``generate`` was given and does not hand on to a callable ``custom_generate``.

transformers gives a ``custom_generate`` neither the streamer (though it has put the prompt into it), nor the tokenizer
of ``stop_strings``, nor ``assistant_model``, nor ``synced_gpus``. So the step in which ``generate`` sorts these
arguments is listened to, from the first `SpeculativeDecoding` on, and what it was given is noted in a context variable,
of which every thread has its own. Calls without a callable ``custom_generate`` are left as they are.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import ref

from quickmerge.errors import QuickmergeError
from quickmerge.models.compat import hear_generate

__all__ = ["Handed", "handed_to", "listen"]


@dataclass(frozen=True)
class Handed:
    """Arguments of one ``generate``.

    Attributes:
        streamer: is waiting for tokens; None for nobody.
        assistant_model: as given.
        synced_gpus: as given.
    """

    streamer: Any = None
    assistant_model: Any = None
    synced_gpus: bool = False


_NOW: ContextVar[tuple[ref[Any], Handed] | None] = ContextVar("quickmerge_generate", default=None)


def listen() -> None:
    """Begin to note what ``generate`` is given, unless that is done."""
    hear_generate(_note)


def handed_to(model: Any) -> Handed:
    """What the ``generate`` of ``model`` that is running in this thread was given.

    Raises:
        QuickmergeError: none is running that could be seen, so that a streamer would wait for ever.
    """
    found = _NOW.get()
    if found is None or found[0]() is not model:
        raise QuickmergeError(
            "SpeculativeDecoding must be called by model.generate(..., custom_generate=...), in the same thread: "
            "otherwise what generate was given, such as a streamer, can't be seen"
        )
    return found[1]


def _note(model: Any, custom_generate: Any, given: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Note what one ``generate`` is given.

    Args:
        model: whose it is.
        custom_generate: as given.
        given: ``tokenizer``, ``assistant_model``, ``streamer`` and ``synced_gpus``, as given.
        kwargs: all other keyword arguments.

    Returns:
        What ``custom_generate`` shall get beside what it would have got anyway. ``generate`` makes a stopping
        criterion of ``stop_strings`` only where the tokenizer is among it.
    """
    _NOW.set(None)
    if not callable(custom_generate):
        return {}
    _NOW.set((ref(model), Handed(given["streamer"], given["assistant_model"], bool(given["synced_gpus"]))))
    tokenizer = given["tokenizer"]
    wanted = kwargs.get("stop_strings") is not None and _takes(custom_generate, "tokenizer")
    ours = getattr(custom_generate, "takes_tokenizer", False)
    return {"tokenizer": tokenizer} if tokenizer is not None and (wanted or ours) else {}


def _takes(function: Any, name: str) -> bool:
    """Whether a function can be given an argument by this name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
