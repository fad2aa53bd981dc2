"""Standing in front of one model's ``generate``, which is told things that no forward is told."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from quickmerge.hosts.attachment import stand_in


def watch_generate(model: nn.Module, around: Callable[[dict[str, Any], Callable[[], Any]], Any]) -> Callable[[], None]:
    """Let ``around`` see every call of ``model.generate``.

    Args:
        model: a model that has it.
        around: is given the arguments by name, those of the generation config among them, and the call itself, which
            it makes or does not make.

    Returns:
        A function that undoes it.
    """
    inner: Any = model.generate
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def generate(*args: Any, **kwargs: Any) -> Any:
        return around(by_name(signature, args, kwargs), lambda: inner(*args, **kwargs))

    return stand_in(model, "generate", generate)


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those of a ``**kwargs`` among them."""
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def setting(model: Any, given: dict[str, Any], name: str) -> Any:
    """What a call of ``generate`` was told by ``name``: an argument, or else of a generation config."""
    if given.get(name) is not None:
        return given[name]
    told = getattr(given.get("generation_config"), name, None)
    return getattr(getattr(model, "generation_config", None), name, None) if told is None else told
