"""Drafts that are given with a prompt, read apart from it: a draft sees what a token sees that is written behind it.

Where entries leave the cache of a prompt, that is what is left of it; so drafts have to wait until they have left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quickmerge.models.compat import TOKEN_AXES

__all__ = ["apart", "joined"]


def apart(inputs: dict[str, Any], drafts: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arguments that read a prompt, and those that read the drafts behind it.

    Args:
        inputs: of the decoder, by name, with ``N`` tokens.
        drafts: how many of them at the end are no prompt, 1 to N - 1.

    Returns:
        Both hold those of ``inputs`` that are by token; the mask of the drafts is one for everything.
    """
    now: dict[str, Tensor] = {}
    later: dict[str, Tensor] = {}
    for name, axis in TOKEN_AXES.items():
        given = inputs.get(name)
        if isinstance(given, Tensor):
            tokens = given.shape[axis]
            now[name] = given.narrow(axis, 0, tokens - drafts)
            later[name] = given.narrow(axis, tokens - drafts, drafts)
    mask = inputs.get("attention_mask")
    if mask is not None:
        now["attention_mask"], later["attention_mask"] = mask[:, :-drafts], mask
    return now, later


def joined(output: Any, more: Any) -> None:
    """Let a decoder's output go on with that of another forward: its last and, where it has them, all hidden states."""
    output.last_hidden_state = torch.cat([output.last_hidden_state, more.last_hidden_state], 1)
    if getattr(output, "hidden_states", None) is not None:
        pairs = zip(output.hidden_states, more.hidden_states, strict=True)
        output.hidden_states = tuple(torch.cat(each, 1) for each in pairs)
