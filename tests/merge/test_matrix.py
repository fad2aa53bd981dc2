"""The contract: family x attention x padding x cache, against the committed table in matrix.json.

``QUICKMERGE_WRITE_MATRIX=1 pytest tests/merge/test_matrix.py`` writes the table anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import held, past
from hosts_zoo import DEPTH, WINDOW, ZOO, assert_detached, build, generate, pad, reduce, stored, tokens, window_of
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.models.compat import cache_name

TABLE = Path(__file__).parent / "matrix.json"
WRITE = os.environ.get("QUICKMERGE_WRITE_MATRIX") == "1"

PADDINGS = ("none", "left", "right")
CACHES = ("dynamic", "none")
CELLS = [
    *((f, a, p, c) for f in ZOO for a in ("eager", "sdpa") for p in PADDINGS for c in CACHES),
    *((f, a, "none", c) for f in ZOO for a in ("eager", "sdpa") for c in ("static", "quantized")),
    *((f, "flex_attention", "none", "dynamic") for f in ZOO),
]
LONG, SHORT, LAYER = 40, 29, 2
SETTINGS: dict[str, Any] = {"layer": LAYER, "sinks": 2, "recent": 6}


def name(cell: tuple[str, ...]) -> str:
    return " / ".join(cell)


class PlainQuantizedLayer(QuantizedLayer):  # type: ignore[misc]
    """A quantized layer that needs no backend: what matters is its kind."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor

    def _dequantize(self, tensor: Tensor) -> Tensor:
        return tensor


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, str]]:
    if not WRITE:
        yield json.loads(TABLE.read_text(encoding="utf-8"))
        return
    written: dict[str, str] = {}
    yield written
    TABLE.write_text(json.dumps(dict(sorted(written.items())), indent=2) + "\n", encoding="utf-8")


def test_the_table_has_these_cells_and_no_others(table: dict[str, str]) -> None:
    if WRITE:
        pytest.skip("the table is being written")
    assert sorted(table) == sorted(map(name, CELLS))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(cell))
def test_cell(cell: tuple[str, str, str, str], table: dict[str, str]) -> None:
    family, attn, padding, kind = cell
    try:
        with torch.no_grad():
            if attn == "flex_attention":
                reduce(build(family, attn), qm.QuickMerge(keep=0.5), **SETTINGS)
            elif kind in ("static", "quantized"):
                refused(family, attn, kind)
            else:
                check(family, attn, padding, kind == "dynamic")
        result = "pass"
    except QuickmergeError as error:
        # The table names the cache as the newest transformers does.
        result = f"raises {type(error).__name__}: {error}".replace(f": {cache_name()} must", ": cache must")
    if WRITE:
        table[name(cell)] = result
    assert result == table[name(cell)]


def refused(family: str, attn: str, kind: str) -> None:
    """Caches of a fixed or compressed shape; the model must come out whole, whatever they raise."""
    model = build(family, attn)
    ids = tokens(1, LONG)
    if kind == "static":
        cache: Cache = StaticCache(config=model.config, max_cache_len=64)
    else:
        cache = Cache(layers=[PlainQuantizedLayer() for _ in range(DEPTH)])
    plain = model(ids).logits
    try:
        with reduce(model, qm.QuickMerge(keep=0.5), **SETTINGS):
            model(ids, **past(cache))
    finally:
        assert_detached(model, attn)
        assert torch.equal(model(ids).logits, plain)


def check(family: str, attn: str, padding: str, cached: bool) -> None:
    model = build(family, attn)
    rows = [tokens(1, LONG, 1)[0], tokens(1, LONG if padding == "none" else SHORT, 2)[0]]
    ids, mask, position = pad(rows, "left" if padding == "none" else padding)
    inputs: dict[str, Any] = {"use_cache": cached}
    if padding != "none":
        inputs |= {"attention_mask": mask, "position_ids": position}
    plain = model(ids, **inputs).logits
    # Generating from right padding is nobody's use: there is no next place to write to.
    generates = cached and padding != "right"
    written = generate(model, ids, attention_mask=mask) if generates else None

    # 1. Keeping everything is the model, bit for bit.
    for reducer in (qm.QuickMerge(keep=1.0, window=16), qm.ToMe(keep=1.0)):
        with reduce(model, reducer, **SETTINGS):
            assert torch.equal(model(ids, **inputs).logits, plain)
            if written is not None:
                again = generate(model, ids, attention_mask=mask)
                assert torch.equal(again.sequences, written.sequences)
                assert all(torch.equal(a, b) for a, b in zip(again.logits, written.logits, strict=True))

    # 2. Keeping half reads half: in the summary, in the cache and in the output.
    kept = [int(len(row) * 0.5 + 0.5) for row in rows]
    for reducer in (qm.QuickMerge(keep=0.5, window=16), qm.ToMe(keep=0.5)):
        with reduce(model, reducer, **SETTINGS) as run:
            out = model(ids, **inputs)
        length = sum(map(len, rows)) / len(rows)
        assert run.summary().tokens_per_layer == [length] * LAYER + [sum(kept) / len(kept)] * (DEPTH - LAYER)
        assert out.logits.shape[:2] == (2, max(kept))
        assert bool(out.logits[run.plan.valid].isfinite().all())
        assert (held(out) is not None) == cached
        if cached:
            assert stored(held(out)) == [LONG] * LAYER + [max(kept)] * (DEPTH - LAYER)
            for i, layer in enumerate(held(out).layers):
                window = window_of(model.base_model.config, i)
                seen = LONG if i < LAYER else max(kept)
                assert layer.keys.shape[2] == (seen if window is None else min(seen, WINDOW - 1))

    # 3. The model comes out as it went in, also past an exception.
    assert_detached(model, attn)
    assert torch.equal(model(ids, **inputs).logits, plain)
    with pytest.raises(KeyboardInterrupt), reduce(model, qm.QuickMerge(keep=0.5), **SETTINGS):
        model(ids, **inputs)
        raise KeyboardInterrupt
    assert_detached(model, attn)
    assert torch.equal(model(ids, **inputs).logits, plain)

    # 4. A batch equals its rows. Eager attention takes its softmax in float32, and over padding it is NaN in float64
    # with or without us, so it is compared in float32.
    model = model.double() if attn == "sdpa" else model
    tolerance = 1e-9 if attn == "sdpa" else 1e-4
    for reducer in (qm.QuickMerge(keep=0.5, window=16), qm.ToMe(keep=0.5)):
        with reduce(model, reducer, **SETTINGS) as run:
            if generates:
                batch_equals_rows_generating(model, rows, ids, mask, tolerance)
            batch_equals_rows_reading(model, run, rows, ids, inputs, cached, tolerance)


def batch_equals_rows_generating(model: Any, rows: list[Tensor], ids: Tensor, mask: Tensor, tolerance: float) -> None:
    batch = generate(model, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = generate(model, row[None])
        assert torch.equal(batch.sequences[i, ids.shape[1] :], alone.sequences[0, len(row) :])
        for a, b in zip(batch.logits, alone.logits, strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=0, atol=tolerance)


def batch_equals_rows_reading(
    model: Any, run: Any, rows: list[Tensor], ids: Tensor, inputs: dict[str, Any], cached: bool, tolerance: float
) -> None:
    """The logits of the last token of each row and, with a cache, of two more tokens after it.

    A sliding-window cache keeps its last columns, padding or not: with right padding it has lost the short row's
    tokens before anybody merged, so reading on is refused.
    """
    slides = any(window_of(model.base_model.config, i) for i in range(DEPTH))
    batch = model(ids, **inputs)
    last = [int(run.plan.slot[i][run.plan.slot[i] >= 0].max()) for i in range(len(rows))]
    more = tokens(len(rows), 2, 3)
    follow = None
    if cached:
        step: dict[str, Any] = {}
        if "attention_mask" in inputs:
            step["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
            step["position_ids"] = torch.tensor([[len(row), len(row) + 1] for row in rows])
        if slides and any(ends_in_padding(inputs, i) for i in range(len(rows))):
            with pytest.raises(QuickmergeError, match="attention_mask must pad on the left where a model with sliding"):
                model(more, **past(held(batch)), **step)
        else:
            follow = model(more, **past(held(batch)), **step).logits
    for i, row in enumerate(rows):
        alone = model(row[None], use_cache=cached)
        torch.testing.assert_close(batch.logits[i, last[i]], alone.logits[0, -1], rtol=0, atol=tolerance)
        if follow is not None:
            after = model(more[i : i + 1], **past(held(alone))).logits
            torch.testing.assert_close(follow[i], after[0], rtol=0, atol=tolerance)


def ends_in_padding(inputs: dict[str, Any], row: int) -> bool:
    return "attention_mask" in inputs and not bool(inputs["attention_mask"][row, -1])


def test_every_supported_cell_passes(table: dict[str, str]) -> None:
    """The table itself promises something: what is supported passes, the rest is refused by our own errors."""
    for cell in CELLS:
        result = table[name(cell)]
        if cell[1] == "flex_attention":
            assert result.startswith("raises UnsupportedModelError: ") and "flex_attention" in result
        elif cell[3] in ("static", "quantized"):
            assert result.startswith("raises QuickmergeError: cache must be a DynamicCache")
        else:
            assert result == "pass"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_cache_made_without_a_config_serves_too(family: str) -> None:
    model = build(family, dtype=torch.float64)
    ids = tokens(2, LONG)
    with torch.no_grad(), reduce(model, qm.QuickMerge(keep=0.5), **SETTINGS):
        given = model(ids, **past(DynamicCache()))
        own = model(ids)
        assert torch.equal(given.logits, own.logits)
        more = tokens(2, 3, 5)
        a = model(more, **past(held(given))).logits
        b = model(more, **past(held(own))).logits
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
