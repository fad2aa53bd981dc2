"""``multipole``: let a model generate by multipole attention inside a ``with`` block, and leave it as it was."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from quickmerge.bench.harness import mark
from quickmerge.errors import QuickmergeError, UnsupportedModelError, near_match
from quickmerge.models.attachment import Attachment, PerThread, counts, refuse_tracing, stands_aside
from quickmerge.models.compat import (
    DynamicLayer,
    cache_argument,
    cache_name,
    cache_trait,
    device_of,
    given_cache,
    own_cache,
    without_cache,
)
from quickmerge.models.decoder import (
    AttentionFunction,
    Decoder,
    check_free,
    find_decoder,
    proportional_attention,
    watch,
)
from quickmerge.models.rotary import Rotary
from quickmerge.models.traits import FULL, BlockTraits
from quickmerge.models.vlm import check_kind, find_vlm_decoder, has_grid_places, holds_vlm, unwrapped
from quickmerge.multipole.attend import attend, attend_and_count
from quickmerge.multipole.cache import MultipoleCache, MultipoleLayer, Tally
from quickmerge.multipole.positions import Sizes, Space
from quickmerge.multipole.settings import Multipole, MultipoleStats
from quickmerge.multipole.upkeep import prepare, refresh

__all__ = ["MultipoleRun", "multipole"]

_PROVEN: WeakSet[nn.Module] = WeakSet()
"""Attention modules whose output was that of `attend` with a budget for every key."""


def multipole(model: PreTrainedModel, settings: Multipole | None = None, **options: Any) -> MultipoleRun:
    """Make new tokens read a long past by its clusters (arXiv 2506.13059) while the returned run is entered.

    A prompt is read by the model's own attention. In front of the first short forward after it, such as the first token
    that is generated, the keys of the cache are clustered, in every block with full attention; all other blocks stay
    what they are: sliding and chunked attention, linear attention, state spaces and convolutions.

    From then on each new token reads the most promising clusters exactly, the others by their centroids, and first and
    newest tokens exactly. New tokens join the clusters in groups.

    ``generate`` works in all its ways with a `DynamicCache`: batches, beams, sampling, assisted decoding. Together with
    `quickmerge.reduce` in prefix mode, in either order, slots count as often as the tokens that they stand for.

    There is no gradient through the centroids. A prompt has all of its gradients.

    Args:
        model: a causal LM with full attention in some block, found by structure (`quickmerge.models.traits`), or a
            vision-language model, see `quickmerge.models.vlm.find_vlm`; it may be wrapped as for `quickmerge.reduce`.
        settings: of the method. Default: ``Multipole()``.
        **options: settings by name, in place of those: ``multipole(model, budget=128)``.

    Returns:
        A `MultipoleRun`: enter it with ``with``, or call its ``attach()`` and later ``detach()``; afterwards ask it for
        its ``summary()``.

    Raises:
        UnsupportedModelError: for a model that can't be served, naming its class and the trait that is the reason.
        QuickmergeError: for a setting that there isn't; ValueError for one that is out of range.
    """
    model = unwrapped(model)
    if settings is not None and not isinstance(settings, Multipole):
        raise QuickmergeError(f"settings must be a Multipole such as Multipole(budget=128), got {settings!r}")
    allowed = [f.name for f in fields(Multipole)]
    for name in options:
        if name not in allowed:
            raise QuickmergeError(f"settings must be of {', '.join(allowed)}, got {name!r}{near_match(name, allowed)}")
    told = replace(settings or Multipole(), **options)
    check_kind(model, language=True)
    decoder = find_vlm_decoder(model) if holds_vlm(model) else find_decoder(model, shared=True)
    if told.space == "windowed" and holds_vlm(model) and has_grid_places(model):
        raise UnsupportedModelError(
            f"space must be 'rotated' for {type(model).__name__}, whose visual tokens have places in a grid"
        )
    own = own_cache(decoder.base)
    if own is not None:
        raise UnsupportedModelError(
            f"multipole attention can't be served for {type(model).__name__}, which keeps its past in a {own} of its "
            "own and in no DynamicCache"
        )
    check_free(model, decoder.attentions, MultipoleRun)
    return MultipoleRun(decoder, told).warn_if_unused("quickmerge.multipole")


class MultipoleRun(Attachment):
    """One attachment of multipole attention to a language model; see `multipole`.

    A run sees every forward of the model while it is attached. Several threads may use it at once, each with caches of
    its own; the summary is then of the thread that read last.
    """

    computes = True
    eager = True
    _held: PerThread[dict[int, MultipoleLayer]] = PerThread(dict)
    _short = PerThread(bool)
    _tree = PerThread(bool)
    _began: PerThread[Any] = PerThread(float)
    _sizes = PerThread(Sizes)
    _counts: PerThread[Tally | None] = PerThread(lambda: None)

    def __init__(self, decoder: Decoder, settings: Multipole) -> None:
        super().__init__(decoder.model)
        self.decoder, self.settings = decoder, settings
        full = [i for i, block in enumerate(decoder.traits) if _lacks(block) is None]
        if not full:
            raise UnsupportedModelError(_no_block(self._name, decoder))
        if settings.first > full[-1]:
            raise QuickmergeError(
                f"first must be at most {full[-1]}, the last block of {self._name} with full attention, "
                f"got {settings.first}"
            )
        self.blocks = tuple(i for i in full if i >= settings.first)
        """The blocks that read clusters."""
        makers = {block.entries: i for i, block in enumerate(decoder.traits) if i in self.blocks and not block.shares}
        self._makers = {i: makers[decoder.traits[i].entries] for i in self.blocks}
        """For each of them the block in whose cache layer its clusters are: itself, or the one it borrows from."""
        turned = settings.space == "windowed"
        self.spaces = {
            i: Space(_rotary_of(decoder, i) if turned else None, settings.query_position) for i in self.blocks
        }
        self._last = self._new_tally()
        self._signature = inspect.signature(decoder.base.forward)

    def _new_tally(self) -> Tally:
        return Tally(self.settings, len(self.blocks), len(self.decoder))

    @property
    def tally(self) -> Tally:
        """What is counted of this thread's last prompt; of the last one of all, if this thread has read none."""
        return self._last if self._counts is None else self._counts

    def _attach(self) -> None:
        self._undo.append(watch(self.decoder, self))
        base = self.decoder.base
        self._note(base.register_forward_pre_hook(self._before_model, with_kwargs=True))
        self._note(base.register_forward_hook(self._after_model, with_kwargs=True))

    # Around the decoder ------------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if stands_aside():
            return None
        inputs = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        inputs.update(inputs.pop("kwargs", {}))
        refuse_tracing(self._name)
        mask = inputs.get("attention_mask")
        base, cache, wanted = self.decoder.base, given_cache(inputs), inputs.get("use_cache")
        recomputes = base.training and any(getattr(b, "gradient_checkpointing", False) for b in self.decoder.layers)
        if cache is None and not recomputes and (self.decoder.config.use_cache if wanted is None else wanted):
            cache = MultipoleCache(self.decoder.config)
            inputs = {**without_cache(inputs), **cache_argument(base, cache)}
        self._held, self._sizes = {} if cache is None else self._adopt(cache), Sizes()
        ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        filled = any(held.get_seq_length() for held in self._held.values())
        self._short = filled and ids.shape[1] <= self.settings.queries
        # Behind a prompt a mask of four dimensions, or one for each type of block, says that a tree of drafts is read.
        self._tree = filled and (isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.ndim == 4))
        if mask is not None and not self._tree and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise QuickmergeError("attention_mask must be a 2-D padding mask inside a quickmerge run, got another kind")
        if not self._short:
            for held in self._held.values():
                held.stale = True
        if not filled:
            self._counts = self._new_tally()
        self._last = self.tally
        self._began = self.clock()
        return (), inputs

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if stands_aside() or not counts():
            return
        self.tally.forward(self.clock() - self._began, self._short, list(self._held.values()))

    def _adopt(self, cache: Cache) -> dict[int, MultipoleLayer]:
        """The layers of the cache that hold clusters, by block; those of an empty cache are made such."""
        if not isinstance(cache, DynamicCache) or cache.offloading:
            raise QuickmergeError(
                f"{cache_name()} must be a DynamicCache that stays on its device, got {cache_trait(cache)}"
            )
        while len(cache.layers) < len(self.decoder) and cache.layer_class_to_replicate is DynamicLayer:
            cache.layers.append(DynamicLayer())
        held: dict[int, MultipoleLayer] = {}
        for block in sorted(set(self._makers.values())):
            layer = cache.layers[self.decoder.attention_in(block).layer_idx]
            if type(layer) is DynamicLayer and layer.get_seq_length() == 0:
                layer = MultipoleLayer()
            if type(layer) is DynamicLayer:
                raise QuickmergeError(
                    f"{cache_name()} was filled outside this run; start it with an empty cache, or fill a "
                    "quickmerge.MultipoleCache"
                )
            if not isinstance(layer, MultipoleLayer):
                raise QuickmergeError(
                    f"{cache_name()} must be a DynamicCache with plain layers for multipole attention, got one of "
                    f"type {type(layer).__name__} for block {block}"
                )
            layer.reading = self.settings
            held[block] = layer
        for place, layer in enumerate(held.values()):
            layer.place = (place, len(held))
        for block, layer in held.items():
            cache.layers[self.decoder.attention_in(block).layer_idx] = layer
        return held

    # In place of the attention -----------------------------------------------------------------------------------

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Attention of one block; ``key_size (B, n)`` among ``kwargs`` are the tokens that each key stands for."""
        key_size = kwargs.pop("key_size", None)
        held = self._held.get(self._makers.get(layer, -1))
        if held is not None:
            block = self.decoder.traits[layer]
            _check_extras(kwargs, block)
            if not block.shares:
                self.spaces[layer].note(held, kwargs.get("position_ids"))
            query, key, value = args[:3]
            mask = args[3] if len(args) > 3 else kwargs.get("attention_mask")
            if not self._short:
                held.first = self._sizes.first(mask, key)
            else:
                tree = self._tree and mask is not None
                see = self._sizes.behind(mask, query.shape[2]) if tree else None
                size = self._sizes.of(mask, key_size, key)
                # As precise as without autocast, as everywhere.
                with torch.autocast(query.device.type, enabled=False):
                    out = self._read(layer, query, key, value, size, see, kwargs)
                if out is not None:
                    if key_size is None and module not in _PROVEN:
                        with torch.no_grad():
                            wanted = call(module, *args, **kwargs)[0]
                        clusters = self._held[self._makers[layer]].clusters
                        self._prove(layer, module, query, key, value, size, see, kwargs, clusters, wanted)
                    return out, None
        if key_size is None:
            result = call(module, *args, **kwargs)
        else:
            result = proportional_attention(call, module, args, kwargs, key_size)
        if held is not None and not self._short and self.settings.ahead:
            size = self._sizes.of(mask, key_size, key)
            self._prepare(layer, module, query, key, value, size, kwargs, result[0] if key_size is None else None)
        return result

    def _prepare(
        self,
        layer: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        size: Tensor | None,
        kwargs: dict[str, Any],
        out: Tensor | None,
    ) -> None:
        """Cluster a prompt that was read, ahead of the first token that reads its clusters.

        ``out (B, q, Hq, D)`` is what the model's own attention made of it; None if it was asked for something else.
        """
        if torch.is_grad_enabled() and (key.requires_grad or query.requires_grad):
            return  # somebody trains on it, and will read no further
        held, space = self._held[self._makers[layer]], self.spaces[self._makers[layer]]
        began = self.clock()
        with torch.autocast(query.device.type, enabled=False):
            prepare(held, query.shape[2], size, self.settings, space.keys(held, key), value)
            made = held.ahead.made
            self.tally.prepared(held, self.clock() - began, anew=held.clusters is None)
            if made is not None and out is not None and module not in _PROVEN:
                self._prove(layer, module, query[:, :, -1:], key, value, size, None, kwargs, made.clusters, out[:, -1:])

    def _read(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        size: Tensor | None,
        see: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Attention by clusters ``(B, q, Hq, D)``; None where there are too few tokens for any."""
        held, space = self._held[self._makers[layer]], self.spaces[self._makers[layer]]
        before, new, began = held.clusters, query.shape[2], self.clock()
        refresh(held, new, size, self.settings, space.keys(held, key), value)
        if held.clusters is not before or held.ahead.worked:
            self.tally.clustered(held, before, self.clock() - began)
        if held.clusters is None:
            if counts():
                self.tally.read(held, new, None, 0.0)
            return None
        began = time.perf_counter()
        out, kept = attend_and_count(
            query, key, value, size, held.clusters, self.settings,
            query_for_centroids=space.query(held, query), coarse=held.coarse, see=see, **_softmax(kwargs),
        )  # fmt: skip
        if counts():
            self.tally.read(held, new, kept, time.perf_counter() - began)
        return out

    @torch.no_grad()
    def _prove(
        self,
        layer: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        size: Tensor | None,
        see: Tensor | None,
        kwargs: dict[str, Any],
        clusters: Any,
        wanted: Tensor,
    ) -> None:
        """With a budget for every key it must be ``wanted``, the model's own attention; tried out once for each module.

        Raises:
            UnsupportedModelError: it isn't, so the block computes something that nobody said.
        """
        everything = replace(self.settings, select="budget", budget=clusters.width, coarse=None)
        with torch.autocast(query.device.type, enabled=False):
            found = attend(query, key, value, size, clusters, everything, see=see, **_softmax(kwargs))
        if not bool(torch.isfinite(wanted).all()):
            return  # the model itself is lost here, and there is nothing to compare with
        # Rounding differs between the two ways, but what is computed otherwise differs by about as much as values do.
        if not float((found - wanted).abs().mean()) <= 0.1 * float(wanted.abs().mean()):
            raise UnsupportedModelError(
                f"multipole attention can't be served for {self._name}, whose block {layer} "
                f"({self.decoder.traits[layer].declared}) computes another attention than softmax over scaled products"
            )
        _PROVEN.add(module)

    # ------------------------------------------------------------------------------------------------------------

    def clock(self) -> Any:
        """A reading of the clock, which waits for nothing: see `quickmerge.bench.harness.mark`."""
        return mark(device_of(self.decoder.base))

    def summary(self) -> MultipoleStats:
        """Clusters, rows read, seconds and bytes of the last prompt and what came after; prints as a few lines."""
        return self._last.stats()


def _rotary_of(decoder: Decoder, layer: int) -> Rotary:
    if decoder.traits[layer].latent:
        raise UnsupportedModelError(
            f"space must be 'rotated' for {type(decoder.base).__name__}, whose keys are rotated in a part that is made "
            "of one latent vector with the rest"
        )
    return Rotary.of(decoder.base, decoder.attention_in(layer), layer, wanted="space must be 'rotated'")


def _lacks(block: BlockTraits) -> str | None:
    """The trait of a block for which it reads no clusters, in words that go behind "has"; None if it does."""
    if block.attention is None:
        return f"{block.memory} in place of attention" if block.memory else "no attention"
    if block.attention != FULL:
        return f"{block.attention} attention"
    if not block.registered:
        return "attention that asks no function of transformers' registry"
    if block.positions == "bias":
        return "position biases on its attention logits, which centroids have none of"
    if block.memory is not None:
        return f"{block.memory} beside its attention, in one layer of the cache"
    if block.tied:
        return "an attention module that other blocks run, too"
    return None


def _no_block(name: str, decoder: Decoder) -> str:
    """Why no block of a model reads clusters."""
    why = [_lacks(block) for block in decoder.traits]
    # What keeps a block with full attention from it is the better reason.
    first = next((i for i, block in enumerate(decoder.traits) if block.attention == FULL), 0)
    others = sorted({str(each) for each in why} - {str(why[first])})
    return (
        f"multipole attention can't be served for {name}, which needs full attention in some block: block {first} "
        f"({decoder.traits[first].declared}) has {'; others have '.join([str(why[first]), *others])}"
    )


def _softmax(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a model tells its attention function of the softmax."""
    return {"scaling": kwargs.get("scaling"), "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}


def _check_extras(kwargs: dict[str, Any], block: BlockTraits) -> None:
    """Raise if the model asks of its attention what clusters can't give, or what its blocks don't do themselves."""
    own = {"softcap": block.softcap is not None, "s_aux": block.sinks, "position_bias": False}
    wrong = {name: kwargs[name] for name, does in own.items() if not does and kwargs.get(name) is not None}
    wrong |= {name: kwargs[name] for name in ("dropout", "output_attentions") if kwargs.get(name)}
    if kwargs.get("is_causal") is False:
        wrong["is_causal"] = False
    for name, value in wrong.items():
        what = f"{value!r}" if isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"
        raise QuickmergeError(f"{name} must be left out of attention for multipole attention, got {what}")
