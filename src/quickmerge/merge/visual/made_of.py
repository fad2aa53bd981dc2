"""Which patches a visual token is made of, found out by asking the model itself.

Between the blocks of a vision tower and the language model patches are shuffled to squares, pooled, convolved, sorted,
cut off and put beside vectors of the model's own, in each family in another way. All of it can be differentiated. So
what comes out of the blocks is replaced by random numbers, and the visual tokens are pulled at: a patch belongs to the
token that it has a gradient from. One pull for each binary digit of the tokens' numbers, and one for its opposite,
names the token of every patch at once, and finds patches that belong to several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quickmerge.models.attachment import aside


@dataclass(frozen=True)
class Making:
    """How the patches of some images become visual tokens.

    ``token (P,)`` long is, for each token of the tower in the order in which a block hands them out, the number of the
    visual token that it is part of, -1 for none; ``count`` how many visual tokens there are, ``block`` the number of
    the highest block that is read. Where ``why`` is given, it says why this can't be told, and nothing else is.
    """

    token: Tensor
    count: int
    block: int
    why: str = ""

    def sums(self, x: Tensor) -> Tensor:
        """What is given of patches ``(P, ...)``, added up by visual token: ``(n, ...)``, in float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        token = self.token.to(x.device)
        out = x.new_zeros(self.count + 1, *x.shape[1:])
        return out.index_add_(0, torch.where(token < 0, self.count, token), x)[:-1]

    def means(self, x: Tensor) -> Tensor:
        """The same, averaged; 0 for a visual token that no patch is part of."""
        count = self.sums(torch.ones(len(x), device=x.device)).clamp_min(1)
        return self.sums(x) / count.view(-1, *[1] * (x.ndim - 1))

    @property
    def apart(self) -> Tensor:
        """``(n,)`` bool, the visual tokens that no patch is part of: newlines and other vectors of the model's own."""
        there = torch.zeros(self.count + 1, dtype=torch.bool, device=self.token.device)
        there[self.token] = True  # -1 is the last one
        return ~there[:-1]


def _unknown(why: str) -> Making:
    return Making(torch.zeros(0, dtype=torch.long), 0, -1, why)


def made_of(blocks: Sequence[nn.Module], make: Callable[[], Sequence[Tensor]]) -> Making:
    """Find out which patches each visual token is made of.

    Args:
        blocks: of the tower.
        make: encodes the images at hand, as the model does: visual tokens ``(..., D)``, in the order in which they
            enter the language model.

    Returns:
        The making, or why there is none to be told.
    """
    leaves: list[tuple[int, Tensor]] = []
    noise = torch.Generator().manual_seed(0)

    def replaced(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            leaf = torch.randn(whole.shape, generator=noise).to(whole.device, whole.dtype).requires_grad_()
            leaves.append((index, leaf))
            return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

        return hook

    # In front of what collects the states of a tower's blocks.
    handles = [block.register_forward_hook(replaced(i), prepend=True) for i, block in enumerate(blocks)]
    try:
        with aside(), torch.inference_mode(False), torch.enable_grad():
            vectors = [each.flatten(0, -2) for each in make()]
            return _read(torch.cat(vectors), leaves)
    finally:
        for handle in handles:
            handle.remove()


def _read(vectors: Tensor, leaves: list[tuple[int, Tensor]]) -> Making:
    if not leaves:
        return _unknown("the blocks of its vision tower were not called")
    if not vectors.requires_grad:
        return _unknown("its visual tokens are codes, which have no gradient")
    inputs = [leaf for _, leaf in leaves]
    noise = torch.Generator().manual_seed(1)
    pull = torch.randn(vectors.shape, generator=noise).to(vectors.device, vectors.dtype)

    def pulled(marks: Tensor, at: list[Tensor]) -> list[Tensor | None]:
        grads = torch.autograd.grad(vectors, at, pull * marks[:, None], retain_graph=True, allow_unused=True)
        return [None if g is None else (g != 0).any(-1).flatten() for g in grads]

    number = torch.arange(len(vectors), device=vectors.device)
    read = [i for i, hit in enumerate(pulled(torch.ones_like(number), inputs)) if hit is not None and bool(hit.any())]
    if not read:
        return _unknown("its visual tokens are not made of what the blocks of its vision tower give")
    # The block that was called last of those that are read; a tower may be called several times for several images.
    block = leaves[read[-1]][0]
    top = [leaf for index, leaf in leaves if index == block]
    token = torch.zeros(sum(leaf.shape[:-1].numel() for leaf in top), dtype=torch.long, device=vectors.device)
    fed = torch.zeros_like(token, dtype=torch.bool)
    for digit in range(max(1, (len(vectors) - 1).bit_length())):
        ones = number >> digit & 1
        one, zero = (
            torch.cat([
                torch.zeros(leaf.shape[:-1].numel(), dtype=torch.bool, device=token.device) if hit is None else hit
                for leaf, hit in zip(top, pulled(marks, top), strict=True)
            ])
            for marks in (ones, 1 - ones)
        )  # fmt: skip
        if bool((one & zero).any()):
            return _unknown("each patch is part of several of its visual tokens, as where they are resampled")
        fed |= one | zero
        token += one.long() << digit
    return Making(torch.where(fed, token, -1), len(vectors), block)
