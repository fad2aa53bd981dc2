# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton kernels of one decoding step of multipole attention (arXiv 2506.13059, section 4).

One program works for one key-value head of one row of the batch, and for one split of what that head has to read. The
`GROUP` query heads that share it are the rows of a tile, padded to `ROWS`: a power of two, at least the 16 rows of a
matrix unit. A split leaves a partial softmax: ``top``, the largest logit x; ``total``, the sum of ``e^(x - top)``; and
``out``, that of ``e^(x - top) v``. The logarithm of a key's size, or of a cluster's, is part of its x, so that all of
them merge alike.

`D` and `DV` are rounded up to the powers of two `WIDTH` and `WIDTH_V`. Products are taken in the type `DOT` and summed
in float32. What a mask leaves out is not read from memory. Importing this needs Triton.
"""

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on any device and slowly: TRITON_INTERPRET=1 before its import."""

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""What a tensor may hold, and what Triton calls it."""


@triton.jit
def _load_query(query, stride_head, head, GROUP: tl.constexpr, ROWS: tl.constexpr,
                D: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The ``(ROWS, WIDTH)`` tile of the query heads that share key-value head ``head``, zero beyond ``(GROUP, D)``."""
    r, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    there = (r < GROUP)[:, None] & (d < D)[None, :]
    return tl.load(query + (head * GROUP + r)[:, None] * stride_head + d[None, :], mask=there, other=0.0)


@triton.jit
def _load_rows(start, row, stride_row, there, D: tl.constexpr, WIDTH: tl.constexpr):
    """``(TILE, WIDTH)``: the given rows of a matrix, zero beyond ``D`` and where they are not ``there``."""
    d = tl.arange(0, WIDTH)
    mask = there[:, None] & (d < D)[None, :]
    return tl.load(start + row[:, None] * stride_row + d[None, :], mask=mask, other=0.0)


@triton.jit
def _logits(q, k, scaling, DOT: tl.constexpr):
    return tl.dot(q.to(DOT), tl.trans(k.to(DOT)), input_precision="ieee") * scaling


@triton.jit
def _weights(x, top, total):
    """A step of the running softmax, by logits ``x (ROWS, TILE)``: the past's factor, ``e^(x - top)``, top, total."""
    new = tl.maximum(top, tl.max(x, 1))
    # Before anything was seen the largest logit is -inf, and -inf - (-inf) is no number.
    finite = tl.where(new == float("-inf"), 0.0, new)
    past, p = tl.exp(top - finite), tl.exp(x - finite[:, None])
    return past, p, new, total * past + tl.sum(p, 1)


@triton.jit
def _accumulate(out, past, p, v, DOT: tl.constexpr):
    # A matrix unit wants both of one type, so the weights are rounded as the values are.
    return out * past[:, None] + tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), input_precision="ieee")


@triton.jit
def _store_partial(out, top, total, outs, tops, totals, head, slot, slots, GROUP: tl.constexpr, ROWS: tl.constexpr,
                   DV: tl.constexpr, WIDTH_V: tl.constexpr):  # fmt: skip
    """Write a partial softmax of all query heads of a key-value head to their slot of ``(heads, slots[, DV])``."""
    r, d = tl.arange(0, ROWS), tl.arange(0, WIDTH_V)
    place = (head * GROUP + r) * slots + slot
    tl.store(tops + place, top, mask=r < GROUP)
    tl.store(totals + place, total, mask=r < GROUP)
    there = (r < GROUP)[:, None] & (d < DV)[None, :]
    tl.store(outs + place[:, None] * DV + d[None, :], out, mask=there)


@triton.jit
def _largest(tops):
    """The largest of some ``top``, and 0 if all are -inf."""
    top = tl.max(tops, 0)
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit(do_not_specialize=["C"])
def lookup(
    query, query_row, query_head,
    centroids, centroid_row, centroid_head, centroid_stride,
    count, spread,
    z, tops, totals,
    H, C, scaling,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, DOT: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Centroid logits ``z (B, Hq, C)``, -inf for empty clusters, and ``tops, totals (B, Hq, splits)`` of their softmax.

    Grid ``(B * H, splits)``. With `SPREAD`, half the variance of the logits in a cluster is added, which
    ``scaling^2 |q|^2 spread / D`` estimates.
    """
    head, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, kv = head // H, head % H
    q = _load_query(query + row * query_row, query_head, kv, GROUP, ROWS, D, WIDTH)
    centroids += row * centroid_row + kv * centroid_head
    r = tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for tile in range(split, tl.cdiv(C, TILE), splits):
        c = tile * TILE + tl.arange(0, TILE)
        n = tl.load(count + head * C + c, mask=c < C, other=0.0)
        x = _logits(q, _load_rows(centroids, c.to(tl.int64), centroid_stride, n > 0, D, WIDTH), scaling, DOT)
        if SPREAD:
            length = tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
            half = tl.load(spread + head * C + c, mask=c < C, other=0.0) * (scaling * scaling / (2 * D))
            x += length[:, None] * half[None, :]
        x = tl.where((n > 0)[None, :], x, float("-inf"))
        tl.store(z + (head * GROUP + r)[:, None] * C + c[None, :], x, mask=(r < GROUP)[:, None] & (c < C)[None, :])
        x += tl.log(tl.where(n > 0, n, 1.0))[None, :]
        _, _, top, total = _weights(x, top, total)
    place = (head * GROUP + r) * splits + split
    tl.store(tops + place, top, mask=r < GROUP)
    tl.store(totals + place, total, mask=r < GROUP)


@triton.jit(do_not_specialize=["C", "splits"])
def rank(z, tops, totals, share, C, splits, GROUP: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr):
    """Estimated probability of one key of each cluster, the mean over query heads: ``share (B, H, C)``.

    ``S_c = 1 / g sum_g e^(z_gc) / sum_j N_j e^(z_gj)``. Grid ``(B * H, tiles)``; `SPLITS` is ``splits`` rounded up to a
    power of two.
    """
    head = tl.program_id(0).to(tl.int64)
    c, s = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, SPLITS)
    sums = tl.zeros([TILE], tl.float32)
    for g in range(GROUP):
        place = (head * GROUP + g) * splits + s
        parts = tl.load(tops + place, mask=s < splits, other=float("-inf"))
        top = _largest(parts)
        total = tl.sum(tl.load(totals + place, mask=s < splits, other=0.0) * tl.exp(parts - top), 0)
        x = tl.load(z + (head * GROUP + g) * C + c, mask=c < C, other=float("-inf"))
        sums += tl.exp(x - top) / tl.where(total > 0, total, 1.0)
    tl.store(share + head * C + c, sums / GROUP, mask=c < C)


@triton.jit(do_not_specialize=["n", "width", "slots"])
def read(
    query, query_row, query_head,
    keys, key_row, key_head, key_stride,
    values, value_row, value_head, value_stride,
    size, size_row,
    start, end, index, kept,
    outs, tops, totals,
    H, n, width, sink, slots, scaling,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    DV: tl.constexpr, WIDTH_V: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Exact attention: to the columns of the cache that are not clustered, sink and buffer, and to the selected ones.

    Of the clustered columns, ``start (B,)`` to ``end (B,)``, the first ``kept (B, H)`` of ``index (B, H, width)`` are
    read, counted from ``start``; and all that stand outside, from ``start - sink`` on. Grid ``(B * H, splits)``; the
    partial softmax of a split goes to the slot of its number. With `SIZE`, columns count ``size (B, n)`` times.
    """
    head, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, kv = head // H, head % H
    q = _load_query(query + row * query_row, query_head, kv, GROUP, ROWS, D, WIDTH)
    keys += row * key_row + kv * key_head
    values += row * value_row + kv * value_head
    begin = tl.load(start + row).to(tl.int32)
    clustered = tl.load(end + row).to(tl.int32) - begin
    before = tl.maximum(begin - sink, 0)
    outside = n - before - clustered
    entries = outside + tl.load(kept + head).to(tl.int32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH_V], tl.float32)
    for tile in range(split, tl.cdiv(entries, TILE), splits):
        t = tile * TILE + tl.arange(0, TILE)
        selected = (t >= outside) & (t < entries)
        around = tl.where(before + t < begin, before + t, before + t + clustered)
        listed = tl.load(index + head * width + t - outside, mask=selected, other=0).to(tl.int32)
        column = tl.where(selected, begin + listed, around).to(tl.int64)
        there = (t < entries) & (column < n)
        if SIZE:
            s = tl.load(size + row * size_row + column, mask=there, other=0.0).to(tl.float32)
            there = s > 0
        x = _logits(q, _load_rows(keys, column, key_stride, there, D, WIDTH), scaling, DOT)
        if SIZE:
            x += tl.log(tl.where(there, s, 1.0))[None, :]
        x = tl.where(there[None, :], x, float("-inf"))
        past, p, top, total = _weights(x, top, total)
        out = _accumulate(out, past, p, _load_rows(values, column, value_stride, there, DV, WIDTH_V), DOT)
    _store_partial(out, top, total, outs, tops, totals, head, split, slots, GROUP, ROWS, DV, WIDTH_V)


@triton.jit(do_not_specialize=["C", "slot", "slots"])
def replace(
    z, count, chosen,
    centroids, centroid_row, centroid_head, centroid_stride,
    outs, tops, totals,
    H, C, slot, slots,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr, WIDTH_V: tl.constexpr,
    TILE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Attention to the centroids of the clusters that are not ``chosen (B, H, C)``, each counted ``N_c`` times.

    ``z (B, Hq, C)`` comes from `lookup`. Grid ``(B * H, splits)``; the partial softmax of a split goes to slot
    ``slot + split``.
    """
    head, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, kv = head // H, head % H
    centroids += row * centroid_row + kv * centroid_head
    r = tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH_V], tl.float32)
    for tile in range(split, tl.cdiv(C, TILE), splits):
        c = tile * TILE + tl.arange(0, TILE)
        n = tl.load(count + head * C + c, mask=c < C, other=0.0)
        there = (n > 0) & (tl.load(chosen + head * C + c, mask=c < C, other=1) == 0)
        mask = (r < GROUP)[:, None] & there[None, :]
        x = tl.load(z + (head * GROUP + r)[:, None] * C + c[None, :], mask=mask, other=float("-inf"))
        x += tl.log(tl.where(there, n, 1.0))[None, :]
        past, p, top, total = _weights(x, top, total)
        v = _load_rows(centroids, c.to(tl.int64), centroid_stride, there, DV, WIDTH_V)
        out = _accumulate(out, past, p, v, DOT)
    _store_partial(out, top, total, outs, tops, totals, head, slot + split, slots, GROUP, ROWS, DV, WIDTH_V)


@triton.jit(do_not_specialize=["slots"])
def combine(outs, tops, totals, result, slots, DV: tl.constexpr, WIDTH_V: tl.constexpr, SLOTS: tl.constexpr):
    """Merge the partial softmaxes of all slots into ``result (B, Hq, DV)``; 0 where there was nothing to attend to.

    Grid ``(B * Hq,)``; `SLOTS` is ``slots`` rounded up to a power of two.
    """
    head = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SLOTS), tl.arange(0, WIDTH_V)
    parts = tl.load(tops + head * slots + s, mask=s < slots, other=float("-inf"))
    top = _largest(parts)
    total = tl.sum(tl.load(totals + head * slots + s, mask=s < slots, other=0.0) * tl.exp(parts - top), 0)
    sums = tl.zeros([WIDTH_V], tl.float32)
    for slot in range(slots):
        weight = tl.exp(tl.load(tops + head * slots + slot) - top)
        sums += weight * tl.load(outs + (head * slots + slot) * DV + d, mask=d < DV, other=0.0)
    sums = sums / tl.where(total > 0, total, 1.0)
    tl.store(result + head * DV + d, sums.to(result.dtype.element_ty), mask=d < DV)
