"""What a run of a language model is: hooks that it loses again, what it counted, and a run that only observes."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from quickmerge.bench.harness import mark, settled
from quickmerge.merge.cache.packed import column_bytes, packed_bytes
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.reducers.baselines import Uniform
from quickmerge.models.attachment import Attachment, PerThread, counts, refuse_tracing, stands_aside
from quickmerge.models.compat import CacheLayerMixin, device_of, given_cache, returned_cache, without_cache
from quickmerge.models.decoder import AttentionFunction, Decoder, find_decoder, watch
from quickmerge.models.vlm import Vlm, find_vlm, holds_vlm, unwrapped


@dataclass
class RunStats:
    """Counts of the last prompt and of everything generated since.

    ``tokens_per_layer`` is the mean over the batch's rows of the valid tokens each block read in the prefill;
    ``prefill_seconds`` is the decoder's forward over the prompt with the reducer inside, ``reducer_seconds`` the
    reducer alone: saliency, plan and merge, scores of a cache and what leaves it. ``cache_bytes`` are measured on the
    cache as it is now and ``prompt_cache_bytes`` as it was after the prompt; ``..._full`` is what it would hold
    unreduced. ``reducer_bytes`` is the memory of what a trained method has learned. ``rows_short`` rows had fewer than
    ``min_tokens`` tokens and ``rows_protected`` others none that was not protected, so that they were not reduced.
    ``evictor`` is what makes the cache smaller when the prompt has been read, if anything does; ``evicted_none`` rows
    had fewer tokens than its ``min_tokens``, so that they keep all.
    ``spans`` is what was kept or merged as a whole, ``"line"`` or ``"word"``, or why nothing was; empty where no method
    asked. ``entries`` holds for each layer ``(B,)`` how many entries of its prompt each row has in the cache, on the
    device, since nobody waits for it until `entries_by_row` is asked; `as_dict` leaves it out.
    ``literals`` is how many tokens of a row were of literals that stay alone, the mean over rows; None where
    nobody asked for them.
    """

    mode: str = "prefix"
    reducer: str = ""
    rows: int = 0
    tokens_in: float = 0.0
    tokens_per_layer: list[float] = field(default_factory=list)
    prefill_seconds: float = 0.0
    reducer_seconds: float = 0.0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    prompt_cache_bytes: int = 0
    prompt_cache_bytes_full: int = 0
    cache_bytes: int = 0
    cache_bytes_full: int = 0
    reducer_bytes: int = 0
    min_tokens: int = 0
    rows_short: int = 0
    rows_protected: int = 0
    spans: str = ""
    evictor: str = ""
    evicted_none: int = 0
    entries: list[Tensor] = field(default_factory=list, repr=False, compare=False)
    literals: float | None = None

    @property
    def entries_by_row(self) -> list[float]:
        """For each row the entries of its prompt in the cache, mean over layers and their heads; empty if uncounted."""
        # Layers may lie on several devices.
        found: list[float] = torch.stack([x.cpu() for x in self.entries]).mean(0).tolist() if self.entries else []
        return found

    @property
    def tokens_kept(self) -> float:
        """Mean tokens per block over the blocks above the first merge, or ``tokens_in`` if nothing was merged."""
        above = [n for n in self.tokens_per_layer if n < self.tokens_in]
        return sum(above) / len(above) if above else self.tokens_in

    @property
    def decode_seconds_per_token(self) -> float:
        """Seconds of the decoder per generated step after the first token."""
        return float(self.decode_seconds) / self.decode_steps if self.decode_steps else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        out = {name: value for name, value in settled(self).__dict__.items() if name != "entries"}
        out["tokens_kept"] = self.tokens_kept
        out["decode_seconds_per_token"] = self.decode_seconds_per_token
        return out

    def _literals(self) -> str:
        """A line on what stays alone for being of a literal, on top of what a budget keeps; nothing if none does."""
        if self.literals is None:
            return ""
        others = self.tokens_kept - self.literals
        line = f"  literals: {self.literals:g} tokens stay alone on top of keep, " \
               f"{100 * self.literals / max(1.0, self.tokens_in):.0f} % of all"  # fmt: skip
        above = self.tokens_kept < self.tokens_in and self.literals > others
        return f"\n{line}; more than the {others:.0f} that are kept of the others" if above else f"\n{line}"

    def __str__(self) -> str:
        settled(self)
        if not self.tokens_per_layer:
            return f"{self.reducer} ({self.mode}): nothing has been read yet"
        runs = layer_runs(self.tokens_per_layer)
        layers = ", ".join(f"{n:g} in layers {a}-{b}" if a != b else f"{n:g} in layer {a}" for a, b, n in runs)
        ratio = self.cache_bytes / self.cache_bytes_full if self.cache_bytes_full else 1.0
        held, full = self.cache_bytes / 2**20, self.cache_bytes_full / 2**20
        own = f", and {self.reducer_bytes / 2**20:.2f} MiB of the reducer's weights" if self.reducer_bytes else ""
        whole = [f"{self.rows_short} of {self.rows} rows below min_tokens={self.min_tokens}"] * bool(self.rows_short)
        asked = f"\n  spans:   {self.spans}" if self.spans.startswith("none") else ""
        few = f"; {self.evicted_none} of {self.rows} rows are below its min_tokens and keep all"
        kept = few if self.evicted_none else ""
        whole += [f"{self.rows_protected} of {self.rows} rows of protected tokens alone"] * bool(self.rows_protected)
        return (
            f"{self.reducer} ({self.mode}), {self.rows} row(s), {self.tokens_in:g} tokens in\n"
            + (f"  not reduced: {', '.join(whole)}\n" if whole else "")
            + f"  read:    {layers}\n"
            f"  prefill: {self.prefill_seconds:.3f} s, of which the reducer {self.reducer_seconds:.3f} s\n"
            f"  decode:  {self.decode_steps} steps, {1e3 * self.decode_seconds_per_token:.1f} ms each\n"
            f"  cache:   {held:.2f} MiB, {100 * ratio:.0f} % of {full:.2f} MiB{own}"
            + (f"\n  evicted: {self.evictor}{kept}" if self.evictor else "")
            + self._literals()
            + asked
        )


@dataclass
class VisualStats(RunStats):
    """The same of a model that reads images, with its visual tokens counted, mean over rows, before and after.

    ``images`` is how many images and videos the prompt held (tiles, where a model cuts images up beforehand), 0
    where nobody told them apart.
    ``tower_tokens`` is how many tokens of an image, or of a crop of one, are left after each block of the vision tower,
    where they are merged there. ``tower_seconds`` is the vision tower, measuring inside; ``reducer_seconds`` counts the
    measuring too.
    """

    images: int = 0
    visual_in: float = 0.0
    visual_kept: float = 0.0
    tower_tokens: list[float] = field(default_factory=list)
    tower_seconds: float = 0.0

    def __str__(self) -> str:
        if not self.tokens_per_layer:
            return super().__str__()
        first, *rest = super().__str__().split("\n")
        of = f" of {self.images} image(s)" if self.images else ""
        seen = f"  visual:  {self.visual_in:g} tokens{of}, {self.visual_kept:g} kept"
        tower = f"  tower:   {self.tower_seconds:.3f} s"
        if self.tower_tokens:
            tower += f", {left_after(self.tower_tokens)}"
        return "\n".join([first, seen, *rest[:1], tower, *rest[1:]])


@dataclass
class VisionStats:
    """What a vision transformer read in its last forward.

    ``grid (T, H, W)`` patches and ``prefix`` other tokens make ``tokens_in``; ``tokens_per_block`` is how many are left
    when each block's feed-forward part begins.
    """

    reducer: str
    grid: tuple[int, int, int] = (0, 0, 0)
    tokens_in: int = 0
    prefix: int = 0
    tokens_per_block: list[float] = field(default_factory=list)

    @property
    def tokens_kept(self) -> float:
        """Mean over all blocks."""
        return sum(self.tokens_per_block) / len(self.tokens_per_block) if self.tokens_per_block else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**self.__dict__, "grid": list(self.grid), "tokens_kept": self.tokens_kept}

    def __str__(self) -> str:
        if not self.tokens_per_block:
            return f"{self.reducer}: nothing has been read yet"
        left = left_after(self.tokens_per_block)
        share = self.tokens_kept / self.tokens_in
        return (
            f"{self.reducer}, {self.tokens_in} tokens in\n  left: {left}\n  mean: {self.tokens_kept:.1f}, {share:.0%}"
        )


def left_after(counts: Sequence[float]) -> str:
    """How many tokens are left after which blocks of a vision transformer, in words."""
    runs = layer_runs(counts)
    return ", ".join(f"{n:g} after blocks {a}-{b}" if a != b else f"{n:g} after block {a}" for a, b, n in runs)


def layer_runs(counts: Sequence[float]) -> list[tuple[int, int, float]]:
    """Neighbouring layers with the same count as ``(first, last, count)``."""
    out: list[tuple[int, int, float]] = []
    for i, n in enumerate(counts):
        out[-1:] = [(out[-1][0], i, n)] if out and out[-1][2] == n else [*out[-1:], (i, i, n)]
    return out


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values that a cache holds, and of what it has to know of each entry of a head."""
    total = 0
    for layer in cache.layers:
        total += memory_bytes(layer)
        if not isinstance(layer, CacheLayerMixin):
            continue
        total += getattr(getattr(layer, "heads", None), "bytes", 0)
        if packed_bytes(layer):
            total += packed_bytes(layer)
            continue
        for tensor in (layer.keys, layer.values):
            if tensor is not None:
                total += tensor.numel() * tensor.element_size()
    return total


def memory_bytes(layer: Any) -> int:
    """Bytes of what a layer of a cache holds of fixed size, however many tokens were read into it."""
    held = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return sum(state.numel() * state.element_size() for state in held if isinstance(state, Tensor))


def cache_bytes_full(cache: Cache, tokens: int, windows: tuple[int | None, ...]) -> int:
    """Bytes the same cache would hold with every one of ``tokens`` tokens in every layer.

    Of layers that keep to a sliding window it is what the window holds; others hold everything.
    """
    total = 0
    for layer, window in zip(cache.layers, windows, strict=False):
        total += memory_bytes(layer)
        if not isinstance(layer, CacheLayerMixin):
            continue
        limit = window if getattr(layer, "is_sliding", False) else None
        total += column_bytes(layer) * (tokens if limit is None else min(tokens, limit - 1))
    return total


# What a run of either mode is: hooks on a language model that it loses again, and what they counted.


class Run(Attachment):
    """One attachment of a reducer to a language model.

    A run sees every forward of the model while it is attached. Several threads may use it at once, each with caches of
    its own.
    """

    mode: str
    watches_attention = True
    eager = True
    _fresh = PerThread(bool)
    _began: PerThread[Any] = PerThread(float)
    _cache: PerThread[Cache | None] = PerThread(lambda: None)
    _counts: PerThread[RunStats | None] = PerThread(lambda: None)

    def __init__(self, decoder: Decoder, reducer: Reducer) -> None:
        super().__init__(decoder.model)
        self.decoder = decoder
        self.reducer = reducer.on(device_of(decoder.base))
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

    def entries(self, cache: Cache | None) -> list[Tensor]:
        """For each layer ``(B,)`` the entries of the prompt just read in ``cache``; empty if nobody counts them."""
        return []

    def tokens_read(self, cache: Cache) -> int:
        """How many tokens the cache would hold in every layer if none had been merged."""
        return int(cache.get_seq_length())

    def _block_hook(self, index: int) -> Callable[..., Any] | None:
        """A forward pre-hook for block ``index``, or None."""
        return None

    # ------------------------------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if stands_aside():
            return None
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
        if stands_aside():
            return
        seconds = self.clock() - self._began
        self._cache = returned_cache(output)
        if self._fresh:
            self.stats.prefill_seconds = seconds
            self.stats.tokens_per_layer = self.tokens_per_layer()
            self.stats.entries = self.entries(self._cache)
        elif counts():
            self.stats.decode_steps += 1
            self.stats.decode_seconds += seconds
        if self._cache is not None:
            tokens = self.tokens_read(self._cache)
            self.stats.cache_bytes = cache_bytes(self._cache)
            self.stats.cache_bytes_full = cache_bytes_full(self._cache, tokens, self.decoder.windows)
            if self._fresh:
                self.stats.prompt_cache_bytes = self.stats.cache_bytes
                self.stats.prompt_cache_bytes_full = self.stats.cache_bytes_full

    def clock(self) -> Any:
        """A reading of the clock, which waits for nothing: see `quickmerge.bench.harness.mark`."""
        return mark(device_of(self.decoder.base))

    def summary(self) -> RunStats:
        """Tokens in and kept per layer, seconds and cache bytes of the last prompt; prints as a few lines.

        On a GPU this waits for what it was given to do; nothing before does, for the sake of numbers.
        """
        return settled(self._last)  # type: ignore[no-any-return]


# Measuring an unmodified model, with the instruments that measure a reduced one.


class ObserveRun(Run):
    """A run that changes nothing: attention and blocks are not even looked at, only the decoder's calls are timed."""

    mode = "none"
    watches_attention = False
    eager = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.vlm: Vlm | None = find_vlm(model) if holds_vlm(model) else None
        self._tower_seconds = self._tower_began = 0.0
        self._ids: Tensor | None = None
        super().__init__(find_decoder(model) if self.vlm is None else self.vlm.decoder, Uniform(keep=1.0))

    def _stats(self) -> RunStats:
        kind = RunStats if self.vlm is None else VisualStats
        return kind(mode=self.mode, reducer="none")

    def _attach(self) -> None:
        super()._attach()
        if self.vlm is not None:
            self._note(self.vlm.tower.register_forward_pre_hook(self._before_tower))
            self._note(self.vlm.tower.register_forward_hook(self._after_tower))
            self._note(self.vlm.base.register_forward_pre_hook(self._before_base, with_kwargs=True))

    def _before_tower(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._tower_began = self.clock()

    def _after_tower(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._tower_seconds += self.clock() - self._tower_began

    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = args[0] if args else kwargs.get("input_ids")

    def begin(self, prompt: bool, inputs: dict[str, Any]) -> dict[str, Any]:
        """Count the tokens of a prompt."""
        if prompt:
            ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            mask = inputs.get("attention_mask")
            counts = float(ids.shape[1]) if mask is None else float(mask.sum(-1).float().mean())
            self.stats.rows, self.stats.tokens_in = ids.shape[0], counts
            if self.vlm is not None and isinstance(self.stats, VisualStats):
                kinds = [token for kind in ("image", "video") if (token := self.vlm.token(kind)) is not None]
                visual = 0 if self._ids is None else sum(int((self._ids == token).sum()) for token in kinds)
                self.stats.visual_in = self.stats.visual_kept = visual / len(ids)
                self.stats.tower_seconds, self._tower_seconds = self._tower_seconds, 0.0
        return {}

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Never called."""
        return call(module, *args, **kwargs)

    def _block_hook(self, index: int) -> Callable[..., Any] | None:
        return None

    def tokens_per_layer(self) -> list[float]:
        """Every block reads every token."""
        return [self.stats.tokens_in] * len(self.decoder)

    def forget(self) -> None:
        """Drop the ids of the last prompt; nothing else is kept."""
        self._ids = None


def observe(model: PreTrainedModel) -> ObserveRun:
    """Time an unmodified model: ``with observe(model) as run: model.generate(...)`` and then ``run.summary()``.

    Raises:
        UnsupportedModelError: for a model that could not be reduced either.
    """
    return ObserveRun(unwrapped(model))
