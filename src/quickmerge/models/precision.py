"""In which numbers a model computes: ``dtype="auto"`` measures what this machine multiplies faster, ``"int8"`` packs.

A decoding step reads every weight once, so half of the bytes may take half of the time; whether they do depends on the
machine: on one without instructions for bfloat16 each number is turned into float32 first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.quantized import packed

__all__ = ["Chosen", "Matrix", "choose", "dtype_name", "matrices"]

ROWS = (1, 2, 3, 4, 32)
"""Tokens of a pass that are timed: a plain decoding step, small drafts, and a piece of a prompt."""
PAYS = 1.1
"""From so many times the speed of float32 on bfloat16 is faster: less may be noise."""
POOL = 20 * 2**20
"""Weights that are timed at most. They are more than a cache holds, so that a step fetches them, as a model's does."""
SECONDS = 1.5
"""The measurement begins no further round after so long; a round takes a fraction of it."""
ROUNDS = 9

_KNOWN: dict[tuple[object, ...], Chosen] = {}


@dataclass(frozen=True)
class Matrix:
    """A matrix of a model, ``(out, into)``, of which there are ``count``."""

    out: int
    into: int
    count: int = 1


@dataclass(frozen=True)
class Chosen:
    """What ``dtype="auto"`` chose, and by what; prints as a sentence.

    Attributes:
        dtype: ``"bfloat16"`` or ``"float32"``.
        reason: why, where nothing had to be measured; else empty.
        float32: seconds of all matrix products of a pass over 1, 2, 3, 4 and 32 tokens, by their number.
        bfloat16: the same in bfloat16.
        threads: of the CPU.
    """

    dtype: str
    reason: str = ""
    float32: Mapping[int, float] = field(default_factory=dict)
    bfloat16: Mapping[int, float] = field(default_factory=dict)
    threads: int = 0

    def speedup(self, rows: int = 1) -> float:
        """How many times as fast a pass over so many tokens is in bfloat16, its matrix products alone."""
        return self.float32[rows] / self.bfloat16[rows]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**self.__dict__, "float32": dict(self.float32), "bfloat16": dict(self.bfloat16)}

    def __str__(self) -> str:
        if self.reason:
            return f"dtype auto: {self.dtype}, since {self.reason}"
        noun = "thread" if self.threads == 1 else "threads"
        more = ", ".join(f"{self.speedup(rows):.2f}x with {rows} tokens" for rows in ROWS[-2:])
        return (
            f"dtype auto: {self.dtype}; matrix products of a decoding step take {1e3 * self.float32[1]:.3g} ms in "
            f"float32 and {1e3 * self.bfloat16[1]:.3g} ms in bfloat16 ({self.speedup():.2f}x; {more}), measured on "
            f"{self.threads} {noun}"
        )


def choose(config: Any, device: torch.device | str = "cpu") -> Chosen:
    """The faster of float32 and bfloat16 for a model on a device.

    On a CPU with instructions for bfloat16 the products of the model's own shapes are timed in both, in turns, for at
    most two seconds. bfloat16 has to be 1.1 times as fast in a plain decoding step; or as fast there, and 1.1 times in
    passes over more tokens, those of drafts and of a prompt. It is done once in a process for each set of shapes and
    number of threads. A GPU takes bfloat16 if it has it.

    Args:
        config: of the model, as transformers has it.
        device: that the model will be on.

    Raises:
        UnsupportedModelError: the config says no sizes of a model that writes text.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Chosen("bfloat16", "the GPU computes in it")
        return Chosen("float32", "the GPU has no bfloat16 of its own")
    if kind != "cpu":
        return Chosen("float32", f"only a CPU and CUDA are known to gain by bfloat16, and this is {kind}")
    if not has_bfloat16():
        return Chosen("float32", "this CPU has no instructions for bfloat16")
    found = tuple(matrices(config))
    key = (found, torch.get_num_threads())
    if key not in _KNOWN:
        _KNOWN[key] = decide(*timed(found))
    return _KNOWN[key]


def decide(float32: Mapping[int, float], bfloat16: Mapping[int, float]) -> Chosen:
    """What measured seconds speak for, by the number of tokens of a pass; see `choose`."""
    found = Chosen("bfloat16", "", float32, bfloat16, torch.get_num_threads())
    step, *more = (found.speedup(rows) for rows in float32)
    return found if step >= PAYS or (step >= 1 and min(more) >= PAYS) else replace(found, dtype="float32")


def has_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16."""
    return any(has is True and ("bf16" in name or "bfloat16" in name) for name, has in _capabilities().items())


def _capabilities() -> Mapping[str, Any]:
    found: Mapping[str, Any] = torch.cpu.get_capabilities()
    return found


def matrices(config: Any) -> list[Matrix]:
    """The matrices that a token passes in a language model, or in that of a vision-language model, by its config.

    Of a mixture of experts those of one expert stand for all: it is a ratio that is asked for.

    Raises:
        UnsupportedModelError: the config has no such sizes.
    """
    text = config.get_text_config(decoder=True)
    sizes = {name: getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UnsupportedModelError(
                f"dtype 'auto' needs {name} of a {type(config).__name__}, which is {size!r:.80}: name a dtype"
            )
    hidden, layers, vocabulary = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["vocab_size"]
    assert hidden is not None and layers is not None and vocabulary is not None
    heads = _number(text, "num_attention_heads") or 1
    keys = _number(text, "num_key_value_heads") or heads
    width = _number(text, "head_dim") or max(1, hidden // heads)
    inner = _number(text, "intermediate_size") or _number(text, "n_inner") or 4 * hidden
    return [
        Matrix(heads * width, hidden, layers),
        Matrix(keys * width, hidden, 2 * layers),
        Matrix(hidden, heads * width, layers),
        Matrix(inner, hidden, 2 * layers),
        Matrix(hidden, inner, layers),
        Matrix(vocabulary, hidden),
    ]


def _number(config: Any, name: str) -> int | None:
    """A size, of the first block where there is one for each."""
    found = getattr(config, name, None)
    first = found[0] if isinstance(found, (list, tuple)) and found else found
    return first if isinstance(first, int) and not isinstance(first, bool) and first > 0 else None


# The measurement.


def timed(
    found: tuple[Matrix, ...], pool: int = POOL, seconds: float = SECONDS
) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds of all products of a pass in float32 and in bfloat16, by the number of its tokens.

    Of each matrix it is the median over rounds and copies, so that what else the machine does meanwhile weighs little.
    The matrices lie in memory one behind the other, several copies of small ones, and of large ones the first rows,
    which count for all: a product takes time as its rows.
    """
    layout = _layout(found, pool)
    weights: dict[torch.dtype, list[tuple[int, Tensor]]] = {
        # What the numbers are takes no part, as long as they are plain: those of fresh memory may not be.
        dtype: [(which, torch.full((rows, found[which].into), 0.01, dtype=dtype)) for which, rows in layout]
        for dtype in (torch.float32, torch.bfloat16)
    }
    taken: dict[tuple[torch.dtype, int, int], list[float]] = {}
    began = time.perf_counter()
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            for rows in ROWS:
                for dtype, each in weights.items():
                    for which, weight in each:
                        x = torch.full((rows, weight.shape[1]), 1.0, dtype=dtype)
                        start = time.perf_counter()
                        F.linear(x, weight)
                        if turn:  # the first round warms up
                            taken.setdefault((dtype, rows, which), []).append(time.perf_counter() - start)
            if turn and time.perf_counter() - began > seconds:
                break
    stands = {which: found[which].count * found[which].out / rows for which, rows in layout}
    one, other = (
        {rows: sum(median(taken[dtype, rows, which]) * times for which, times in stands.items()) for rows in ROWS}
        for dtype in weights
    )
    return one, other


def _layout(found: tuple[Matrix, ...], pool: int) -> list[tuple[int, int]]:
    """What is timed one after the other: which matrix, and so many of its rows."""
    most = max(1, pool // (2 * len(found)))
    rows = [min(matrix.out, max(1, most // matrix.into)) for matrix in found]
    entries = [matrix.into * n for matrix, n in zip(found, rows, strict=True)]
    copies = [1] * len(found)
    while True:  # another round of all that there are more of, as long as there is room
        more = [int(copy < matrix.count) for copy, matrix in zip(copies, found, strict=True)]
        total = sum((copy + one) * size for copy, one, size in zip(copies, more, entries, strict=True))
        if not any(more) or total > pool:
            break
        copies = [copy + one for copy, one in zip(copies, more, strict=True)]
    return [(which, rows[which]) for turn in range(max(copies)) for which, n in enumerate(copies) if turn < n]


# What a model is held in.


def dtype_name(model: nn.Module | Any) -> str:
    """What a model's numbers are called in results: ``"float32"``, ``"bfloat16"``, ``"int8"`` for packed weights."""
    name = str(model.dtype).removeprefix("torch.")
    held = packed(model)
    if held is None:
        return name
    return "int8" if "int8" in held.lower() else f"{name}, packed"
