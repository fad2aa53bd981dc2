"""Lets torchvision's wheel be imported beside a torch for CPUs, in every process that an engine starts.

The wheel's compiled operators are built for another torch. No model of these tests calls them, but torchvision asks for
their names while it is imported; so they are declared in front of that.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

NAMES = ("nms", "qnms")
_HELD: list[object] = []


class _Declares(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision" and not _HELD:
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for each in NAMES:
                library.define(f"{each}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _HELD.append(library)
        return None


sys.meta_path.insert(0, _Declares())
