"""How many nodes to read: what a pass of the target takes on this machine, against what it is likely to give."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from quickmerge.decoding.commit import Columns
from quickmerge.decoding.target import Target
from quickmerge.decoding.tree import Tree, pack
from quickmerge.models.compat import cache_argument

__all__ = ["Cost", "best_size", "measure", "wait"]

FloatArray = NDArray[np.floating[Any]]

SIZES = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 128  # tokens before the tree while it is measured
REPEATS = 3

_KNOWN: WeakKeyDictionary[PreTrainedModel, dict[tuple[object, ...], Cost]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Cost:
    """Seconds of a pass that reads so many tokens, of all rows together; in a straight line between and beyond them."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def of(self, tokens: FloatArray) -> FloatArray:
        """Seconds for numbers of tokens."""
        inside = np.interp(tokens, self.tokens, self.seconds)
        # Where one size alone was measured, more tokens take more in proportion.
        (a, b), (x, y) = (0, *self.tokens)[-2:], (0.0, *self.seconds)[-2:]
        return np.asarray(inside + np.maximum(0, tokens - b) * (y - x) / (b - a))


def best_size(probs: Sequence[Sequence[float]], cost: Cost, draft_seconds: float) -> int:
    """The number of nodes N for each row that gives the most tokens a second.

    A step that reads the best N nodes of each of B rows gives ``sum_b (1 + sum of their path probabilities)`` tokens
    on average, the 1 being the target's own, if the drafter's probabilities are true. It takes c(B N) seconds in the
    target and those that the draft took.

    Args:
        probs: for each row the path probabilities of its tree, root included (which stands for the 1).
        cost: of the target.
        draft_seconds: what a draft takes, whatever is read of it.
    """
    most = max(len(row) for row in probs)
    grid = np.zeros((len(probs), most))
    for i, row in enumerate(probs):
        grid[i, : len(row)] = sorted(row, reverse=True)
    gain = grid.sum(0).cumsum()
    return int((gain / (cost.of(np.arange(1.0, most + 1) * len(probs)) + draft_seconds)).argmax()) + 1


@torch.no_grad()
def measure(model: PreTrainedModel, most: int) -> Cost:
    """Time passes of 1, 2, 4, ... tokens up to ``most``, or 64, behind a short text; the median of three each.

    It is done once for each model, place, number of threads and ``most``.
    """
    key = (model.device, model.dtype, torch.get_num_threads(), most)
    known = _KNOWN.setdefault(model, {})
    if key not in known:
        most = min(most, SIZES[-1])
        known[key] = _measure(model, [size for size in SIZES if size < most] + [most])
    return known[key]


def _measure(model: PreTrainedModel, sizes: list[int]) -> Cost:
    config = model.config.get_text_config(decoder=True)
    room = getattr(config, "max_position_embeddings", None) or CONTEXT + sizes[-1]
    context = max(1, min(CONTEXT, room - sizes[-1]))
    sizes = [size for size in sizes if context + size <= room] or [1]
    ids = torch.arange(context, device=model.device)[None] % config.vocab_size
    cache = DynamicCache()
    model(input_ids=ids, **cache_argument(model, cache), use_cache=True)
    place = torch.arange(context, device=model.device)[None]
    columns = Columns(place >= 0, place, ids.new_tensor([context]), ids.new_zeros(1), False)
    target = Target(model, cache, columns)
    times: list[list[float]] = [[] for _ in sizes]
    for turn in range(REPEATS + 1):
        for size, taken in zip(sizes, times, strict=True):
            packed = pack([Tree.chain([1 % config.vocab_size] * size)], model.device)
            wait(model.device)
            start = time.perf_counter()
            target.read(packed)
            wait(model.device)
            if turn:  # the first one of each size warms up
                taken.append(time.perf_counter() - start)
            cache.crop(-size)
    # A pass that reads more does not take less.
    return Cost(tuple(sizes), tuple(float(s) for s in np.maximum.accumulate([median(taken) for taken in times])))


def wait(device: torch.device) -> None:
    """Wait for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
