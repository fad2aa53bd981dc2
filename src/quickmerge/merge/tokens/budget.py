"""How many tokens to keep: a ratio, a count, an entropy or a share of the saliency mass.

Every budget answers for each row on its own. Protected tokens are kept. The budget pays for those that are part of
every prompt (its first and last tokens); those that are ``exempt``, since a user asked for them, come on top, so that
the other tokens are given what they would be given without them: ``count = exempt + budget of the others``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from quickmerge.errors import as_index, whole_number
from quickmerge.merge.tokens.view import TokenView


@runtime_checkable
class Budget(Protocol):
    """Anything that says how many slots each row gets."""

    def count(self, view: TokenView, saliency: Tensor | None) -> Tensor:
        """``(B,)`` long, at least the protected tokens and at most the valid ones; see `clamp_count`."""
        ...


def clamp_count(count: Tensor, view: TokenView) -> Tensor:
    """From what a budget gives to the tokens that it counts to how many of each row are kept in all: both ``(B,)``.

    What it gives is held between the protected tokens among these (at least 1) and all of them; the exempt ones come on
    top.
    """
    counted = view.counted
    low, high = (view.protected & counted).sum(-1).clamp_min(1), counted.sum(-1)
    return torch.minimum(torch.maximum(count.long(), low), high) + (view.valid.sum(-1) - high)


def _share(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and 0 < value <= 1):
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")


def round_half_up(x: Tensor) -> Tensor:
    """Nearest integer, halves up, so that a count does not depend on being odd or even.

    The nudge is far above float64 error of ``keep * length`` and far below one token.
    """
    return (x + 0.5 + 1e-9).floor().long()


@dataclass(frozen=True)
class Ratio:
    """Keep ``round(keep * original length)`` tokens of each row, exempt ones neither counted nor among them."""

    keep: float

    def __post_init__(self) -> None:
        _share("keep", self.keep)

    def count(self, view: TokenView, saliency: Tensor | None) -> Tensor:  # noqa: D102
        return clamp_count(round_half_up(view.counted_length.double() * self.keep), view)


@dataclass(frozen=True)
class Remaining:
    """Keep a share of the tokens that are there by now, whatever the row was cut from: what later merges go by."""

    share: float

    def __post_init__(self) -> None:
        _share("share", self.share)

    def count(self, view: TokenView, saliency: Tensor | None) -> Tensor:  # noqa: D102
        return clamp_count(round_half_up(view.counted.sum(-1).double() * self.share), view)


@dataclass(frozen=True)
class Count:
    """Keep exactly ``tokens`` tokens of each row (all of them where the row is shorter), beside the exempt ones."""

    tokens: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", whole_number("tokens", self.tokens))

    def count(self, view: TokenView, saliency: Tensor | None) -> Tensor:  # noqa: D102
        return clamp_count(torch.full_like(view.length, self.tokens), view)


def _distribution(view: TokenView, saliency: Tensor | None, who: str) -> Tensor:
    if saliency is None:
        raise ValueError(f"budget {who} needs a saliency, and this reducer has none; use a ratio or a count")
    mass = torch.where(view.counted, saliency.double().clamp(0, torch.finfo(torch.float64).max), 0.0)
    # Relative to the largest first, so that no sum overflows and nothing vanishes beside the least number.
    largest = mass.amax(-1, keepdim=True)
    mass = mass / torch.where(largest > 0, largest, 1.0)
    total = mass.sum(-1, keepdim=True)
    flat = view.counted.double() / view.counted.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(total > 0, mass / total.clamp_min(torch.finfo(torch.float64).tiny), flat)


def effective_tokens(view: TokenView, saliency: Tensor | None, who: str = "Entropy") -> Tensor:
    """``exp H(p) (B,)`` with ``p = saliency / sum(saliency)``: how many tokens a row's saliency effectively is of.

    From 1, all on one token, to the number of tokens that are counted, the same on each.

    Raises:
        ValueError: if there is no saliency; ``who`` is the budget that the message names.
    """
    entropy: Tensor = torch.special.entr(_distribution(view, saliency, who)).sum(-1)
    return entropy.exp()


@dataclass(frozen=True)
class Entropy:
    """Entropy budget: a row whose saliency is spread over many tokens keeps more of them.

    With ``p = saliency / sum(saliency)`` over the row and ``exp H(p)`` in [1, N] the number of tokens that it
    effectively spreads over, ``K = round(scale * exp H(p))``, held between ``low`` and ``high`` as shares of the
    original length; exempt tokens are in none of these. The paper (arXiv 2508.13204) names an entropy-based budget
    without a public formula; this is ours.

    Args:
        scale: tokens kept per effective token.
        low: least share of the row that is kept.
        high: largest share of the row that is kept.
    """

    scale: float = 1.0
    low: float = 0.05
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, (int, float)) and math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a positive number, got {self.scale!r}")
        _share("low", self.low)
        _share("high", self.high)
        if self.low > self.high:
            raise ValueError(f"low must not exceed high, got low={self.low!r} and high={self.high!r}")

    @classmethod
    def calibrated(cls, share: float, spread: Sequence[float], low: float = 0.05, high: float = 1.0) -> Entropy:
        """The budget that keeps the share ``share`` of some texts on average, and of each more or less than that.

        ``mean_i min(high, max(low, scale spread_i)) = share``, by bisection; the scale is a plain number.

        Args:
            share: in [low, high].
            spread: ``exp H(p) / N`` of each text, see `effective_tokens`; positive.
            low: least share of a text.
            high: largest share of a text.

        Raises:
            ValueError: if the share is out of range, or there is no spread or one that is not positive.
        """
        bounds = cls(1.0, low, high)
        _share("share", share)
        if not low <= share <= high:
            raise ValueError(f"share must lie between low={low!r} and high={high!r}, got {share!r}")
        if not spread or not all(math.isfinite(each) and each > 0 for each in spread):
            raise ValueError(f"spread must be positive numbers, one at least, got {list(spread)!r:.80}")

        def mean(scale: float) -> float:
            return math.fsum(min(bounds.high, max(bounds.low, scale * each)) for each in spread) / len(spread)

        below, above = 0.0, bounds.high / min(spread)
        for _ in range(200):
            middle = (below + above) / 2
            below, above = (middle, above) if mean(middle) < share else (below, middle)
        return cls(above, low, high)

    def count(self, view: TokenView, saliency: Tensor | None) -> Tensor:  # noqa: D102
        effective = effective_tokens(view, saliency, "Entropy")
        length = view.counted_length.double()
        wanted = torch.minimum(torch.maximum(self.scale * effective, self.low * length), self.high * length)
        return clamp_count(round_half_up(wanted), view)


@dataclass(frozen=True)
class Mass:
    """Keep the fewest tokens that together hold a share ``mass`` of the row's saliency, exempt tokens apart."""

    mass: float

    def __post_init__(self) -> None:
        _share("mass", self.mass)

    def count(self, view: TokenView, saliency: Tensor | None) -> Tensor:  # noqa: D102
        p = _distribution(view, saliency, "Mass")
        fixed = view.protected & view.counted
        given = torch.where(fixed, p, 0.0).sum(-1, keepdim=True)
        ranked = torch.where(fixed, 0.0, p).sort(-1, descending=True).values
        # The nudge keeps rounding in the running sum from asking for one token more than mass=1 holds.
        held = torch.cat([given, given + ranked.cumsum(-1)], -1) < self.mass - 1e-12
        return clamp_count(fixed.sum(-1) + held.sum(-1), view)


def fixed_count(budget: Budget, view: TokenView) -> int | None:
    """How many tokens a `Count` keeps of every row of a view with a ``prefix``: known without looking at anything.

    None where it has to be looked up, as for any other budget.
    """
    if view.prefix is None or not isinstance(budget, Count):
        return None
    return min(max(budget.tokens, view.prefix, 1), view.hidden.shape[1])


def kept_of(budget: float | Budget, tokens: int) -> int:
    """How many of ``tokens`` tokens a share, a `Ratio` or a `Count` keeps, where none is protected.

    It is known without looking at them, so that an engine can make room.

    Args:
        budget: what a reducer's ``keep`` may be.
        tokens: how many there are.

    Raises:
        ValueError: for a budget that looks at the tokens, or no whole number of them of at least 1.
    """
    budget, tokens = as_budget(budget), whole_number("tokens", tokens)
    if isinstance(budget, Count):
        wanted = budget.tokens
    elif isinstance(budget, Ratio):
        wanted = int(round_half_up(torch.tensor(tokens * budget.keep, dtype=torch.float64)))
    else:
        raise ValueError(f"budget must be a share or a Count, which are known beforehand, got {budget!r}")
    return min(max(wanted, 1), tokens)


def how_many(budget: Budget, view: TokenView, saliency: Tensor | None = None) -> int | Tensor:
    """How many tokens are kept: one number where `fixed_count` knows it, else ``(B,)``, a number for each row."""
    known = fixed_count(budget, view)
    return budget.count(view, saliency) if known is None else known


def known_count(budget: Budget, view: TokenView) -> tuple[int, ...] | None:
    """What a budget that goes by numbers of tokens gives each row, where the host knows these; else None."""
    if view.known is None or type(budget) not in (Ratio, Remaining, Count):
        return None
    return tuple(budget.count(view.known.view(), None).tolist())


def lowest(score: Tensor, remove: int, prefix: int) -> Tensor:
    """``(B, remove)`` long: the lowest-scoring tokens behind the prefix, rising; of equal ones the later go."""
    order = score[:, prefix:].argsort(dim=-1, descending=True, stable=True)
    return order[:, order.shape[1] - remove :].sort(-1).values + prefix


def as_budget(keep: float | Budget) -> Budget:
    """A number is a ratio; a budget is itself.

    Raises:
        ValueError: for a number outside (0, 1] or any other object.
    """
    if isinstance(keep, (int, float)) and not isinstance(keep, bool):
        return Ratio(float(keep))
    # Strings and sequences have a count method too, of another kind.
    if isinstance(keep, Budget) and not isinstance(keep, (Sequence, type)):
        return keep
    raise ValueError(f"keep must be a number in (0, 1] or a budget (Ratio, Count, Entropy, Mass), got {keep!r}")


def select(score: Tensor, count: Tensor, view: TokenView) -> Tensor:
    """``(B, N)`` bool: the ``count`` best tokens of each row, protected ones first, ties to the earlier token.

    Exactly ``count`` tokens are chosen in every row, whatever the ties, so budgets are met to the token.
    """
    ranked = torch.where(view.protected, torch.inf, score.to(torch.promote_types(score.dtype, torch.float32)))
    ranked = torch.where(view.valid, ranked, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    # Infinite scores sort among padding or protected tokens, so these tiers come first whatever the score.
    tier = (view.valid.long() + (view.valid & view.protected).long()).gather(1, order)
    order = order.gather(1, tier.argsort(dim=-1, descending=True, stable=True))
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    chosen = torch.zeros_like(view.valid).scatter_(1, order, place < count[:, None])
    return chosen & view.valid


# At which depths tokens are reduced, and how far each time.


FIRST_DEPTH = 4 / 15
"""Where the first merge goes by default, as a share of the depth: block 8 of 30."""

LAST_DEPTH = 5 / 6
"""Where the last merge goes by default: block 25 of 30. The blocks above it hardly read the prompt any more."""

LAST_DECAY = 0.15
"""What the default's last merge keeps of what the first one left."""


def layers_of(layer: int | Sequence[int]) -> tuple[Any, ...]:
    """One block or a list of blocks as a tuple, whole numbers as Python's own; anything else stays as it was given."""
    given = tuple(layer) if isinstance(layer, Sequence) else (layer,)
    return tuple(x if (index := as_index(x)) is None else index for x in given)


@dataclass(frozen=True)
class Stage:
    """One merge: before block ``layer``, down to ``keep`` of the original tokens (or what a budget says)."""

    layer: int
    keep: float | Budget


@dataclass(frozen=True)
class Schedule:
    """Merges before the given blocks, each keeping ``decay`` times the share of the one before.

    ``keep`` is the mean share of tokens that the blocks from the first merge on read, so every schedule with the
    same first block and the same ``keep`` costs the same. With stage s covering d_s blocks,
    ``keep_s = c * decay^s`` (at most 1) with c such that ``sum_s d_s keep_s = keep * sum_s d_s``. A budget that
    is no plain share (a count, an entropy) rules the first merge alone; each later one keeps ``decay`` of what is
    left by then.

    Args:
        layers: blocks that read a newly reduced sequence, rising.
        decay: in (0, 1]; 1 reduces once and leaves the later merges nothing to do.

    Raises:
        ValueError: if layers are not rising whole numbers of at least 1 or decay is out of range.
    """

    layers: tuple[int, ...]
    decay: float = 0.7

    def __post_init__(self) -> None:
        layers = [x for x in map(as_index, self.layers) if x is not None and x >= 1]
        rising = all(a < b for a, b in pairwise(layers))
        if not layers or len(layers) != len(self.layers) or not rising:
            raise ValueError(f"layer must be rising whole numbers of at least 1, got {list(self.layers)}")
        object.__setattr__(self, "layers", tuple(layers))
        if not (isinstance(self.decay, (int, float)) and 0 < self.decay <= 1):
            raise ValueError(f"decay must be a number in (0, 1], got {self.decay!r}")

    @classmethod
    def of(cls, layer: int | Sequence[int] | None, depth: int) -> Schedule:
        """The schedule a user means by ``layer`` in a model of ``depth`` blocks.

        None is the default: one merge early, where it saves most, and one near the top, where the prompt is hardly
        read any more.

        Raises:
            ValueError: if a block lies outside 1..depth-1.
        """
        if layer is None:
            first = min(depth - 1, max(1, math.floor(FIRST_DEPTH * depth + 0.5)))
            last = math.floor(LAST_DEPTH * depth + 0.5)
            return cls((first, last), LAST_DECAY) if first < last < depth else cls((first,))
        schedule = cls(layers_of(layer))
        schedule.check(depth)
        return schedule

    def check(self, depth: int) -> None:
        """Raise ValueError unless every block lies in 1..depth-1."""
        if self.layers[-1] > depth - 1:
            raise ValueError(f"layer must lie in 1..{depth - 1} for a model of {depth} blocks, got {self.layers[-1]}")

    def stages(self, keep: float | Budget, depth: int) -> list[Stage]:
        """The merges, for a share or budget ``keep``.

        Raises:
            ValueError: if ``keep`` is neither a number in (0, 1] nor a budget, or a block is out of range.
        """
        self.check(depth)
        as_budget(keep)
        if len(self.layers) == 1 or not isinstance(keep, (int, float)):
            return [Stage(self.layers[0], keep), *(Stage(layer, Remaining(self.decay)) for layer in self.layers[1:])]
        spans = [b - a for a, b in zip(self.layers, (*self.layers[1:], depth), strict=True)]
        shares = [self.decay**s for s in range(len(spans))]
        target = keep * sum(spans)
        # Shares above 1 are cut to 1 and what they leave over goes to the later stages, at most once per stage.
        keeps = [0.0] * len(spans)
        full = 0
        for full in range(len(spans) + 1):
            rest = target - sum(spans[:full])
            if full == len(spans):
                break
            scale = rest / sum(d * r for d, r in zip(spans[full:], shares[full:], strict=True))
            keeps = [1.0] * full + [scale * r for r in shares[full:]]
            if keeps[full] <= 1.0:
                break
        keeps = [min(1.0, k) for k in keeps] if full < len(spans) else [1.0] * len(spans)
        return [Stage(layer, k) for layer, k in zip(self.layers, keeps, strict=True)]
