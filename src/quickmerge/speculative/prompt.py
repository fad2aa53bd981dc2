"""How deep a tree may be: no deeper than the text that is left, nor than what the model reads alike at one time."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from quickmerge.errors import QuickmergeError
from quickmerge.models.columns import keeps_columns, seats, stored
from quickmerge.models.compat import cache_argument, cache_name, fresh_cache, given_cache, without_cache
from quickmerge.models.moved import numbers
from quickmerge.speculative.chains import Chains
from quickmerge.speculative.target import Columns, Target, last_hidden, plain_cache

__all__ = ["AnyTarget", "Prompt", "Room", "read_prompt"]

AnyTarget = Target | Chains
"""What reads drafts: trees, or one path of each."""


class Room:
    """The depth that is left for the trees of a batch.

    Behind the last position of the model's context nothing is drafted; what ``generate`` does there happens token by
    token. The same holds at a length from which on a model turns its rotary embedding otherwise (``longrope``, and
    ``dynamic`` beyond the context): nodes on both sides of it can't be read in one pass.

    Args:
        config: of the language model.
    """

    def __init__(self, config: Any) -> None:
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.bounds: list[int] = []
        rope = getattr(config, "rope_parameters", None) or {}
        for some in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
            if some.get("rope_type") == "longrope":
                self.bounds.append(some["original_max_position_embeddings"])

    def depths(self, positions: Sequence[int], left: Sequence[int]) -> list[int]:
        """Steps that the tree of each row may go down from its root.

        Args:
            positions: of the roots.
            left: how many more tokens each row may get; a node at depth d leads to token d + 1.
        """
        top = max(positions)
        out = []
        for position, more in zip(positions, left, strict=True):
            depth = more - 1
            if self.context is not None:
                depth = min(depth, self.context - 1 - position)
            # The longest row decides for all of them how the embedding is turned.
            for bound in self.bounds:
                if top < bound:
                    depth = min(depth, bound - 1 - top)
            out.append(max(0, depth))
        return out


# Reading the prompt, as ``generate`` reads it.


@dataclass(frozen=True)
class Prompt:
    """A prompt that has been read.

    ``logits (B, V)`` say what follows; ``ids (B, n)``, ``valid (B, n)`` bool and ``positions (B, n)`` are of its
    tokens; ``features (B, n, H)`` its last hidden states, None unless wanted. Where these are wanted n are the entries
    that the last block read: fewer of a prompt that was merged, and of a further turn its own tokens alone. ``offset``
    is, on the host, what is added to the place of a token of each row to get its position.
    """

    target: AnyTarget
    logits: Tensor
    ids: Tensor
    valid: Tensor
    positions: Tensor
    features: Tensor | None
    offset: tuple[int, ...] = ()


def read_prompt(
    model: PreTrainedModel, ids: Tensor, model_kwargs: dict[str, Any], features: bool = False, why: str = ""
) -> Prompt:
    """Read ``ids (B, n)``, those that a given cache does not hold yet.

    Args:
        model: the target.
        ids: the whole prompt, padding included.
        model_kwargs: what ``generate`` would give to the model.
        features: whether its last hidden states are wanted.
        why: the trait for which the model reads chains, see `quickmerge.speculative.proof.check_target`; empty: trees.

    Raises:
        QuickmergeError: if the cache is not one whose columns can be moved, or does not go with ``ids``.
    """
    n = ids.shape[1]
    cache = _kept_cache(model, given_cache(model_kwargs)) if why else plain_cache(given_cache(model_kwargs))
    past = _read_before(cache)
    mask = model_kwargs.get("attention_mask")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
    positions = model_kwargs.get("position_ids")
    if positions is None:
        positions = (valid.long().cumsum(-1) - 1).clamp_min(0)
    positions = positions.to(ids.device)
    positions = positions.expand(*positions.shape[:-2], *ids.shape) if positions.shape[-1] == n else positions
    if past >= n or valid.shape != ids.shape or positions.shape[-2:] != ids.shape:
        raise QuickmergeError(
            f"input_ids must hold the whole text, the {past} tokens in {cache_name()} and at least one more, got {n}"
        )
    # Whatever a prompt of images counts, each token of text behind it counts one in every direction.
    offset = positions[..., -1] - (n - 1)
    ends, counts, offsets = numbers(valid[:, -1], valid.sum(-1), offset if offset.dim() == 1 else offset.amax(0))
    if not all(ends):
        raise QuickmergeError("attention_mask must end with 1 in every row: pad on the left")
    given = {**without_cache(model_kwargs), "use_cache": True}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = positions
    inputs = model.prepare_inputs_for_generation(
        ids,
        next_sequence_length=n - past if past else None,
        is_first_iteration=True,
        **given,
        **cache_argument(model.prepare_inputs_for_generation, cache),
    )
    with last_hidden(model, features) as found:
        out = model(**inputs, return_dict=True)
    merged, seen = (False, None) if why else (_is_merged(cache, n), seats(cache))
    place = torch.arange(n, device=ids.device).expand(len(ids), -1)
    length = torch.full((len(ids),), n, device=ids.device)
    columns = Columns(
        valid, place, length, offset, min(counts) < n, prompt=n if merged else 0,
        counts=(0,) * len(counts) if merged else tuple(counts),
    )  # fmt: skip
    target = Chains(model, cache, columns, features, why) if why else Target(model, cache, columns, features, n)
    # Where there are several directions the first is that of the text.
    first = positions.flatten(0, -3)[0] if positions.dim() > 2 else positions
    first = first.expand(len(ids), -1)
    if features and past:
        # Of what was read before there are none any more.
        ids, valid, first = (x[:, past:] for x in (ids, valid, first))
    elif features and seen is not None:
        # The last block read fewer tokens, each of which is taken for the one at whose place it stands.
        at, valid = seen
        ids, first = ids.gather(1, at), first.gather(1, at)
    return Prompt(target, out.logits[:, -1], ids, valid, first, found[0] if features else None, tuple(offsets))


def _is_merged(cache: Cache, n: int) -> bool:
    """Whether fewer entries stand for a prompt of ``n`` tokens in some layers of a cache.

    Raises:
        QuickmergeError: if columns can't be moved, or some are missing otherwise.
    """
    lengths = {stored(layer) for layer in cache.layers if layer.is_initialized}
    odd = sorted({type(layer).__name__ for layer in cache.layers if not keeps_columns(layer)})
    merged = not odd and (lengths != {n} or any(getattr(layer, "left", 0) for layer in cache.layers))
    if odd or (merged and not any(getattr(layer, "prompt", None) for layer in cache.layers)):
        raise QuickmergeError(
            f"every block must keep keys and values of the {n} tokens of the prompt for speculative decoding, got "
            f"{odd[0] if odd else sorted(lengths)}"
        )
    return merged


def _kept_cache(model: PreTrainedModel, cache: Any) -> Cache:
    """The cache as ``generate`` made it, or a new one, for a model that reads chains.

    Raises:
        QuickmergeError: if it is of another kind.
    """
    if cache is None:
        return fresh_cache(model)
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise QuickmergeError(
            f"{cache_name()} must be a DynamicCache that stays on its device, got "
            f"{'an offloaded one' if isinstance(cache, DynamicCache) else type(cache).__name__}: "
            f"leave {cache_name()} and cache_implementation out"
        )
    return cache


def _read_before(cache: Cache) -> int:
    """How many tokens a cache holds already.

    Raises:
        QuickmergeError: if none of its layers tells.
    """
    try:
        return int(cache.get_seq_length())
    except ValueError as error:  # there are no blocks with attention
        if any(any(getattr(layer, "has_previous_state", {}).values()) for layer in cache.layers):
            raise QuickmergeError(f"{cache_name()} must tell how many tokens it holds, or be empty") from error
        return 0
