"""What a run did: tokens per layer, seconds, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import Cache


@dataclass
class RunStats:
    """Counts of the last prompt and of everything generated since.

    ``tokens_per_layer`` is the mean over the batch's rows of the valid tokens each block read in the prefill;
    ``prefill_seconds`` is the decoder's forward over the prompt with the reducer inside, ``reducer_seconds`` the
    reducer alone (saliency, plan and merge). ``cache_bytes`` are measured on the cache as it is now and
    ``prompt_cache_bytes`` as it was after the prompt; ``..._full`` is what it would hold unreduced. ``reducer_bytes``
    is the memory of what a trained method has learned. ``rows_short`` rows had fewer than ``min_tokens`` tokens and
    ``rows_protected`` others none that was not protected, so that they were not reduced.
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

    @property
    def tokens_kept(self) -> float:
        """Mean tokens per block over the blocks above the first merge, or ``tokens_in`` if nothing was merged."""
        above = [n for n in self.tokens_per_layer if n < self.tokens_in]
        return sum(above) / len(above) if above else self.tokens_in

    @property
    def decode_seconds_per_token(self) -> float:
        """Seconds of the decoder per generated step after the first token."""
        return self.decode_seconds / self.decode_steps if self.decode_steps else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        out = dict(self.__dict__)
        out["tokens_kept"] = self.tokens_kept
        out["decode_seconds_per_token"] = self.decode_seconds_per_token
        return out

    def __str__(self) -> str:
        if not self.tokens_per_layer:
            return f"{self.reducer} ({self.mode}): nothing has been read yet"
        runs = layer_runs(self.tokens_per_layer)
        layers = ", ".join(f"{n:g} in layers {a}-{b}" if a != b else f"{n:g} in layer {a}" for a, b, n in runs)
        ratio = self.cache_bytes / self.cache_bytes_full if self.cache_bytes_full else 1.0
        held, full = self.cache_bytes / 2**20, self.cache_bytes_full / 2**20
        own = f", and {self.reducer_bytes / 2**20:.2f} MiB of the reducer's weights" if self.reducer_bytes else ""
        whole = [f"{self.rows_short} of {self.rows} rows below min_tokens={self.min_tokens}"] * bool(self.rows_short)
        whole += [f"{self.rows_protected} of {self.rows} rows of protected tokens alone"] * bool(self.rows_protected)
        return (
            f"{self.reducer} ({self.mode}), {self.rows} row(s), {self.tokens_in:g} tokens in\n"
            + (f"  not reduced: {', '.join(whole)}\n" if whole else "")
            + f"  read:    {layers}\n"
            f"  prefill: {self.prefill_seconds:.3f} s, of which the reducer {self.reducer_seconds:.3f} s\n"
            f"  decode:  {self.decode_steps} steps, {1e3 * self.decode_seconds_per_token:.1f} ms each\n"
            f"  cache:   {held:.2f} MiB, {100 * ratio:.0f} % of {full:.2f} MiB{own}"
        )


@dataclass
class VisualStats(RunStats):
    """The same of a model that reads pictures, with its visual tokens counted, mean over rows, before and after.

    ``images`` is how many pictures and videos the prompt held (tiles, where a model cuts pictures up beforehand), 0
    where nobody told them apart.
    ``tower_seconds`` is the vision tower, measuring inside; ``reducer_seconds`` counts the measuring too.
    """

    images: int = 0
    visual_in: float = 0.0
    visual_kept: float = 0.0
    tower_seconds: float = 0.0

    def __str__(self) -> str:
        if not self.tokens_per_layer:
            return super().__str__()
        first, *rest = super().__str__().split("\n")
        of = f" of {self.images} picture(s)" if self.images else ""
        seen = f"  visual:  {self.visual_in:g} tokens{of}, {self.visual_kept:g} kept"
        return "\n".join([first, seen, *rest[:1], f"  tower:   {self.tower_seconds:.3f} s", *rest[1:]])


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
        runs = layer_runs(self.tokens_per_block)
        left = ", ".join(f"{n:g} after blocks {a}-{b}" if a != b else f"{n:g} after block {a}" for a, b, n in runs)
        share = self.tokens_kept / self.tokens_in
        return (
            f"{self.reducer}, {self.tokens_in} tokens in\n  left: {left}\n  mean: {self.tokens_kept:.1f}, {share:.0%}"
        )


def layer_runs(counts: Sequence[float]) -> list[tuple[int, int, float]]:
    """Neighbouring layers with the same count as ``(first, last, count)``."""
    out: list[tuple[int, int, float]] = []
    for i, n in enumerate(counts):
        out[-1:] = [(out[-1][0], i, n)] if out and out[-1][2] == n else [*out[-1:], (i, i, n)]
    return out


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values that a cache holds."""
    total = 0
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            if tensor is not None:
                total += tensor.numel() * tensor.element_size()
    return total


def cache_bytes_full(cache: Cache, tokens: int, windows: tuple[int | None, ...]) -> int:
    """Bytes the same cache would hold with every one of ``tokens`` tokens in every layer (windows respected)."""
    total = 0
    for layer, window in zip(cache.layers, windows, strict=False):
        for tensor in (layer.keys, layer.values):
            if tensor is not None and tensor.ndim == 4 and tensor.shape[2]:
                held = tokens if window is None else min(tokens, window - 1)
                total += tensor.numel() // tensor.shape[2] * held * tensor.element_size()
    return total
