"""Adapters on a model, as PEFT puts them there: which of them a run can serve, and which act on places in a text.

An adapter that changes weights (LoRA and its kin, merged or not, one or several) is part of the model that it is in,
and there is nothing to do. One that counts tokens is another matter: a run changes how many there are.

PEFT is not imported, and its classes are not asked for by name; what is looked at is what it promises of a
configuration and of a wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from quickmerge.errors import UnsupportedModelError

__all__ = ["check_adapters", "check_rows", "generating_wrapper"]


def check_adapters(model: Any) -> None:
    """Refuse active adapters that act on places in a text.

    Args:
        model: what wraps a language model, or the model that adapters are in.

    Raises:
        UnsupportedModelError: naming the adapter and the trait.
    """
    for name, config in _active(model):
        why = _acts_on_places(config)
        if why is not None:
            kind = getattr(config.peft_type, "value", config.peft_type) if hasattr(config, "peft_type") else "unknown"
            raise UnsupportedModelError(
                f"{type(model).__name__} has the active adapter {name!r} ({kind}), {why}: adapters that change weights "
                "alone, such as LoRA, can be served"
            )


def _acts_on_places(config: Any) -> str | None:
    """How an adapter depends on places in a text, in words; None if it changes weights alone."""
    if getattr(config, "is_prompt_learning", False):
        return "which puts virtual tokens in front of every prompt, so that places in its text are no longer its own"
    if getattr(config, "alora_invocation_tokens", None):
        return "which acts from certain tokens on and counts from the end of the text, where fewer tokens would be"
    return None


def _active(model: Any) -> Iterator[tuple[str, Any]]:
    """The configurations of the adapters that a model, or what wraps it, computes with."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    active = getattr(model, "active_adapters", None)
    if active is None or callable(active):  # a method of models of transformers, which raises where there are none
        active = list(configs)
    for name in [active] if isinstance(active, str) else active:
        if name in configs:
            yield name, configs[name]


def generating_wrapper(model: Any) -> Any:
    """What wraps ``model`` and is running its ``generate`` now; the model itself if nothing does.

    A wrapper whose ``generate`` calls the model's own puts its way to prepare inputs there meanwhile.
    """
    return getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", model)


def check_rows(model: nn.Module, what: str) -> None:
    """Refuse adapters that were chosen row by row (``adapter_names``), where rows leave the batch or join it.

    Args:
        model: inside of a call that was given ``adapter_names``, or not.
        what: that can't be, in words.

    Raises:
        UnsupportedModelError: naming the argument.
    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, partial) and hook.keywords.get("adapter_names") is not None:
                raise UnsupportedModelError(
                    f"adapter_names must be left out for {what}, where rows that are done leave the batch and the "
                    f"adapters of {type(model).__name__} would be those of other rows: set one adapter for all"
                )
