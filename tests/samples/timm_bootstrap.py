"""timm beside a torch without CUDA: its torchvision is built for one with, and misses the operators it extends.

Import this first, then ``pytest.importorskip("timm")``.
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress

import torch


def declare_operators() -> None:
    """Declare the two operators whose fake versions torchvision registers when it is imported.

    Nothing of timm's vision transformers calls them. Where they are there, nothing is changed.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    with suppress(Exception):  # what torchvision itself brings comes first
        import torchvision  # noqa: F401

        return
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


declare_operators()
