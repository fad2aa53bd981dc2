"""What a vision transformer's forward costs, counted before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from quickmerge.hosts.encoder import Encoder
from quickmerge.tokens.removal import Removal, removal_for


@dataclass(frozen=True)
class VisionShape:
    """What of a vision transformer the cost depends on, per block.

    ``attention`` and ``feed_forward`` are the matrix entries that a token passes in the two halves of each block, and
    ``width`` the channels of all heads together.
    """

    attention: tuple[int, ...]
    feed_forward: tuple[int, ...]
    width: int

    def macs(self, entering: Sequence[float], leaving: Sequence[float]) -> float:
        """Multiplications with additions of one image's forward, what papers call FLOPs, but for embedding and head.

        Args:
            entering: tokens that each block's attention reads.
            leaving: tokens that its feed-forward half reads.

        Per block ``n P + 2 n^2 D`` and ``n' P'``.
        """
        total = 0.0
        for n, kept, p, q in zip(entering, leaving, self.attention, self.feed_forward, strict=True):
            total += n * p + 2 * n * n * self.width + kept * q
        return total

    def ratio(self, tokens: int, entering: Sequence[float], leaving: Sequence[float]) -> float:
        """`macs` over those of a forward in which every block reads ``tokens``."""
        full = [tokens] * len(self.attention)
        return self.macs(entering, leaving) / self.macs(full, full)

    def removal_ratio(self, removal: Removal, tokens: int, prefix: int) -> float:
        """`ratio` of a removal between the halves of each block."""
        left = removal.counts(tokens, prefix, len(self.attention))
        return self.ratio(tokens, [tokens, *left[:-1]], left)


def vision_shape(encoder: Encoder) -> VisionShape:
    """The shape of a vision transformer; one on the meta device does."""

    first, second = [], []
    for block in encoder.blocks:
        # Some blocks keep the first matrix of the feed-forward half in a module of its own.
        inner = getattr(block.module, "intermediate", None)
        second.append(_entries(block.feed_forward) + (_entries(inner) if isinstance(inner, nn.Module) else 0))
        first.append(_entries(block.module) - second[-1])
    return VisionShape(tuple(first), tuple(second), encoder.config.hidden_size)


def _entries(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def removal_at(shape: VisionShape, ratio: float, tokens: int, prefix: int) -> Removal:
    """The constant removal whose forward costs the share ``ratio`` of a full one, as nearly as can be.

    Raises:
        ValueError: if ``ratio`` is not in (0, 1], or less than a removal can reach.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be a number in (0, 1], got {ratio!r}")
    depth = len(shape.attention)
    low, high = 0.0, 1.0
    best: Removal | None = None
    for _ in range(40):
        middle = (low + high) / 2
        try:
            removal = removal_for(middle, tokens, prefix, depth)
        except ValueError:
            low = middle
            continue
        got = shape.removal_ratio(removal, tokens, prefix)
        if best is None or abs(got - ratio) < abs(shape.removal_ratio(best, tokens, prefix) - ratio):
            best = removal
        low, high = (middle, high) if got < ratio else (low, middle)
    if best is None or abs(shape.removal_ratio(best, tokens, prefix) - ratio) > 0.02:
        raise ValueError(f"ratio must be one that a constant removal from {tokens} tokens reaches, got {ratio:g}")
    return best


def once_at(shape: VisionShape, ratio: float, tokens: int) -> tuple[int, int]:
    """Where to reduce once, and to how many tokens, so that a forward costs the share ``ratio`` of a full one.

    Returns:
        The highest block not above a quarter of the depth at which there is such a number, and the number.

    Raises:
        ValueError: if ``ratio`` is not in (0, 1], or less than can be reached.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be a number in (0, 1], got {ratio!r}")
    depth = len(shape.attention)
    for block in range(depth // 4, -1, -1):

        def cost(kept: int, block: int = block) -> float:
            leaving = [tokens] * block + [kept] * (depth - block)
            return shape.ratio(tokens, [tokens, *leaving[:-1]], leaving)

        kept = min(range(2, tokens + 1), key=lambda n: abs(cost(n) - ratio))
        if abs(cost(kept) - ratio) < 0.01:
            return block, kept
    raise ValueError(f"ratio must be one that {tokens} tokens can be brought to at once, got {ratio:g}")
