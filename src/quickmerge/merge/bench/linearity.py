"""Functional linearity: how nearly straight each block's feed-forward part is between two tokens (ToFu)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.errors import UnsupportedModelError, whole_number
from quickmerge.models.encoder import Block, find_encoder


@torch.no_grad()
def functional_linearity(
    model: PreTrainedModel, pixels: Tensor, pairs: int = 64, steps: int = 8, seed: int = 0
) -> Tensor:
    """Functional linearity of every block's feed-forward part f on a user's own images (arXiv 2312.01026).

    For two tokens of the same image, as they enter f, and the path ``X(t) = (1 - t) X_1 + t X_2`` between them,

        ``FL = ||f(X_1) - f(X_2)|| / sum_i ||f(X(t_{i+1})) - f(X(t_i))||``

    is in [0, 1], and 1 where the output moves along a straight line without turning back: there the mean of two
    tokens gives the mean of their outputs or something between them, and merging does no harm. The paper finds low
    values in the first blocks and values near 1 in the last ones of a trained ViT-S, and so prunes first and merges
    later; see `suggested_switch`.

    Args:
        model: a vision transformer, see `quickmerge.models.encoder.find_encoder`; it runs in evaluation mode and is
            left as it was.
        pixels: images ``(B, C, H, W)`` or videos ``(B, T, C, H, W)``, as the model takes them.
        pairs: how many pairs of tokens; the same ones for every block.
        steps: into how many steps the path is cut.
        seed: of the draw of the pairs.

    Returns:
        ``(L,)`` float64 on the CPU, the mean over the pairs for each block; a pair whose outputs don't move counts 1.

    Raises:
        ValueError: for a number out of range, or images of a single token.
        UnsupportedModelError: if the model is no vision transformer that is known.
    """
    pairs = whole_number("pairs", pairs)
    steps = whole_number("steps", steps, 2)
    encoder = find_encoder(model)
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(output)

    modes = {module: module.training for module in model.modules()}
    # What leaves a block's second norm is what its feed-forward part reads.
    norms = [block.second_norm for block in encoder.blocks if block.second_norm is not None]
    if len(norms) != len(encoder):
        raise UnsupportedModelError(
            f"{type(model).__name__} has blocks that are not attention and then a feed-forward part, each with a norm "
            "in front: the linearity of a feed-forward part can't be told of them"
        )
    hooks = [norm.register_forward_hook(keep) for norm in norms]
    try:
        model.eval()
        encoder.base(pixels)
        for hook in hooks:
            hook.remove()
        found = [
            _linearity(_feed_forward(block), x, pairs, steps, seed)
            for block, x in zip(encoder.blocks, inputs, strict=True)
        ]
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return torch.stack(found)


def suggested_switch(linearity: Tensor) -> int:
    """The block from which on ToFu should merge: the first from which on all are nearer to the best than to the worst.

    That is the first block such that it and all above it have at least the midpoint between the least and the largest
    value. Where all are alike it is 0: then no block is worse to merge in than another.

    Args:
        linearity: ``(L,)``, as `functional_linearity` gives it.

    Returns:
        In ``0..L``; L, prune everywhere, where the last block is below the midpoint.

    Raises:
        ValueError: if ``linearity`` is no row of finite numbers.
    """
    if linearity.ndim != 1 or not len(linearity) or not bool(linearity.isfinite().all()):
        raise ValueError(f"linearity must be a row of finite numbers, one for each block, got {linearity!r}")
    middle = (linearity.min() + linearity.max()) / 2
    low = (linearity < middle).nonzero().flatten()
    return int(low[-1]) + 1 if len(low) else 0


def _feed_forward(block: Block) -> Callable[[Tensor], Tensor]:
    feed: Any = block.feed_forward
    if not block.adds_residual:
        return feed  # type: ignore[no-any-return]
    inner = getattr(block.module, "intermediate", None)
    if not isinstance(inner, nn.Module):
        raise UnsupportedModelError(f"{type(block.module).__name__} has no module 'intermediate', which was looked for")

    def apply(x: Tensor) -> Tensor:
        out: Tensor = feed(inner(x), torch.zeros_like(x))
        return out

    return apply


def _linearity(f: Callable[[Tensor], Tensor], x: Tensor, pairs: int, steps: int, seed: int) -> Tensor:
    """Mean over pairs of tokens of ``x (B, N, D)``, drawn with ``seed``."""
    b, n = x.shape[:2]
    if n < 2:
        raise ValueError(f"pixels must be cut into at least two tokens, got {n}")
    rng = torch.Generator().manual_seed(seed)
    image = torch.randint(b, (pairs,), generator=rng)
    first = torch.randint(n, (pairs,), generator=rng)
    second = (first + torch.randint(1, n, (pairs,), generator=rng)) % n
    one, two = x[image, first][:, None], x[image, second][:, None]
    t = torch.linspace(0, 1, steps + 1, device=x.device, dtype=x.dtype)[:, None]
    y = f((1 - t) * one + t * two).double()
    path = (y[:, 1:] - y[:, :-1]).norm(dim=-1).sum(-1)
    chord = (y[:, -1] - y[:, 0]).norm(dim=-1)
    return torch.where(path > 0, chord / path.where(path > 0, 1.0), 1.0).clamp_max(1).mean().cpu()
