"""Settings, models and comparisons that the tests of multipole attention in models share."""

from __future__ import annotations

from typing import Any

import torch
from caches import past
from hosts_zoo import build
from torch import Tensor

from quickmerge.multipole import MultipoleLayer

ALL = 10_000
SMALL: dict[str, Any] = {"budget": 24, "sink": 3, "interval": 8, "ratio": 0.25, "block": 32}
"""Many clusters, blocks and updates on a short text."""
FULL: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}}
"""Where a family has no block with full attention otherwise."""


def model_of(family: str = "llama", dtype: torch.dtype = torch.float64, attn: str = "sdpa", **more: Any) -> Any:
    return build(family, attn, dtype, **FULL.get(family, {}), **more)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def all_close(found: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.logits, wanted.logits, strict=True):
        close(a, b, tolerance)


def clustered(cache: Any) -> list[MultipoleLayer]:
    return [layer for layer in cache.layers if isinstance(layer, MultipoleLayer) and layer.clusters is not None]


def read(model: Any, ids: Tensor, cache: Any, step: int = 1) -> Tensor:
    """Logits of tokens that are read a few at a time."""
    parts = [model(part, **past(cache)).logits for part in ids.split(step, 1)]
    return torch.cat(parts, 1)


def check_clusters(layer: MultipoleLayer) -> None:
    """Each row's clusters are those of its own keys and values."""
    clusters = layer.clusters
    assert clusters is not None
    for row, blocks in enumerate(clusters.blocks):
        first = int(clusters.start[row])
        length = sum(b.length for b in blocks)
        assert int(clusters.end[row]) == first + length and (length == 0 or first + length <= layer.get_seq_length())
        for head in range(layer.keys.shape[1]):
            label = clusters.labels[row, head, :length]
            for i in label.unique().tolist():
                members = first + (label == i).nonzero()[:, 0]
                assert int(clusters.members[row, head, i]) == len(members)
                torch.testing.assert_close(clusters.key[row, head, i], layer.keys[row, head, members].mean(0))
                torch.testing.assert_close(clusters.value[row, head, i], layer.values[row, head, members].mean(0))
