"""The benchmark's rows: complete, consistent, and on equal terms."""

from __future__ import annotations

import torch

from quickmerge.bench.quality import perplexity, token_nll
from quickmerge.datasets.text import Document
from quickmerge.merge.attach import reduce
from quickmerge.merge.bench.text import bench
from quickmerge.merge.reducers import QuickMerge, Random

KEYS = {
    *("reducer", "keep", "tokens_in", "tokens_kept", "nll", "nll_full", "nll_none"),
    *("recovery", "recovery_low", "recovery_high", "prefill_seconds", "prefill_speedup", "reducer_seconds"),
    *("flops_ratio", "cache_bytes", "cache_ratio"),
}


def documents(kinds: list[str | None]) -> list[Document]:
    torch.manual_seed(0)
    return [
        Document(f"d{i}", torch.randint(0, 64, (1, 40)), torch.randint(0, 64, (1, 12)), kind)
        for i, kind in enumerate(kinds)
    ]


def fitted(model, docs: list[Document]):
    """A few steps that teach the model these documents, so that context is worth something."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = torch.cat([torch.cat([d.context, d.target], 1) for d in docs])
    for _ in range(40):
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_rows_hold_every_column_and_one_full_reference(tiny_llama) -> None:
    docs = documents(["prose", "code"])
    model = fitted(tiny_llama, docs)
    found = bench(model, docs, [QuickMerge(pool=1), QuickMerge(), Random()], [0.6, 1.0], layer=1)
    rows, records = found.rows, found.records
    assert len(records) == 2 * 3 * 2
    assert len(rows) == 6 * 3  # all documents, and each of two kinds
    assert all(set(row) >= KEYS for row in rows)
    whole = [row for row in rows if row["kind"] is None]
    assert len({row["nll_full"] for row in whole}) == len({row["nll_none"] for row in whole}) == 1
    for row in whole:
        if row["keep"] == 1.0:
            assert row["recovery"] == 1.0 and row["cache_ratio"] == 1.0 and row["nll"] == row["nll_full"]
        else:
            assert row["tokens_kept"] == 24 and row["cache_ratio"] == (40 + 24) / 80
    # Two settings of one method are told apart. All are compared at equal FLOPs: only the reducer's own differ.
    ratios = {row["reducer"]: row["flops_ratio"] for row in whole if row["keep"] == 0.6}
    assert ratios["quickmerge"] == ratios["quickmerge:pool=1"] > ratios["random"] > 0.5


def test_perplexity_counts_original_tokens(tiny_llama) -> None:
    ids = torch.randint(0, 64, (2, 50))
    nll = token_nll(tiny_llama, ids)
    assert nll.shape == (2, 49)
    assert abs(perplexity(tiny_llama, ids, skip=10) - float(nll[:, 10:].mean().exp())) < 1e-6
    run = reduce(tiny_llama, Random(keep=0.5), mode="block_causal", chunk=8, window=4)
    assert token_nll(tiny_llama, ids, run).shape == (2, 49)
