"""Sizes that a config asks for, held against what the weights hold before anything is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.headers import Held

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_build", "check_integers"]

LOOPS = re.compile(r"layer|block|depth|stage|expert", re.IGNORECASE)
SIDES = re.compile(r"size|dim|width|length|window|token|inner|features|units", re.IGNORECASE)
"""Settings that say how often something is built, unless they say how large each is: ``expert_size``."""
COUNTS = re.compile(r"(^|_)(num|n)_", re.IGNORECASE)
"""Settings that count something; lists of that length are made of a few."""
MOST_LOOPS, MOST_COUNTS, MOST = 1024, 1 << 16, 1 << 53
"""What is allowed even for weights that hold less: defaults of settings that a model doesn't use."""
FACTOR, SLACK, BUFFERS = 4, 1 << 20, 1 << 29
"""Parameters may be so many times those of the weights (tied matrices are counted twice, a head may be left out) and so
many more; tables that are computed may take so many bytes."""
CALLS_EACH, CALLS = 300, 30_000
"""Of torch while a model is built: for each tensor of the weights, and for each model."""


def check_integers(what: str, config: Any, held: Held | None) -> None:
    """Refuse a config whose numbers ask for more loops than the weights can be from.

    It comes before the config is opened: some make a list with an entry for each layer when they are.

    Args:
        what: the file, for the message.
        config: its content.
        held: what the weights hold; None where there are none, as when only shapes are asked for.

    Raises:
        UnsupportedModelError: naming the setting.
    """
    tensors, largest = (0, 0) if held is None else (held.tensors, held.largest)
    for name, value in _integers(config):
        most = MOST
        if LOOPS.search(name) and not SIDES.search(name):
            most = max(MOST_LOOPS, tensors)
        elif isinstance(value, float):
            continue  # infinity is a limit that some state
        elif COUNTS.search(name):
            most = max(MOST_COUNTS, tensors, largest)
        if value > most:
            held_by = f", of which the weights hold at most {most}" if most < MOST else ""
            raise UnsupportedModelError(f"{what} asks for {name} {value:.6g}{held_by}: it can't be right")


def _integers(config: Any) -> Iterator[tuple[str, int | float]]:
    if isinstance(config, dict):
        for name, value in config.items():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, (int, float)) and not isinstance(each, bool):
                    yield str(name), each
                elif isinstance(each, (dict, list)):
                    yield from _integers(each)
    elif isinstance(config, list):
        for value in config:
            yield from _integers(value)


def check_build(what: str, build: Callable[[], nn.Module], held: Held | None) -> None:
    """Build a model without memory, and refuse one that would be much larger than its weights.

    An error within ``build`` is no business of this function: the same one comes when the model is built in earnest.

    Args:
        what: the file that says how it is built, for the message.
        build: makes the model, on whatever device is the default.
        held: what the weights hold; None bounds the time alone.

    Raises:
        UnsupportedModelError: it would be larger, or takes far too many steps to build.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    allowed = CALLS if held is None else CALLS + CALLS_EACH * held.tensors

    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            if self.calls > (allowed if held is not None else 20 * allowed):
                raise _TooMuch
            return func(*args, **(kwargs or {}))

    try:
        with torch.device("meta"), Counting():
            model = build()
    except _TooMuch:
        raise UnsupportedModelError(f"{what} asks for a model of far more parts than its weights hold") from None
    except Exception:
        return
    if held is None:
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > FACTOR * held.elements + SLACK:
        raise UnsupportedModelError(
            f"{what} asks for {parameters:,} parameters, but the weights hold {held.elements:,}: they don't belong "
            "together"
        )
    tables = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if tables > BUFFERS + 8 * held.elements:
        raise UnsupportedModelError(f"{what} asks for tables of {tables / 2**30:.3g} GiB: a size in it can't be right")


class _TooMuch(BaseException):
    """Too many calls; no Exception, lest whoever builds takes it for one of his own."""
