"""What every method for the cache is: a frozen dataclass of its settings and one function from a layer to scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.merge.cache.view import CacheView

__all__ = ["HEADS", "Evictor", "Heads", "as_share", "choose", "head_counts", "layer_counts"]

HEADS = ("equal", "adaptive")


class Heads(Protocol):
    """Of a model what the cost of scores depends on."""

    @property
    def heads(self) -> int:
        """Query heads."""
        ...

    @property
    def key_heads(self) -> int:
        """Key heads."""
        ...

    @property
    def head_dim(self) -> int:
        """Channels of each."""
        ...

    def prefill_flops(self, tokens: Sequence[float]) -> float:
        """FLOPs of a prefill in which block i reads ``tokens[i]`` tokens."""
        ...


@dataclass(frozen=True)
class Evictor(ABC):
    """Base of all methods that evict entries from a cache, when a prompt has been read.

    Every layer and every key head keeps entries of its own, chosen by `scores`. Entries that are kept stay as they
    were, at their own positions; the others leave, and their memory with them.

    Args:
        keep: share of the entries that the cache of the prompt would hold if nothing were merged or evicted, in (0, 1].
            Layers that hold less than others by a merge or a sliding window keep what they have first; see
            `layer_counts`.
        sinks: tokens at the start of every row that stay in every head.
        recency: of the entries that stay, the share that stays for being the most recent, in [0, 1].
        heads: ``"equal"``, every key head of a layer keeps as many entries; or ``"adaptive"``, heads whose scores are
            spread over more entries keep more, as AdaKV (arXiv 2407.11550); see `head_counts`.
        floor: with adaptive heads, the share of the equal number that every head has at least, in [0, 1].
        min_tokens: the cache of a prompt of fewer tokens is left alone.
        protect: ``"literals"``, and entries of numbers, identifiers, paths, addresses and quoted text stay in every
            head of a language model, on top of ``keep``, which counts the others alone; see `quickmerge.Prefix`.

    A subclass sets ``name`` (what the command line calls it) and ``source`` (paper), and implements `scores`.
    """

    keep: float = 0.4
    sinks: int = 4
    recency: float = 0.0
    heads: str = "equal"
    floor: float = 0.2
    min_tokens: int = 256
    protect: str | None = field(default=None, kw_only=True)

    name: ClassVar[str]
    source: ClassVar[str] = ""
    replays: ClassVar[bool] = False
    """True if the scores come from reading the prompt a second time behind itself."""
    unrotates: ClassVar[bool] = False
    """True if the method looks at queries or keys without their rotary embedding."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", as_share("keep", self.keep, low=False))
        object.__setattr__(self, "sinks", whole_number("sinks", self.sinks, 0))
        object.__setattr__(self, "min_tokens", whole_number("min_tokens", self.min_tokens, 0))
        object.__setattr__(self, "recency", as_share("recency", self.recency))
        object.__setattr__(self, "floor", as_share("floor", self.floor))
        if self.heads not in HEADS:
            hint = near_match(str(self.heads), HEADS)
            raise QuickmergeError(f"heads must be one of {', '.join(HEADS)}, got {self.heads!r:.80}{hint}")
        if self.protect not in (None, "literals"):
            hint = near_match(str(self.protect), ("literals",))
            raise QuickmergeError(f"protect must be 'literals' or None, got {self.protect!r:.80}{hint}")

    @property
    def unit(self) -> str | None:
        """Which spans of the text the method keeps as a whole: ``"line"``, ``"word"``, ``"auto"`` or None for none."""
        return None

    @property
    def label(self) -> str:
        """The name and every setting that is not the default, as `quickmerge.merge.cache.make_evictor` reads it."""
        own = [(f.name, getattr(self, f.name), f.default) for f in fields(self) if f.name != "keep"]
        return ":".join([self.name, *(f"{name}={value}" for name, value, usual in own if value != usual)])

    def check(self, tokens: int, room: int | None) -> None:  # noqa: B027
        """Raise unless a prompt of ``tokens`` tokens can be scored in a model of ``room`` positions; None: any."""

    @abstractmethod
    def scores(self, view: CacheView) -> Tensor:
        """``(B, G, n)``, higher stays; finite for what is valid, and padding may hold anything finite."""

    def flops(self, shape: Heads, tokens: Sequence[float]) -> float:
        """FLOPs of the scores in a prefill in which block i reads ``tokens[i]`` tokens.

        By default those of a few operations for each channel of each key.
        """
        return 8.0 * shape.key_heads * shape.head_dim * sum(tokens)

    def least(self, valid: Tensor) -> Tensor:
        """``(B,)`` long: how many of the last entries of ``valid (B, N)`` stay whatever their scores."""
        return torch.zeros(len(valid), dtype=torch.long, device=valid.device)


def as_share(name: str, value: Any, *, low: bool = True) -> float:
    """A share as a float.

    Raises:
        QuickmergeError: it is no number in [0, 1], or in (0, 1] where it must not be ``low``.
    """
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or not (0 <= value <= 1 if low else 0 < value <= 1):
        raise QuickmergeError(f"{name} must be a number in {'[' if low else '('}0, 1], got {value!r:.80}")
    return float(value)


# How many entries stay where.


def layer_counts(keep: float, held: Sequence[int], full: Sequence[int]) -> list[int]:
    """How many entries of a row stay in each layer: one limit for all, under which ``keep`` of the whole cache is left.

    ``sum_l min(held_l, c) = keep sum_l full_l`` determines the limit c; layers that hold less than that keep all. So a
    cache that a merge has made smaller in some layers keeps the more in the others, and one that holds no more than
    ``keep`` already is left alone.

    Args:
        keep: share of the entries of an unreduced cache.
        held: entries that each layer has.
        full: entries that each layer would have if nothing had been merged.

    Returns:
        At least one entry each; their sum is ``keep * sum(full)``, rounded, or that of ``held``.
    """
    total = min(math.floor(keep * sum(full) + 0.5 + 1e-9), sum(held))
    order = sorted(range(len(held)), key=lambda layer: held[layer])
    counts = [0] * len(held)
    for place, layer in enumerate(order):
        share, more = divmod(total, len(held) - place)
        # What can't be divided goes to the layers that come last here, those that hold most.
        counts[layer] = max(1, min(held[layer], share + (more > 0 and place >= len(held) - more)))
        total = max(0, total - counts[layer])
    return counts


def head_counts(scores: Tensor, open_: Tensor, count: Tensor, floor: float) -> Tensor:
    """How many entries each head of a layer keeps, where that adapts to their scores (AdaKV, arXiv 2407.11550, eq. 6).

    Of the best ``G count`` entries of all heads together ``b_h`` are of head h; it keeps ``(1 - floor) b_h + floor
    count``, rounded so that the sum is as before (largest remainders first, of equal ones the lower head).

    Args:
        scores: ``(B, G, n)``.
        open_: ``(B, G, n)`` bool, the entries that compete.
        count: ``(B,)``, entries that each head would keep of these if all kept as many.
        floor: in [0, 1].

    Returns:
        ``(B, G)`` long, at most as many as are open.
    """
    b, g, n = scores.shape
    flat = torch.where(open_, scores, -torch.inf).flatten(1)
    place = flat.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    best = (place < (g * count)[:, None]).view(b, g, n) & open_
    wanted = (1 - floor) * best.sum(-1).double() + floor * count[:, None].double()
    counts = (wanted + 1e-9).floor()
    rest = (wanted.sum(-1) + 0.5).floor() - counts.sum(-1)
    order = (wanted - counts).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return torch.minimum((counts + (order < rest[:, None])).long(), open_.sum(-1))


def choose(
    evictor: Evictor,
    scores: Tensor,
    valid: Tensor,
    count: Tensor,
    recent: int | Tensor = 0,
    asked: Tensor | None = None,
) -> Tensor:
    """Which entries of a layer stay: ``(B, G, n)`` bool.

    First the ``sinks`` and the last ``recent`` entries of each row, and those ``asked`` for, then as many of the most
    recent as the method's ``recency`` says, then the best of the rest by their scores, ties to the earlier. Every head
    keeps ``count`` entries where these are as many; none of the first kind leaves, also if they are more.

    Args:
        evictor: the method.
        scores: what it says of the entries that the layer holds, ``(B, G, n)``.
        valid: ``(B, N)`` bool, False for padding, of all entries that the layer has read. It holds the last n of them:
            those before have left a sliding window, and sinks are among them.
        count: ``(B,)``, entries that stay; rows that have no more keep all.
        recent: see above; ``(B,)`` for a number of its own for each row.
        asked: ``(B, n)`` bool, further entries that stay; None for none.
    """
    recent = torch.as_tensor(recent, device=valid.device).view(-1, 1)
    share = (count.double() * evictor.recency + 1e-9).floor().long()
    newest = torch.maximum(share, evictor.least(valid))[:, None]
    here = slice(valid.shape[1] - scores.shape[-1], None)
    rank = valid.long().cumsum(-1)[:, here]
    last = valid.sum(-1, keepdim=True) - rank  # 0 for the last one
    valid = valid[:, here]
    total = valid.sum(-1, keepdim=True)
    fixed = valid & ((rank <= evictor.sinks) | (last < recent))
    fixed = fixed if asked is None else fixed | (valid & asked)
    # Those that stay for being recent must leave room for the sinks.
    room = (count - fixed.sum(-1)).clamp_min(0)[:, None]
    near = valid & ~fixed & (last < newest)
    near = near & ((near.flip(-1).long().cumsum(-1).flip(-1)) <= room)
    fixed = fixed | near
    open_ = (valid & ~fixed)[:, None].expand_as(scores)
    left = (count - fixed.sum(-1)).clamp_min(0)
    if evictor.heads == "adaptive":
        each = head_counts(scores, open_, left, evictor.floor)
    else:
        each = left[:, None].expand(-1, scores.shape[1])
    order = torch.where(open_, scores, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    picked = torch.arange(scores.shape[-1], device=scores.device) < each[..., None]
    chosen = torch.zeros_like(open_).scatter(-1, order, picked) & open_
    whole = (total[:, 0] <= count)[:, None, None]
    return (chosen | fixed[:, None] | whole) & valid[:, None]


def group_mean(scores: Tensor, groups: int) -> Tensor:
    """``(B, H, n)`` of query heads as the mean over those that share a key head: ``(B, G, n)``."""
    b, h, n = scores.shape
    return scores.view(b, groups, h // groups, n).mean(2)
