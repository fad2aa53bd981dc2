"""How many tokens each column of a cache stands for, told by what a model hands its attention."""

from __future__ import annotations

import torch
from torch import Tensor


class Sizes:
    """The sizes of a layer's columns in one forward of the model.

    What the newest token may see is what there is, whatever it was that told the model so: padding, or the slots of a
    merge that has fewer in one row than in another.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, Tensor | None]] = {}

    def of(self, mask: Tensor | None, key_size: Tensor | None, key: Tensor) -> Tensor | None:
        """``(B, n)`` float32: tokens that each key stands for, 0 where there is none; None if each stands for itself.

        Args:
            mask: the mask of attention ``(B or 1, 1, q, n)``, bool or what is added to logits; None hides nothing.
            key_size: ``(B, n)`` whole numbers, sizes of slots; None: one each.
            key: ``(B, H, n, D)``.
        """
        valid = None if mask is None else self._valid(mask, key)
        if key_size is None:
            return None if valid is None else valid.float()
        size = key_size.clamp_min(1).float()
        return size if valid is None else torch.where(valid, size, 0.0)

    def _valid(self, mask: Tensor, key: Tensor) -> Tensor | None:
        # Blocks share their mask. It is kept, so that no other can take its address meanwhile.
        if id(mask) not in self._seen:
            last = mask[:, 0, -1, : key.shape[2]]
            there = (last if last.dtype == torch.bool else last >= 0).expand(len(key), -1)
            self._seen[id(mask)] = (mask, None if bool(there.all()) else there)
        return self._seen[id(mask)][1]
