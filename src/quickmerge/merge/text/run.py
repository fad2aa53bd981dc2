"""What a run of either mode is: hooks on a language model that it loses again, and what they counted."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Cache

from quickmerge.bench.harness import now
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.summary import RunStats, cache_bytes, cache_bytes_full
from quickmerge.models.attachment import Attachment, PerThread, refuse_tracing
from quickmerge.models.compat import given_cache, returned_cache, without_cache
from quickmerge.models.decoder import AttentionFunction, Decoder, watch


class Run(Attachment):
    """One attachment of a reducer to a language model.

    A run sees every forward of the model while it is attached. Several threads may use it at once, each with caches of
    its own.
    """

    mode: str
    watches_attention = True
    eager = True
    _fresh = PerThread(bool)
    _began = PerThread(float)
    _cache: PerThread[Cache | None] = PerThread(lambda: None)
    _counts: PerThread[RunStats | None] = PerThread(lambda: None)

    def __init__(self, decoder: Decoder, reducer: Reducer) -> None:
        super().__init__(decoder.model)
        self.decoder = decoder
        self.reducer = reducer.on(next(decoder.base.parameters()).device)
        self._last = self._stats()
        self._signature = inspect.signature(decoder.base.forward)

    def _stats(self) -> RunStats:
        return RunStats(mode=self.mode, reducer=repr(self.reducer), reducer_bytes=self.reducer.weights_bytes)

    @property
    def stats(self) -> Any:
        """What is counted of this thread's last prompt; of the last one of all, if this thread has read none."""
        return self._last if self._counts is None else self._counts

    def _attach(self) -> None:
        if self.watches_attention:
            self._undo.append(watch(self.decoder, self))
        base = self.decoder.base
        self._note(base.register_forward_pre_hook(self._before_model, with_kwargs=True))
        self._note(base.register_forward_hook(self._after_model, with_kwargs=True))
        for index, block in enumerate(self.decoder.layers):
            hook = self._block_hook(index)
            if hook is not None:
                self._note(block.register_forward_pre_hook(hook, with_kwargs=True))

    def _detach(self) -> None:
        super()._detach()
        self.forget()

    # What a mode implements -------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, prompt: bool, inputs: dict[str, Any]) -> dict[str, Any]:
        """Called before the decoder; ``inputs`` are its arguments by name. Returns the arguments to change."""

    @abstractmethod
    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Called for every attention; see `quickmerge.models.decoder.Watcher`."""

    @abstractmethod
    def tokens_per_layer(self) -> list[float]:
        """Mean valid tokens that each block holds of the prompt just read."""

    @abstractmethod
    def forget(self) -> None:
        """Drop everything that refers to a prompt."""

    def tokens_read(self, cache: Cache) -> int:
        """How many tokens the cache would hold in every layer if none had been merged."""
        return int(cache.get_seq_length())

    def _block_hook(self, index: int) -> Callable[..., Any] | None:
        """A forward pre-hook for block ``index``, or None."""
        return None

    # ------------------------------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        inputs.update(inputs.pop("kwargs", {}))
        if self.watches_attention:
            refuse_tracing(self._name)
        cache = given_cache(inputs)
        self._fresh = cache is None or cache.get_seq_length() == 0
        if self._fresh:
            self._counts = self._stats()
        self._last = self.stats
        self._began = self.clock()
        changed = self.begin(self._fresh, inputs)
        if given_cache(changed) is not None:
            inputs = without_cache(inputs)
        return (), {**inputs, **changed}

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seconds = self.clock() - self._began
        self._cache = returned_cache(output)
        if self._fresh:
            self.stats.prefill_seconds = seconds
            self.stats.tokens_per_layer = self.tokens_per_layer()
        else:
            self.stats.decode_steps += 1
            self.stats.decode_seconds += seconds
        if self._cache is not None:
            tokens = self.tokens_read(self._cache)
            self.stats.cache_bytes = cache_bytes(self._cache)
            self.stats.cache_bytes_full = cache_bytes_full(self._cache, tokens, self.decoder.windows)
            if self._fresh:
                self.stats.prompt_cache_bytes = self.stats.cache_bytes
                self.stats.prompt_cache_bytes_full = self.stats.cache_bytes_full

    def clock(self) -> float:
        """Seconds, after the device has finished what it was given."""
        device: Any = self.decoder.base.device
        return now(device)

    def summary(self) -> RunStats:
        """Tokens in and kept per layer, seconds and cache bytes of the last prompt; prints as a few lines."""
        return self._last
