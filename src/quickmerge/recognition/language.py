"""The first blocks of a causal language model, read with masks, positions and a cache of our own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from quickmerge.errors import QuickmergeError, UnsupportedModelError, whole_number
from quickmerge.models.compat import attention_implementation, cache_argument
from quickmerge.models.decoder import IMPLEMENTATIONS, layer_window
from quickmerge.training.packing import additive, packed_mask, packed_positions

__all__ = ["check_reading", "cut", "fork", "read"]


def cut(language: PreTrainedModel, blocks: int) -> PreTrainedModel:
    """A copy of the first ``blocks`` blocks of a causal language model, with its final norm and output matrix.

    Raises:
        ValueError: there are not so many blocks.
        UnsupportedModelError: it is no causal language model, its blocks can't be found, or its attention is not one
            that takes a mask of any shape.
    """
    blocks = whole_number("blocks", blocks)
    if not isinstance(language, PreTrainedModel):
        raise UnsupportedModelError(f"language must be a transformers PreTrainedModel, got {type(language).__name__}")
    name, stack = find_stack(language)
    if blocks > len(stack):
        raise ValueError(f"blocks must be at most {len(stack)}, the depth of this {type(language).__name__}: {blocks}")
    implementation = attention_implementation(language.config)
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{type(language).__name__} runs attention as {implementation!r}, which does not take the mask of labels: "
            f"load it with attn_implementation set to one of {', '.join(IMPLEMENTATIONS)}"
        )
    # The blocks that are left out are not copied.
    made: PreTrainedModel = copy.deepcopy(language, {id(block): nn.Identity() for block in stack[blocks:]})
    setattr(made.base_model, name, find_stack(made)[1][:blocks])
    for config in (made.config, made.base_model.config):
        _shorten(config, len(stack), blocks)
    return made


def find_stack(language: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of the blocks of a causal language model.

    Raises:
        UnsupportedModelError: if there is no output matrix or not one list of as many blocks as the config says.
    """
    name, base = type(language).__name__, language.base_model
    if base is language or language.get_output_embeddings() is None:
        raise UnsupportedModelError(f"language must be a causal language model with an output matrix, got a {name}")
    depth = getattr(base.config, "num_hidden_layers", None)
    stacks = [(n, m) for n, m in base.named_children() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(stacks) != 1:
        raise UnsupportedModelError(f"{name} has {len(stacks)} lists of {depth} blocks, exactly one was looked for")
    return stacks[0]


def _shorten(config: Any, depth: int, blocks: int) -> None:
    if config.num_hidden_layers != depth:  # model and base share theirs
        return
    for key, value in list(vars(config).items()):
        # what is listed block by block: layer types, where there are rotary positions
        if isinstance(value, list) and len(value) == depth:
            setattr(config, key, value[:blocks])
    config.num_hidden_layers = blocks


def read(
    language: PreTrainedModel,
    embeds: Tensor,
    see: Tensor,
    position: Tensor,
    *,
    rows: Tensor | None = None,
    cache: DynamicCache | None = None,
    key_position: Tensor | None = None,
) -> Tensor:
    """Logits, in float32 at least, of tokens that see what ``see`` says.

    Args:
        language: the language model.
        embeds: ``(B, Q, D)`` the tokens to read.
        see: ``(B, 1, Q, K)`` bool over the K - Q tokens in the cache and these.
        position: ``(B, Q)``.
        rows: ``(B, Q)`` bool, the tokens whose logits are wanted. Default: all.
        cache: holds the tokens before and is given these.
        key_position: ``(B, K)``, needed with a cache where attention has a window. Default: ``position``.

    Returns:
        ``(R, V)`` for the R rows asked for in reading order, else ``(B, Q, V)``.
    """
    with _only(language.get_output_embeddings(), rows):
        out = language(
            inputs_embeds=embeds,
            attention_mask=_masks(language, see, position, key_position, embeds.dtype),
            position_ids=position,
            **cache_argument(language, cache),
            use_cache=cache is not None,
        )
    logits: Tensor = out.logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that goes on from here by itself; what is in it is shared and not copied."""
    other = DynamicCache()
    # a layer that grows makes new tensors, and lets go of those it shares
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def check_reading(language: PreTrainedModel) -> None:
    """Make sure that a model does as masks, positions and cache say, by reading nine tokens in four ways.

    Raises:
        UnsupportedModelError: if it does not.
    """
    name, training = type(language).__name__, language.training
    language.eval()
    try:
        with torch.no_grad():
            plain, ways = _read_in_ways(language)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, QuickmergeError):
            raise
        raise UnsupportedModelError(f"{name} can't be read with masks and positions of labels: {error}") from error
    finally:
        language.train(training)
    # experts of a mixture see other batches, so that even what is hidden may move the last digits
    exact = language.get_input_embeddings().weight.dtype in (torch.float32, torch.float64)
    allowed = (1e-3 if exact else 0.1) * float(plain.abs().max())
    for way, got in ways.items():
        if not bool(((got - plain).abs() <= allowed).all()):
            raise UnsupportedModelError(f"{name} does not read tokens {way} as it reads them in a plain sequence")


def _read_in_ways(language: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of three tokens behind four, in a plain sequence and in the ways of this package."""
    embed = language.get_input_embeddings()
    ids = torch.arange(9, device=embed.weight.device)[None] * 7 % embed.num_embeddings
    other = ids.clone()
    other[:, 4:6] = (ids[:, 4:6] + 3) % embed.num_embeddings
    group = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2]], device=ids.device)
    see, position, cache = packed_mask(group, group < 0), packed_positions(group), DynamicCache()
    alone = ids[:, [0, 1, 2, 3, 6, 7, 8]]
    plain = language(input_ids=alone, attention_mask=torch.ones_like(alone), use_cache=False).logits[:, 4:].float()
    read(language, embed(ids[:, :4]), see[:, :, :4, :4], position[:, :4], cache=cache)
    cached = read(language, embed(ids[:, 4:]), see[:, :, 4:], position[:, 4:], cache=cache, key_position=position)
    return plain, {
        "at positions of their own": read(language, embed(ids), see, position)[:, 6:],
        "that are hidden by a mask": read(language, embed(other), see, position)[:, 6:],
        "behind a cache": cached[:, 2:],
    }


@contextmanager
def _only(head: nn.Module, rows: Tensor | None) -> Iterator[None]:
    """Let the output matrix, which is wider than all the rest, see the rows that are asked for alone."""
    if rows is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][rows],))
    try:
        yield
    finally:
        handle.remove()


def _masks(
    language: PreTrainedModel, see: Tensor, position: Tensor, key_position: Tensor | None, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """What each kind of block adds to its scores: one mask for all, or one by the name of the kind."""
    config = language.base_model.config
    depth = config.num_hidden_layers
    windows = [layer_window(config, layer) for layer in range(depth)]
    key_position = position if key_position is None else key_position
    far = position[:, None, :, None] - key_position[:, None, None, :]

    def made(window: int | None) -> Tensor:
        return additive(see if window is None else see & (far < window), dtype)

    if len(set(windows)) == 1:
        return made(windows[0])
    return {config.layer_types[layer]: made(windows[layer]) for layer in range(depth)}
