"""How many nodes to read: what a pass of the target takes on this machine, against what it is likely to give."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from quickmerge.bench.harness import seconds_of
from quickmerge.models.attachment import aside, uncounted
from quickmerge.models.compat import cache_argument, device_of, fresh_cache
from quickmerge.models.decoder import watchers
from quickmerge.speculative.chains import Chains
from quickmerge.speculative.proof import check_target
from quickmerge.speculative.target import Columns, Target
from quickmerge.speculative.tree import Tree, pack

__all__ = ["Cost", "Pace", "best_size", "measure", "measure_behind"]


FloatArray = NDArray[np.floating[Any]]

SIZES = (1, 2, 3, 4, 8, 16, 32, 64)
CONTEXT = 128  # tokens before the tree while it is measured
REPEATS = 3
PAYS = 0.9
"""A tree is padded if the larger pass takes less than this share of its own: smaller differences may be noise."""

_KNOWN: WeakKeyDictionary[PreTrainedModel, dict[tuple[object, ...], Cost]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Cost:
    """Seconds of a pass that reads so many tokens, of all rows together; in a straight line between and beyond them.

    They are what was measured, and so need not rise: where matrix products of a few rows take another way than those
    of four, a pass over 4 tokens may take less than one over 2. Then a tree of 2 is padded to 4 (`widths`).
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def of(self, tokens: FloatArray) -> FloatArray:
        """Seconds for numbers of tokens, without padding."""
        inside = np.interp(tokens, self.tokens, self.seconds)
        # Where one size alone was measured, more tokens take more in proportion; and never less than the last size.
        (a, b), (x, y) = (0, *self.tokens)[-2:], (0.0, *self.seconds)[-2:]
        return np.asarray(inside + np.maximum(0, tokens - b) * max(0.0, y - x) / (b - a))

    def passes(self, rows: int, most: int) -> FloatArray:
        """``(most,)`` seconds of passes that read 1, 2, ... ``most`` nodes in each row, padded where that is faster."""
        return _padded(self, rows, most)[0]

    def widths(self, rows: int, most: int) -> NDArray[np.int_]:
        """``(most,)`` nodes to which trees of 1, 2, ... ``most`` nodes in each row are best padded."""
        return _padded(self, rows, most)[1]


@lru_cache(256)
def _padded(cost: Cost, rows: int, most: int) -> tuple[FloatArray, NDArray[np.int_]]:
    wide = max(most, -(-cost.tokens[-1] // rows))
    plain = cost.of(np.arange(1.0, wide + 1) * rows)
    # From the right: the fastest of all sizes that are at least as wide, the narrowest of equally fast ones.
    best = np.arange(wide)
    for i in range(wide - 2, -1, -1):
        if plain[best[i + 1]] < plain[i]:
            best[i] = best[i + 1]
    best = np.where(plain[best] < PAYS * plain, best, np.arange(wide))[:most]
    return plain[best], best + 1


def best_size(probs: Sequence[Sequence[float]], cost: Cost, draft_seconds: float) -> int:
    """The number of nodes N for each row that gives the most tokens a second.

    A step that reads the best N nodes of each of B rows gives ``sum_b (1 + sum of their path probabilities)`` tokens
    on average, the 1 being the target's own, if the drafter's probabilities are true. It takes c(B N) seconds in the
    target, or those of a larger pass that N is padded to, and those that the draft took.

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
    return int((gain / (cost.passes(len(probs), most) + draft_seconds)).argmax()) + 1


@torch.no_grad()
def measure(model: PreTrainedModel, most: int) -> Cost:
    """Time passes of 1, 2, 3, 4, 8, ... tokens up to ``most``, or 64, behind a short text; the median of three each.

    It is done once for each model, place, number of threads and ``most``. Runs that the model is inside of stand aside:
    what they do to a prompt is none of its business, and `measure_behind` is for those that change what a pass takes.
    """
    key = (device_of(model), model.dtype, torch.get_num_threads(), most)
    known = _KNOWN.setdefault(model, {})
    if key not in known:
        most, why = min(most, SIZES[-1]), check_target(model)
        with aside():
            known[key] = _measure(model, [size for size in SIZES if size < most] + [most], why)
    return known[key]


@torch.no_grad()
def measure_behind(target: Target | Chains, most: int) -> Cost | None:
    """`measure` behind the text that a target holds, for models in which a pass takes longer where the past is long.

    It is done once for each model and so on, number of rows, and length of text within a factor of two. The target
    holds the same as before.

    Returns:
        None where not even two nodes may be read at once now.
    """
    rows, room = len(target.columns.valid), target.room()
    if most < 2 or (room is not None and min(room) < 1):
        return None
    model, length = target.model, target.columns.width.bit_length()
    key = (device_of(model), model.dtype, torch.get_num_threads(), most, watchers(model), rows, length)
    known = _KNOWN.setdefault(model, {})
    if key not in known:
        sizes = [size for size in SIZES if size < most] + [most]
        with uncounted():
            known[key] = _time(target, sizes, lambda: target.commit([()] * rows))
    return known[key]


def _measure(model: PreTrainedModel, sizes: list[int], why: str) -> Cost:
    config = model.config.get_text_config(decoder=True)
    room = getattr(config, "max_position_embeddings", None) or CONTEXT + sizes[-1]
    context = max(1, min(CONTEXT, room - sizes[-1]))
    sizes = [size for size in sizes if context + size <= room] or [1]
    ids = torch.arange(context, device=device_of(model))[None] % config.vocab_size
    cache = fresh_cache(model) if why else DynamicCache()
    model(input_ids=ids, **cache_argument(model, cache), use_cache=True)
    place = torch.arange(context, device=device_of(model))[None]
    columns = Columns(place >= 0, place, ids.new_tensor([context]), ids.new_zeros(1), False)
    if not why:
        plain = Target(model, cache, columns)
        return _time(plain, sizes, lambda: plain.commit([()]))
    chains = Chains(model, cache, columns, why=why)
    chains.saves = True
    return _time(chains, sizes, lambda: chains.commit([()]))


def _time(target: Target | Chains, sizes: list[int], undo: Callable[[], None]) -> Cost:
    """Passes over stars of these sizes in every row, or over chains, and ``undo`` behind each."""
    times: list[list[float]] = [[] for _ in sizes]
    model, rows = target.model, len(target.columns.valid)
    token = 1 % model.config.get_text_config(decoder=True).vocab_size
    for turn in range(REPEATS + 1):
        for size, taken in zip(sizes, times, strict=True):
            tree = Tree.chain([token] * size) if target.why else Tree([token] * size, [0] * size, [1.0] * size)
            seconds = seconds_of(partial(target.read, pack([tree] * rows, device_of(model))), device_of(model))
            if turn:  # the first one of each size warms up
                taken.append(seconds)
            undo()
    return Cost(tuple(rows * size for size in sizes), tuple(median(taken) for taken in times))


# Whether to draft at all: a draft that costs more than it gives is left out for a while.


LATEST = 8
"""Drafts that are looked at."""
FEWEST = 2
"""Drafts before anything is decided."""
FIRST, LONGEST = 8, 64
"""Steps without a draft: at first, and at most."""
CHEAP = 0.1
"""A draft that takes less than this share of a plain pass is always made: the size of the tree then says enough."""
TRUST = 4.0
"""Accepted tokens that count as foreseen before any was seen."""


class Pace:
    """Decides before each step whether it drafts.

    With the N best nodes of a draft a step gives ``1 + g e`` tokens a row in ``c(N) + d`` seconds, where e is the sum
    of their path probabilities without the root's, d what drafts take, and g corrects the drafter's probabilities:
    tokens accepted so far over tokens foreseen. A step without a draft gives 1 in ``c(1)``. Where the mean of the
    latest drafts is the slower way, the next 8 steps go without one, then 16, and so on up to 64, one draft in
    between to see whether that has changed. So a drafter that never pays costs little more than its first drafts.

    Args:
        cost: of the target.
    """

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self._rates: deque[float] = deque(maxlen=LATEST)
        self._foreseen = self._accepted = TRUST
        self._pause = FIRST
        self._left = 0
        self._needed = FEWEST

    def drafts(self) -> bool:
        """Whether the step that begins now shall draft."""
        if self._left:
            self._left -= 1
            return False
        return True

    def saw(self, rows: int, nodes: int, foreseen: float, accepted: int, draft_seconds: float) -> None:
        """Take in a step that drafted.

        Args:
            rows: that took part.
            nodes: read for each row, the root included.
            foreseen: path probabilities of what was read, roots left out, summed over the rows.
            accepted: drafted tokens that were, of all rows.
            draft_seconds: what a draft takes on average.
        """
        self._foreseen += foreseen
        self._accepted += accepted
        plain = self._seconds(rows, 1)
        given = rows + foreseen * self._accepted / self._foreseen
        rate = given / (self._seconds(rows, nodes) + draft_seconds)
        self._rates.append(rate * plain / rows)  # against a step without a draft
        if draft_seconds < CHEAP * plain or len(self._rates) < self._needed:
            return
        if sum(self._rates) / len(self._rates) >= 1:
            self._pause = FIRST
            return
        self._left, self._pause = self._pause, min(2 * self._pause, LONGEST)
        self._rates.clear()
        self._needed = 1  # from now on one draft is a try

    def _seconds(self, rows: int, nodes: int) -> float:
        return float(self._cost.passes(rows, nodes)[-1])
