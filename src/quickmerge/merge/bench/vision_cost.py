"""How much of the labels of images a linear probe reads off the frozen features of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quickmerge.errors import QuickmergeError
from quickmerge.merge.tokens.removal import Removal, removal_for
from quickmerge.models.encoder import Encoder

Z95 = 1.959963984540054
"""Standard deviations of the normal distribution around its mean that hold 95% of it."""


@dataclass(frozen=True)
class Accuracy:
    """The share ``value`` of ``total`` predictions that were right, between the ends of its 95% interval."""

    value: float
    low: float
    high: float
    total: int


def probe_features(hidden: Tensor, prefix: int = 1) -> Tensor:
    """What a probe reads: the class token beside the mean of the patch tokens.

    Args:
        hidden: hidden states, ``(B, N, D)``.
        prefix: tokens before the first patch: the class token, and registers if the model has them.

    Returns:
        ``(B, 2D)`` float32.

    Raises:
        ValueError: there is no class token or no patch.
    """
    if hidden.ndim != 3 or not 1 <= prefix < hidden.shape[1]:
        raise ValueError(
            f"hidden must be (B, N, D) with N > prefix >= 1, got {tuple(hidden.shape)} and prefix {prefix}"
        )
    hidden = hidden.float()
    return torch.cat([hidden[:, 0], hidden[:, prefix:].mean(1)], dim=-1)


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on standardised features; everything is float64 on the CPU.

    For features ``x`` with training mean ``m`` and deviation ``s``, the class is the largest of
    ``W (x - m) / s + b``, where ``W`` and ``b`` minimise the mean cross-entropy plus ``l2 / 2`` times the squared norm
    of ``W``. The problem is convex, so the fit does not depend on a start or a seed.

    Attributes:
        classes: the C labels, sorted.
        mean: ``m``, ``(D,)``.
        scale: ``s``, ``(D,)``; 1 for a feature that is constant in training.
        weight: ``W``, ``(C, D)``.
        bias: ``b``, ``(C,)``.
        l2: the strength of the penalty.
    """

    classes: tuple[str, ...]
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    l2: float

    @classmethod
    def fit(cls, features: Tensor, labels: Sequence[str], *, l2: float = 1e-2, steps: int = 1000) -> LinearProbe:
        """Fit a probe.

        Args:
            features: ``(n, D)``.
            labels: the label of each row.
            l2: strength of the penalty, above 0.
            steps: the most iterations of L-BFGS.

        Raises:
            ValueError: the arguments don't fit together, are not finite, or hold fewer than two classes.
            QuickmergeError: the fit did not converge.
        """
        if not 0 < l2 < math.inf:
            raise ValueError(f"l2 must be a number above 0, got {l2!r}")
        # the features usually come out of inference mode, whose tensors can't take part in a fit
        with torch.inference_mode(False), torch.enable_grad():
            x = _checked(features, labels).clone()
            classes = tuple(sorted(set(labels)))
            if len(classes) < 2:
                raise ValueError(f"labels must hold at least 2 classes, got {len(classes)}")
            mean, deviation = x.mean(0), x.std(0, correction=0)
            # what is constant up to rounding must not be blown up to unit deviation
            scale = torch.where(deviation > 1e-9 * mean.abs(), deviation, torch.ones_like(deviation))
            x = (x - mean) / scale
            y = torch.tensor([classes.index(label) for label in labels])
            weight, bias = _minimise(x, y, len(classes), l2, steps)
        return cls(classes, mean, scale, weight, bias, l2)

    def predict(self, features: Tensor) -> list[str]:
        """The label of each row of ``features (n, D)``.

        Raises:
            ValueError: ``features`` are not finite or not of the size that was fitted.
        """
        x = _checked(features)
        if x.shape[1] != len(self.mean):
            raise ValueError(f"features must be {len(self.mean)} wide as those that were fitted, got {x.shape[1]}")
        logits = (x - self.mean) / self.scale @ self.weight.T + self.bias
        return [self.classes[index] for index in logits.argmax(-1).tolist()]

    def accuracy(self, features: Tensor, labels: Sequence[str]) -> Accuracy:
        """How often the prediction is right.

        Raises:
            ValueError: the arguments don't fit together, or a label was not there in training.
        """
        _checked(features, labels)
        if unknown := sorted(set(labels) - set(self.classes)):
            raise ValueError(f"labels must be among the {len(self.classes)} that were fitted, got {unknown[0]!r}")
        right = sum(a == b for a, b in zip(self.predict(features), labels, strict=True))
        low, high = wilson(right, len(labels))
        return Accuracy(right / len(labels), low, high, len(labels))


def choose_probe(
    train: tuple[Tensor, Sequence[str]],
    val: tuple[Tensor, Sequence[str]],
    l2: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0),
) -> LinearProbe:
    """The probe fitted on ``train`` whose penalty does best on ``val``; of equals, the strongest penalty.

    Raises:
        ValueError: ``l2`` is empty, or what `LinearProbe` raises.
    """
    if not l2:
        raise ValueError("l2 must hold at least one value, got none")
    probes = [LinearProbe.fit(*train, l2=value) for value in sorted(l2, reverse=True)]
    return max(probes, key=lambda probe: probe.accuracy(*val).value)  # the first of equals


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share: all p from which the observed share is within 1.96 standard errors.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Raises:
        ValueError: unless ``0 <= right <= total`` and ``total >= 1``.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"right must be between 0 and total, and total at least 1, got {right} and {total}")
    share, z2 = right / total, Z95**2 / total
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    # at its ends the interval is closed exactly, which rounding would miss
    return (0.0 if right == 0 else middle - half), (1.0 if right == total else middle + half)


def _minimise(x: Tensor, y: Tensor, classes: int, l2: float, steps: int) -> tuple[Tensor, Tensor]:
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=steps,
        tolerance_grad=1e-7,
        tolerance_change=1e-14,  # below it the loss is rounding, and the line search would only turn in circles
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, y) + l2 / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    loss()
    assert weight.grad is not None and bias.grad is not None
    slope = max(float(weight.grad.abs().max()), float(bias.grad.abs().max()))
    if not slope < 1e-5:
        raise QuickmergeError(
            f"the linear probe did not converge in {steps} steps (slope {slope:.1e}): give a larger l2 than {l2:g}"
        )
    return weight.detach(), bias.detach()


def _checked(features: Tensor, labels: Sequence[str] | None = None) -> Tensor:
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"features must be (n, D) with at least one row, got {tuple(features.shape)}")
    if labels is not None and len(labels) != len(features):
        raise ValueError(f"labels must be as many as the {len(features)} rows of features, got {len(labels)}")
    x = features.detach().cpu().to(torch.float64)
    if not x.isfinite().all():
        raise ValueError("features must be finite numbers, got NaN or infinity")
    return x


# What a vision transformer's forward costs, counted before it runs.


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
        feed = [part for part in (block.feed_forward, inner) if isinstance(part, nn.Module)]
        # A block that is merged behind reads as many tokens in all of its parts.
        second.append(sum(map(_entries, feed)) if block.feed_forward is not None else 0)
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
