"""The model whose text is written: one pass reads the trees of a whole batch behind a cache."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from quickmerge.decoding.commit import Columns, commit, compact, lay_out, select
from quickmerge.decoding.mask import masks_by_window
from quickmerge.decoding.tree import Packed, Tree, pack
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.hosts.structure import IMPLEMENTATIONS, PREFIX, layer_window
from quickmerge.models.compat import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    attention_implementation,
    cache_argument,
    cache_name,
    takes_cache,
)

__all__ = ["Target", "check_target", "plain_cache"]

_PROVEN: WeakSet[PreTrainedModel] = WeakSet()


class Target:
    """A model, the cache of a batch that it has read, and what the columns of the cache hold.

    Args:
        model: one that `check_target` lets pass.
        cache: of plain layers, filled.
        columns: what it holds.
        features: whether passes also give the last hidden states.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, columns: Columns, features: bool = False) -> None:
        self.model = model
        self.cache = cache
        self.columns = columns
        self.features = features
        config = model.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.windows = {kind: layer_window(config, i) for i, kind in enumerate(kinds)}
        self.dtype = next(layer.keys.dtype for layer in cache.layers if layer.is_initialized)
        # The longest row, kept on this side so that no step waits for a device to tell.
        self._longest = int(columns.length.max())

    def read(self, packed: Packed) -> tuple[Tensor, Tensor | None]:
        """Read the trees of the batch.

        Returns:
            ``(B, T, V)`` logits, and the last hidden states ``(B, T, H)`` behind the final norm if wanted.
        """
        columns = self.columns
        nodes, longest = packed.tokens.shape[1], self._longest + packed.tokens.shape[1]
        mask: Tensor | dict[str, Tensor] | None = None
        if nodes > 1 or columns.holes:
            mask = masks_by_window(
                self.windows, columns.valid, columns.place, columns.length, packed, self.dtype, longest
            )
        with last_hidden(self.model, self.features) as found:
            out = self.model(
                input_ids=packed.tokens,
                attention_mask=mask,
                position_ids=(columns.length + columns.offset)[..., None] + packed.depth,
                **cache_argument(self.model, self.cache),
                use_cache=True,
                return_dict=True,
            )
        return out.logits, found[0] if self.features else None

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes on these paths, for each row from the root on."""
        self.columns = compact(self.cache, commit(self.cache, self.columns, paths))
        self._longest += max(len(path) for path in paths)

    def lay_out(self, width: int) -> None:
        """Put every token in the column that ``generate`` would have put it in."""
        if self.columns.holes or self.columns.width != width:
            self.columns = lay_out(self.cache, self.columns, width)

    def select(self, index: Tensor) -> None:
        """Go on with the rows ``index (R,)`` alone."""
        self.columns = select(self.cache, self.columns, index)


@contextmanager
def last_hidden(model: PreTrainedModel, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Collect the last hidden states, behind the final norm, of this thread's passes inside the block.

    Another thread may run the same model meanwhile, and its passes go through the hook too.
    """
    found: list[Tensor] = []
    mine = threading.get_ident()
    if not wanted:
        yield found
        return

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        if threading.get_ident() == mine:
            found.append(out[0])

    hook = model.base_model.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def plain_cache(cache: Any) -> Cache:
    """The cache with layers that keep every column, so that columns can be moved and dropped.

    An empty cache is changed in place; None makes a new one.

    Raises:
        QuickmergeError: if it is of another kind, or a sliding layer has already dropped something.
    """
    if cache is None:
        return DynamicCache()
    kinds = {type(layer) for layer in getattr(cache, "layers", [])}
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or kinds - _PLAIN:
        odd = sorted(kind.__name__ for kind in kinds - _PLAIN) or [type(cache).__name__]
        raise QuickmergeError(
            f"{cache_name()} must be a DynamicCache with keys and values of every token, got one with {odd[0]}: "
            f"leave {cache_name()} and cache_implementation out"
        )
    if cache.get_seq_length() == 0:
        cache.layers = [DynamicLayer() for _ in cache.layers]
    elif DynamicSlidingWindowLayer in kinds:
        raise QuickmergeError(f"{cache_name()} must hold every token, got one with sliding layers: use DynamicCache()")
    return cache


_PLAIN = {DynamicLayer, DynamicSlidingWindowLayer}


def check_target(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError unless ``model`` reads a tree as it reads text.

    Whether it does is tried out once for each model: two siblings are read in one pass, and the second one's logits
    must be those of reading it alone.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"speculative decoding needs a decoder with a language-model head, got a {name}")
    config = model.config.get_text_config(decoder=True)
    implementation = attention_implementation(config)
    if implementation.startswith(PREFIX):
        raise UnsupportedModelError(f"{name} is inside a quickmerge run, which reads no trees; leave that first")
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{name} runs attention as {implementation!r}, which does not take the mask of a tree: "
            f"set attn_implementation to one of {', '.join(IMPLEMENTATIONS)}"
        )
    for i in range(config.num_hidden_layers):
        layer_window(config, i)
    taken = inspect.signature(model.forward).parameters
    missing = [w for w in ("attention_mask", "position_ids") if w not in taken]
    missing += [] if takes_cache(model) else [cache_name()]
    if missing:
        raise UnsupportedModelError(f"{name} takes no {missing[0]}, which reading a tree needs")
    if model not in _PROVEN:
        _prove(model, config.vocab_size)
        _PROVEN.add(model)


@torch.no_grad()
def _prove(model: PreTrainedModel, vocabulary: int) -> None:
    text = (torch.arange(5, 12, device=model.device) % vocabulary)[None]
    a, b, c = 1 % vocabulary, 2 % vocabulary, 3 % vocabulary
    alone = torch.cat([text, text.new_tensor([[b, c]])], 1)
    name = type(model).__name__
    try:
        wanted = model(input_ids=alone, use_cache=False).logits[0, -1].float()
        cache = DynamicCache()
        model(input_ids=text[:, :-1], **cache_argument(model, cache), use_cache=True)
        width = text.shape[1] - 1
        if any(type(layer) is not DynamicLayer or layer.get_seq_length() != width for layer in cache.layers):
            raise UnsupportedModelError(f"{name} keeps no keys and values of every token, which reading a tree needs")
        place = torch.arange(width, device=text.device)[None]
        columns = Columns(place >= 0, place, text.new_tensor([width]), text.new_zeros(1), False)
        tree = pack([Tree([int(text[0, -1]), a, b, c], [0, 0, 0, 2], [1.0] * 4)], text.device)
        given = Target(model, cache, columns).read(tree)[0][0, -1].float()
    except UnsupportedModelError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise UnsupportedModelError(f"{name} can't read a tree with a mask of its own: {error}") from error
    # Rounding differs between the two ways, but what is read wrongly differs by about as much as logits do.
    scale = float((wanted - wanted.mean()).abs().mean())
    if not float((given - wanted).abs().mean()) <= 0.1 * scale:
        needed = "call eval() on it" if model.training else "it has to heed position_ids and a mask of four dimensions"
        raise UnsupportedModelError(
            f"{name} reads a tree otherwise than text, so speculation would change what it writes: {needed}"
        )
