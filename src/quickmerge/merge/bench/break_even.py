"""From which length on merging a prompt pays on this machine, measured: the plain prefill against the merged one.

FLOPs say when less is computed (`quickmerge.merge.bench.cost.break_even`); what a reducer's many small steps take
beside a few large products, no count of FLOPs knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quickmerge.bench.harness import Arm, environment, interleave, seconds_of
from quickmerge.bench.stats import quartiles
from quickmerge.data import demo_document
from quickmerge.errors import QuickmergeError, UnsupportedModelError, whole_number
from quickmerge.merge.attach import reduce
from quickmerge.merge.place import Merge
from quickmerge.merge.run import observe
from quickmerge.merge.text.modes import Prefix
from quickmerge.models.compat import device_of
from quickmerge.models.precision import dtype_name
from quickmerge.models.vlm import holds_vlm, unwrapped

__all__ = ["BreakEven", "Length", "lengths", "time_merge"]

SHORTEST, LONGEST = 64, 2048
SECONDS = 25.0
TURNS = 5
"""Pairs of prefills at each length at most."""
FEWEST, CLEAR = 3, 1.1
"""So many are enough where each of them was faster by this factor, or slower; or where time is up."""
STEPS = 2
"""Lengths that are looked at in each doubling."""


@dataclass(frozen=True)
class Length:
    """Prefills of so many tokens: medians of seconds, and the median and quartiles of plain over merged."""

    tokens: int
    plain: float
    merged: float
    ratio: float
    low: float
    high: float
    turns: int

    @property
    def pays(self) -> bool:
        """Whether merging was faster in three of four turns."""
        return self.low >= 1

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens: plain {1e3 * self.plain:.0f} ms, merged {1e3 * self.merged:.0f} ms, "
            f"{self.ratio:.2f}x ({self.low:.2f} to {self.high:.2f})"
        )


@dataclass(frozen=True)
class BreakEven:
    """Where merging begins to pay; prints as a few lines.

    Attributes:
        merge: what was measured.
        model: its class.
        points: the lengths that were measured, rising.
        dtype: of the model.
        device: it was on.
        cpu: of the machine, and its cores.
        threads: of the CPU.
        whole: whether all was measured that was wanted, and not only as much as there was time for.
    """

    merge: str
    model: str
    points: tuple[Length, ...]
    dtype: str
    device: str
    cpu: str
    threads: int
    whole: bool

    @property
    def at(self) -> Length | None:
        """The shortest length from which on all that were measured pay; None where the longest does not."""
        found = None
        for point in reversed(self.points):
            if not point.pays:
                break
            found = point
        return found

    @property
    def tokens(self) -> int | None:
        """Tokens of that length."""
        return None if self.at is None else self.at.tokens

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        points = [{**point.__dict__, "pays": point.pays} for point in self.points]
        return {**self.__dict__, "points": points, "tokens": self.tokens}

    def __str__(self) -> str:
        noun = "thread" if self.threads == 1 else "threads"
        where = f"{self.dtype}, {self.device}, {self.threads} {noun}"
        told = [f"{self.merge}, {self.model} ({where}): plain over merged prefill, median and quartiles of turns"]
        told += [f"  {point}" for point in self.points]
        if self.tokens is None:
            told.append(f"merging pays at none of these lengths, of which the longest has {self.points[-1].tokens}")
        else:
            told.append(f"merging pays from prompts of {self.tokens} tokens on")
        if not self.whole:
            told.append("note: time was up before lengths in between were measured, so it may pay earlier")
        return "\n".join(told)


def time_merge(
    model: Any,
    tokenizer: Any,
    merge: Merge,
    *,
    shortest: int = SHORTEST,
    longest: int = LONGEST,
    seconds: float = SECONDS,
    turns: int = TURNS,
    clock: Callable[[Any, Tensor, AbstractContextManager[Any]], float] | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> BreakEven:
    """Find the prompt length from which on a merged prefill takes less time than the plain one, on this machine.

    Lengths are halved in by their logarithm, on the assumption that merging gains with the length. At each the two take
    turns on the same text, everything that the method does inside; it pays where it was faster in three of four turns.

    Args:
        model: a causal LM in eval mode, in the dtype and on the device that it will be used in.
        tokenizer: of the model.
        merge: how the prompt is merged; ``min_tokens`` is of no account.
        shortest: length below which nobody looks.
        longest: length beyond which nobody looks; less where the model reads less.
        seconds: no further length is begun after so long.
        turns: of each way, at each length, at least 3; no more than these where the first ones agree.
        clock: gives the seconds of a prefill: of a model, ids ``(1, N)`` and a run to be inside of. None: the wall's.
        advance: called with a label before each length, for progress.

    Raises:
        UnsupportedModelError: for a model that can't be served.
        QuickmergeError: for a number out of range, or a mode that reads every prompt in full.
    """
    model = unwrapped(model)
    if holds_vlm(model):
        raise UnsupportedModelError(f"break_even is for language models, got {type(model).__name__}")
    mode = merge.mode or Prefix()
    if not isinstance(mode, Prefix):
        raise QuickmergeError("break_even is for prefix mode: in block_causal mode all tokens of a prompt are read")
    shortest = whole_number("shortest", shortest, mode.sinks + mode.recent + 1)
    turns = whole_number("turns", turns, FEWEST)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise QuickmergeError(f"seconds must be a number above 0, got {seconds!r:.80}")
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or longest
    longest = min(whole_number("longest", longest, shortest), room)
    if longest < shortest:
        raise QuickmergeError(f"shortest must be at most the {room} tokens that the model reads, got {shortest}")
    whole = replace(mode, min_tokens=0, tokenizer=mode.tokenizer if mode.tokenizer is not None else tokenizer)
    arms = [
        Arm("plain", partial(observe, model)),
        Arm("merged", partial(reduce, model, merge.reducer, merge.layer, mode=whole)),
    ]
    text = tokenizer(demo_document(), return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = text.repeat(1, -(-longest // text.shape[1])).to(device_of(model))
    timed = clock or _seconds

    def point(tokens: int) -> Length:
        advance(f"{tokens} tokens")

        def measure(arm: Arm, prompt: Tensor, number: int) -> float:
            return timed(model, prompt, arm.context())

        pairs: list[tuple[float, float]] = []
        for turn in range(turns):
            warm_up = None if turn else measure
            (plain,), (merged,) = interleave(arms, [ids[:, :tokens]], measure, first=turn, warm_up=warm_up)
            pairs.append((plain, merged))
            ratios = [a / b for a, b in pairs]
            agree = min(ratios) >= CLEAR or max(ratios) <= 1 / CLEAR
            if len(pairs) >= FEWEST and (agree or time.perf_counter() - began > seconds):
                break
        low, ratio, high = quartiles(ratios)
        plain, merged = (quartiles(each)[1] for each in zip(*pairs, strict=True))
        return Length(tokens, plain, merged, ratio, low, high, len(pairs))

    grid, began = lengths(shortest, longest), time.perf_counter()
    found: dict[int, Length] = {}
    # Below ``low`` merging is taken not to pay, and from ``high`` on to pay.
    low, high = -1, len(grid)
    while high - low > 1 and (not found or time.perf_counter() - began < seconds):
        middle = (low + high) // 2
        found[middle] = made = point(grid[middle])
        low, high = (low, middle) if made.pays else (middle, high)
    around, shown = environment(), replace(mode, min_tokens=Prefix.min_tokens, tokenizer=None)
    return BreakEven(
        replace(merge, mode=None if shown == Prefix() else shown).label, type(model).__name__,
        tuple(found[place] for place in sorted(found)), dtype_name(model), str(device_of(model)), around["cpu"],
        torch.get_num_threads(), high - low <= 1,
    )  # fmt: skip


def lengths(shortest: int, longest: int) -> list[int]:
    """Lengths from one to the other, two in each doubling, rising; the longest is always among them."""
    found, power = [], 0
    while (tokens := round(shortest * 2 ** (power / STEPS))) < longest:
        found.append(tokens)
        power += 1
    return [*found, longest]


def _seconds(model: Any, prompt: Tensor, run: AbstractContextManager[Any]) -> float:
    """Seconds of the whole forward over a prompt ``(1, N)``, as ``generate`` calls it."""
    with torch.inference_mode(), run:
        return seconds_of(lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1), device_of(model))
