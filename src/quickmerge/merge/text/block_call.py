"""What a decoder block is called with, by name, and how each part of it follows tokens that were merged in front.

A model hands every block what it made once for all tokens of a prompt: positions, rotary tables, masks, embeddings of
its own for every block. Above a merge each of it has to be of the slots. Nothing is guessed: what follows the tokens in
a way that isn't known here is refused by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quickmerge.errors import UnsupportedModelError
from quickmerge.merge.text.merged_cache import pick_columns
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.models.compat import CACHE_NAMES, COLUMN_NUMBERS
from quickmerge.models.traits import BlockTraits

__all__ = ["BlockArguments", "Slots", "in_streams", "one_stream"]

_PAIRS = ("causal_mask", "attention_mask")
"""Arguments that mask attention; where a block has both, the second masks what it reads into its memory."""

_PADDING = ("attention_mask", "mamba_attention_mask", "conv_mask", "linear_attention_mask")
"""Arguments that tell padding ``(B, q)`` to what a block reads into its memory."""

_MEMORY_KEYS = ("conv", "linear_attention", "mamba")
"""What tells padding, among several masks in one argument."""

_PLACED = ("position", "rotary", "freqs", "cos", "sin", "scaling")
"""What is made of positions has one of these in its name: slots have that of their anchor."""

_CHOSEN = "prev_topk_indices"
"""What the indexer of a block below chose, for blocks without one."""

_LEFT = ("shared_kv_states", *CACHE_NAMES, COLUMN_NUMBERS)
"""Arguments that hold what blocks themselves have put there, or the numbers of the columns of a cache."""


@dataclass(frozen=True)
class Slots:
    """What stands for a prompt's ``columns`` above a merge.

    ``source (B, K + drafts)``: the column of each. ``plan``: from the prompt's tokens to its K slots; ``drafts`` tokens
    behind it stay single. At the block of a merge ``step`` is its own plan, for the ``entering`` tokens and slots that
    were in front of it: what the block below has given besides hidden states.
    """

    source: Tensor
    plan: MergePlan
    columns: int
    drafts: int
    step: MergePlan | None = None
    entering: int = 0

    def merged(self, x: Tensor) -> Tensor:
        """``x (B or 1, columns or entering, ...)`` merged as the hidden states of the tokens were."""
        plan = self.plan if x.shape[1] == self.columns or self.step is None else self.step
        n = x.shape[1] - self.drafts
        x = x.expand(len(self.source), *x.shape[1:])
        return torch.cat([plan.merge(x[:, :n]), x[:, n:]], 1)

    def picked(self, x: Tensor, axis: int) -> Tensor:
        """The columns of the anchors of ``x``, whose columns lie along ``axis``, -1 or -2."""
        if x.ndim == -axis:  # one row for all, and no axis for it
            x = x[None]
        return pick_columns(x, self.source, axis)


class BlockArguments:
    """The arguments of one block.

    Args:
        block: a decoder block.
        traits: what it is.
        name: of the model, for errors.
    """

    def __init__(self, block: nn.Module, traits: BlockTraits, name: str) -> None:
        self.traits, self._model = traits, name
        parameters = inspect.signature(block.forward).parameters.values()
        self._names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.hidden = self._names[0]
        """The name of the hidden states, the first argument."""
        self.mask = next((name for name in _PAIRS if name in self._names), "attention_mask")
        """The name of the mask of its attention."""

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def call(self, given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments that say the same."""
        return (given[self.hidden],), {name: value for name, value in given.items() if name != self.hidden}

    def masked(self, given: dict[str, Any], mask: Any) -> dict[str, Any]:
        """The arguments with another mask of attention; a block may be given several masks in one argument."""
        value = given.get(self.mask)
        if isinstance(value, Mapping):
            mask = {key: each if key in _MEMORY_KEYS else mask for key, each in value.items()}
        return {**given, self.mask: mask}

    def follow(self, given: dict[str, Any], slots: Slots, valid: Tensor, padded: bool) -> dict[str, Any]:
        """The arguments as they are of slots, but for the hidden states and the mask of attention.

        Args:
            given: by name, of all columns of a prompt.
            slots: what stands for them.
            valid: ``(B, K + drafts)``, which slots are there.
            padded: whether some are not.

        Raises:
            UnsupportedModelError: for an argument that follows the tokens in an unknown way.
        """
        changed = dict(given)
        for name, value in given.items():
            if name in (self.hidden, *_LEFT):
                continue
            if name == self.mask and isinstance(value, Mapping):
                changed[name] = {
                    key: self._padding(key, each, valid, padded) if key in _MEMORY_KEYS else each
                    for key, each in value.items()
                }
            elif name == self.mask and self.attends(value):
                continue
            elif name == _CHOSEN and slots.step is not None and self.traits.picks:
                changed[name] = None  # what was chosen below a merge is of tokens, and nobody asks for it
            elif name in _PADDING:
                changed[name] = self._padding(name, value, valid, padded)
            else:
                changed[name] = self._of_slots(name, value, slots)
        return changed

    def attends(self, mask: Any) -> bool:
        """Whether what the block is given as the mask is one of attention, also where it has none and looks at none."""
        return self.traits.attention is not None or (isinstance(mask, Tensor) and mask.ndim == 4)

    def _padding(self, name: str, value: Any, valid: Tensor, padded: bool) -> Any:
        if self.traits.memory is None:
            return None
        if value is not None and (not isinstance(value, Tensor) or value.ndim != 2):
            raise self._unknown(name, value)
        return valid.long() if padded else None

    def _of_slots(self, name: str, value: Any, slots: Slots) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._of_slots(name, each, slots) for each in value)
        if isinstance(value, Mapping):
            return {key: self._of_slots(name, each, slots) for key, each in value.items()}
        rows, n = (1, len(slots.source)), slots.columns
        if not isinstance(value, Tensor):
            return value
        if slots.step is not None and n not in value.shape and slots.entering in value.shape[1:2]:
            n = slots.entering
        if n not in value.shape:
            return value
        if any(part in name for part in _PLACED):
            if value.ndim == 4 and value.shape[2] == n and value.shape[0] in rows and value.shape[1] == 1:
                return slots.picked(value[:, 0], -2)[:, None]
            if value.shape[-1] == n and (value.ndim == 1 or value.shape[-2] in rows):
                return slots.picked(value, -1)
            if value.ndim > 1 and value.shape[-2] == n and (value.ndim == 2 or value.shape[-3] in rows):
                return slots.picked(value, -2)
            if value.ndim == 4 and value.shape[1] == n and value.shape[0] in rows:  # (B, N, 1, d) or (B, N, 1, 1)
                picked = slots.picked(value.flatten(2), -2)
                return picked.reshape(*picked.shape[:2], *value.shape[2:])
        elif value.ndim == 2 and value.shape[1] == n and not value.is_floating_point():
            return slots.picked(value, -1)
        elif value.ndim in (3, 4) and value.shape[1] == n and value.shape[0] in rows and value.is_floating_point():
            return slots.merged(value)
        raise self._unknown(name, value)

    def _unknown(self, name: str, value: Any) -> UnsupportedModelError:
        what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        return UnsupportedModelError(
            f"prefix merging can't be served for {self._model}, whose blocks ({self.traits.declared}) are given "
            f"{name} {what}, which follows the tokens in a way that slots can't"
        )


def in_streams(hidden: Tensor, tokens: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change hidden states of ``tokens`` tokens as ``(B, tokens, width)``, of however many streams they are.

    They are ``(B, N, D)``, ``(B, N, S, D)`` or ``(S, B, N, D)`` of S streams.
    """
    if hidden.ndim < 4:
        return change(hidden)
    if hidden.shape[1] == tokens and hidden.shape[2] != tokens:
        changed = change(hidden.flatten(2))
        return changed.reshape(*changed.shape[:2], *hidden.shape[2:])
    return torch.stack([change(stream) for stream in hidden])


def one_stream(hidden: Tensor, tokens: int) -> Tensor:
    """``(B, N, D)``: the mean of the streams of hidden states."""
    if hidden.ndim < 4:
        return hidden
    return hidden.mean(2 if hidden.shape[1] == tokens and hidden.shape[2] != tokens else 0)
