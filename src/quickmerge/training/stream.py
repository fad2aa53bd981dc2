"""Which items a step sees and what is random in it: pure functions of the seed, so that no state is saved."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch
from torch import Tensor

__all__ = ["Stream", "seed_generators", "stable_hash"]


def stable_hash(*parts: int | str) -> int:
    """A number in [0, 2^63) that is the same in every process and on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_generators(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed torch (all devices), numpy and Python for one micro-step of one process."""
    number = stable_hash("micro-step", seed, step, micro, rank)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


class Stream:
    """The endless sequence of a dataset's items: one permutation after another, one per epoch.

    Args:
        items: how many the dataset has.
        seed: together with an epoch's number it decides on its permutation.
    """

    def __init__(self, items: int, seed: int) -> None:
        self.items = items
        self.seed = seed
        self._epochs: dict[int, Tensor] = {}

    def take(self, start: int, stop: int) -> list[int]:
        """The items' indices at the places `start` to `stop` (without) of the sequence."""
        taken: list[int] = []
        while start < stop:
            epoch, first = divmod(start, self.items)
            last = min(first + stop - start, self.items)
            taken += self._permutation(epoch)[first:last].tolist()
            start += last - first
        return taken

    def micro_steps(
        self, step: int, *, batch: int, accumulate: int, processes: int = 1, rank: int = 0
    ) -> list[list[int]]:
        """The indices of each of the `accumulate` micro-steps of one process in one step, `batch` of them each.

        A step reads the next ``batch * accumulate * processes`` places. Each process takes one stretch of them, so
        that all together read what a single process with a larger batch would.
        """
        share = batch * accumulate
        start = (step * processes + rank) * share
        taken = self.take(start, start + share)
        return [taken[first : first + batch] for first in range(0, share, batch)]

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            # A step seldom spans more than two epochs, and a permutation may be large.
            self._epochs = {known: order for known, order in self._epochs.items() if known == epoch - 1}
            generator = torch.Generator().manual_seed(stable_hash("epoch", self.seed, epoch))
            self._epochs[epoch] = torch.randperm(self.items, generator=generator)
        return self._epochs[epoch]
