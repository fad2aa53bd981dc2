"""What holds of the clusters of a layer, whatever was done to them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from quickmerge.multipole.clustering import block_lengths
from quickmerge.multipole.clusters import Clusters
from quickmerge.multipole.settings import Multipole


def check(
    clusters: Clusters, keys: Tensor, values: Tensor, size: Tensor | None, settings: Multipole | None = None
) -> None:
    """Every law of `Clusters`, said literally; with ``settings`` also how they were cut into blocks."""
    batch, heads, total = keys.shape[:3]
    sizes = torch.ones(batch, total, dtype=torch.float64) if size is None else size.double()
    loose = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-10}[keys.dtype]
    lengths = (clusters.end - clusters.start).tolist()
    assert clusters.width >= max(lengths) and clusters.labels.shape == clusters.order.shape
    assert (
        clusters.labels.dtype == clusters.order.dtype == clusters.members.dtype == clusters.offset.dtype == torch.int32
    )
    assert clusters.count.dtype == torch.float32
    assert clusters.key.dtype == keys.dtype and clusters.value.dtype == values.dtype
    assert clusters.key.shape == (batch, heads, len(clusters), keys.shape[3])
    assert clusters.value.shape == (batch, heads, len(clusters), values.shape[3])
    for row in range(batch):
        start, length = int(clusters.start[row]), lengths[row]
        blocks = clusters.blocks[row]
        assert sum(b.length for b in blocks) == length and sum(b.clusters for b in blocks) <= len(clusters)
        for before, after in pairwise(blocks):
            assert (after.first, after.cluster) == (before.first + before.length, before.cluster + before.clusters)
        if settings is not None:
            assert [b.length for b in blocks] == block_lengths(length, settings.block)
            assert [b.clusters for b in blocks] == [settings.clusters(b.length) for b in blocks]
        for head in range(heads):
            labels = clusters.labels[row, head].long()
            assert (labels[length:] == -1).all() and (clusters.order[row, head, length:] == 0).all()
            labels = labels[:length]
            for block in blocks:  # nobody belongs to a cluster of another block
                own = labels[block.first : block.first + block.length]
                assert ((own >= block.cluster) & (own < block.cluster + block.clusters)).all()
            members = torch.bincount(labels, minlength=len(clusters))
            assert clusters.members[row, head].tolist() == members.tolist() and int(members.sum()) == length
            assert clusters.offset[row, head].tolist() == (members.cumsum(0) - members).tolist()
            assert clusters.order[row, head, :length].tolist() == labels.argsort(stable=True).tolist()
            for i in range(len(clusters)):
                own = (labels == i).nonzero()[:, 0] + start
                w = sizes[row, own]
                assert clusters.count[row, head, i].item() == w.sum().item()
                there = w > 0
                w, own = w[there], own[there]
                for x, mean in ((keys, clusters.key), (values, clusters.value)):
                    of = x[row, head, own].double()
                    want = (w[:, None] * of).sum(0) / w.sum() if len(w) else torch.zeros(x.shape[3]).double()
                    torch.testing.assert_close(mean[row, head, i].double(), want, rtol=loose, atol=loose)
                if clusters.spread is not None:
                    of = keys[row, head, own].double()
                    away = (of - (w[:, None] * of).sum(0) / w.sum().clamp_min(1e-9)).square().sum(1)
                    want = (w * away).sum() / w.sum() if len(w) else torch.zeros(()).double()
                    torch.testing.assert_close(
                        clusters.spread[row, head, i].double(), want, rtol=max(loose, 1e-5), atol=max(loose, 1e-5)
                    )


def same(a: Clusters, b: Clusters, rows: slice = slice(None), loose: float = 0.0) -> None:
    """Equal to the last bit, or to within ``loose``, but for how far shorter rows are filled up."""
    blocks = b.blocks[rows]
    assert a.blocks == blocks and torch.equal(a.start, b.start[rows]) and torch.equal(a.end, b.end[rows])
    for name in ("labels", "order"):
        assert torch.equal(getattr(a, name), getattr(b, name)[rows, :, : a.width])
    for name in ("members", "offset"):
        assert torch.equal(getattr(a, name), getattr(b, name)[rows, :, : len(a)])
    for name in ("key", "value", "count", "spread", "settled"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y[rows, :, : len(a)], rtol=loose, atol=loose)
