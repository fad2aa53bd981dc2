"""How much each token matters, from the model's own attention, never through an N x N matrix.

All statistics are exact: scores are recomputed from the queries and keys that the model itself used (after rotary
embedding), a block of query rows at a time, so memory is O(block x N).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32  # query rows scored at once: few enough for the scores of all heads to stay in cache


@dataclass(frozen=True)
class AttentionTrace:
    """Queries, keys and values of one attention layer, as the model used them.

    ``query (B, H, N, d)``, ``key (B, G, N, d)``, ``value (B, G, N, e)`` with ``G`` key heads shared by ``H / G``
    query heads each; ``scaling``, the factor on the scores; ``window``, the layer's sliding window in positions,
    or None. ``chunk``: how many positions a chunk has that sees itself alone, or None; ``sinks (H,)``: a logit of each
    head that takes part in its softmax and reads nothing; ``softcap``: scores are bounded by it, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None = None
    chunk: int | None = None
    sinks: Tensor | None = None
    softcap: float | None = None


def _logits(trace: AttentionTrace, rows: Tensor, valid: Tensor, position: Tensor, bias: Tensor | None) -> Tensor:
    """Log-probabilities of attention of the chosen query rows.

    Args:
        trace: one layer.
        rows: ``(B, w)`` indices of query rows.
        valid, position: ``(B, N)``, as in TokenView.
        bias: ``(B, N)``, what the model adds to the scores of each key, such as log(size); None for nothing.

    Returns:
        ``(B, G, H/G, w, N)`` in float32 (float64 if the trace is); -inf for keys that a row doesn't see.
    """
    b, h, n, d = trace.query.shape
    g = trace.key.shape[1]
    dtype = torch.promote_types(trace.query.dtype, torch.float32)
    pick = rows[:, None, :, None].expand(b, h, rows.shape[1], d)
    query = trace.query.gather(2, pick).to(dtype).view(b, g, (h // g) * rows.shape[1], d)
    scores = (query * trace.scaling) @ trace.key.to(dtype).transpose(-1, -2)
    scores = scores.view(b, g, h // g, rows.shape[1], n)
    if trace.softcap is not None:
        scores = trace.softcap * (scores / trace.softcap).tanh()
    if bias is not None:
        scores = scores + bias.to(dtype)[:, None, None, None]
    index = torch.arange(n, device=rows.device)
    seen = (index <= rows[..., None]) & valid[:, None, :]
    if trace.window is not None:
        seen = seen & (position.gather(1, rows)[..., None] - position[:, None, :] < trace.window)
    if trace.chunk is not None:
        first = torch.where(valid, position, torch.iinfo(torch.long).max).amin(-1, keepdim=True)
        chunk = torch.div(position - first, trace.chunk, rounding_mode="floor")
        seen = seen & (chunk.gather(1, rows)[..., None] == chunk[:, None, :])
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    if trace.sinks is not None:
        sink = trace.sinks.detach().to(scores).view(1, g, h // g, 1, 1).expand(*scores.shape[:-1], 1)
        total = torch.cat([scores, sink], -1).logsumexp(-1, keepdim=True)
        return scores - total.clamp_min(torch.finfo(dtype).min)
    # A padding row sees nothing: its log-sum-exp is -inf and its probabilities become zero, not NaN.
    return scores - scores.logsumexp(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)


def last_rows(valid: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Indices of the last ``window`` valid tokens of each row and which of them are real, both ``(B, w)``."""
    n = valid.shape[1]
    end = (torch.arange(n, device=valid.device) * valid).amax(-1)
    rows = end[:, None] - torch.arange(min(window, n) - 1, -1, -1, device=valid.device)
    real = (rows >= 0) & valid.gather(1, rows.clamp_min(0))
    return rows.clamp_min(0), real


def _voting(rows: Tensor) -> Tensor:
    """``rows (B, w)`` with one of the row's own voters, whose vote is not counted again, in place of nobody.

    So what padding holds is not looked at, not even to be multiplied by zero.
    """
    if rows.shape[1] == 0:
        return rows
    return torch.where(rows >= 0, rows, rows.amax(-1, keepdim=True)).clamp_min(0)


def _per_voter(total: Tensor, there: Tensor) -> Tensor:
    """``total (B, H, N)`` by the number of voters ``there (B, w)``; zero where nobody votes, whatever padding held."""
    voters = there.sum(-1)[:, None, None]
    return (total / voters.clamp_min(1)).masked_fill(voters == 0, 0)


def received_attention(
    trace: AttentionTrace,
    valid: Tensor,
    position: Tensor,
    window: int,
    moment: int = 1,
    nearest: int | Tensor = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention that each token receives from the last ``window`` tokens of its row.

    ``r_hj = (1/w sum_{i in last w} p_hij^m)^(1/m)`` with ``p_hi = softmax(scaling * q_hi . k_h)``, causal, exact.

    Args:
        trace: one layer.
        valid, position: ``(B, N)``, as in TokenView.
        window: w, the query rows that vote.
        moment: m; 1 is the mean, 2 the root mean square, which heeds a token that few rows need much.
        nearest: count only votes for tokens at least this many positions before the voter; ``(B,)`` for a number
            of its own for each row. Probabilities stay those of the whole attention row.
        bias: ``(B, N)``, what the model adds to the scores of each key, such as log(size) of slots.

    Returns:
        ``(B, H, N)``, zero for padding; with ``moment=1`` and ``nearest=0`` it sums to one over the tokens of a row.

    Note: a statistic of the whole sequence, so for prompts that are fully known. For sequences that are being
    scored, take it inside finished chunks only.
    """
    rows, real = last_rows(valid, window)
    return attention_from(trace, torch.where(real, rows, -1), valid, position, moment, nearest, bias)


def attention_from(
    trace: AttentionTrace,
    rows: Tensor,
    valid: Tensor,
    position: Tensor,
    moment: int = 1,
    nearest: int | Tensor = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention that each token receives from chosen tokens of its row, in a causal model.

    ``r_hj = (1/w sum_{i in rows} p_hij^m)^(1/m)``, arguments as for `received_attention`; ``rows (B, w)`` long, -1 for
    nobody.

    Returns:
        ``(B, H, N)``, zero for padding and throughout where nobody votes.
    """
    there, rows = rows >= 0, _voting(rows)
    near = None if isinstance(nearest, int) and nearest <= 0 else torch.as_tensor(nearest).to(rows).view(-1, 1, 1)
    b, h, n, _ = trace.query.shape
    g = trace.key.shape[1]
    total = trace.query.new_zeros(b, g, h // g, n, dtype=torch.promote_types(trace.query.dtype, torch.float32))
    for start in range(0, rows.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        probs = _logits(trace, rows[:, part], valid, position, bias).exp_()
        if near is not None:
            distance = position.gather(1, rows[:, part])[..., None] - position[:, None, :]
            probs = probs.masked_fill_((distance < near)[:, None, None], 0)
        if moment != 1:
            probs = probs.pow_(moment)
        total = total + (there[:, None, None, None, part].to(probs.dtype) @ probs).squeeze(-2)
    mean = _per_voter(total.flatten(1, 2), there)
    return mean if moment == 1 else mean.pow(1 / moment)


def attention_norm(
    trace: AttentionTrace,
    valid: Tensor,
    position: Tensor,
    window: int,
    moment: int = 2,
    nearest: int | Tensor = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """Size of what each token contributes to the outputs of the last ``window`` tokens, ``(B, H, N)``.

    ``a_hj = (1/w sum_i ||p_hij v_hj||^m)^(1/m) = r_hj ||v_hj||``: with ``moment=2`` the root mean square length of
    the vectors that the token adds to those outputs. This is the attention-norm magnitude that QuickMerge++
    (arXiv 2508.13204) keeps tokens by. Arguments as for `received_attention`.
    """
    return times_value_norm(received_attention(trace, valid, position, window, moment, nearest, bias), trace.value)


def attention_entropy(trace: AttentionTrace, valid: Tensor, position: Tensor, bias: Tensor | None = None) -> Tensor:
    """How widely each token attends, ``(B, H, N)`` in [0, 1]: the entropy of its attention over the largest possible.

    ``h_hi = -sum_j p_hij log p_hij / log n_i`` for the n_i tokens that token i sees, and 0 where it sees itself alone.
    Without the division the entropy mostly tells the position, being at most ``log n_i``. It looks at no later token.
    (The saliency in the public code of QuickMerge++, arXiv 2508.13204, there of unprojected hidden states.)

    Args:
        trace: one layer.
        valid, position: ``(B, N)``, as in TokenView.
        bias: as for `received_attention`.

    Returns:
        ``(B, H, N)``, zero for padding.
    """
    b, n = valid.shape
    parts = []
    for start in range(0, n, BLOCK):
        rows = torch.arange(start, min(start + BLOCK, n), device=valid.device).expand(b, -1)
        log = _logits(trace, rows, valid, position, bias)
        probs, sees = log.exp(), (log > -torch.inf).sum(-1)
        entropy = -(probs * torch.where(probs > 0, log, 0.0)).sum(-1)
        parts.append((entropy / sees.clamp_min(2).to(entropy.dtype).log()).clamp_(0, 1).flatten(1, 2))
    return torch.where(valid[:, None], torch.cat(parts, -1), 0.0)


def times_value_norm(received: Tensor, value: Tensor) -> Tensor:
    """``r_hj ||v_hj|| (B, H, N)`` of ``received (B, H, N)`` and values ``(B, G, N, e)``, H / G heads sharing one."""
    norm: Tensor = torch.linalg.vector_norm(value.to(received.dtype), dim=-1)
    return received * norm.repeat_interleave(received.shape[1] // norm.shape[1], dim=1)


def bidirectional_attention(trace: AttentionTrace, rows: Tensor, bias: Tensor | None = None, moment: int = 1) -> Tensor:
    """Attention that each token receives from some tokens of its row, where every token sees every other one.

    ``r_hj = (1/w sum_{i in rows} p_hij^m)^(1/m)`` with ``p_hi = softmax(scaling * q_hi . k_h + bias)``, exact.

    Args:
        trace: one layer, without a sliding window.
        rows: ``(B, w)`` long, the tokens that vote; -1 for nobody.
        bias: ``(B, N)``, what the model adds to the scores of each key, such as log(size); -inf for padding.
        moment: m; 1 is the mean, 2 the root mean square.

    Returns:
        ``(B, H, N)``, zero for padding, and throughout where nobody votes or nobody can be seen; elsewhere it sums to
        one over the tokens of a row with ``moment=1``.

    Raises:
        ValueError: if the trace has a sliding window.
    """
    if trace.window is not None:
        raise ValueError(f"trace must be of attention in both directions, without a window, got {trace.window}")
    b, h, n, d = trace.query.shape
    g = trace.key.shape[1]
    dtype = torch.promote_types(trace.query.dtype, torch.float32)
    key = trace.key.to(dtype).transpose(-1, -2)
    there, rows = rows >= 0, _voting(rows)
    total = trace.query.new_zeros(b, h, n, dtype=dtype)
    # An image has fewer tokens than a prompt, so more rows of scores stay in cache.
    for start in range(0, rows.shape[1], 2 * BLOCK):
        part = rows[:, start : start + 2 * BLOCK]
        width = part.shape[1]
        pick = part[:, None, :, None].expand(b, h, width, d)
        query = (trace.query.gather(2, pick).to(dtype) * trace.scaling).view(b, g, (h // g) * width, d)
        scores = (query @ key).view(b, h, width, n)
        if bias is not None:
            # What padding holds, not even a number perhaps, must not matter.
            added = bias.to(dtype)[:, None, None]
            scores = torch.where(added == -torch.inf, added, scores + added)
        probs = scores.softmax(-1)
        if moment != 1:
            probs = probs.pow(moment)
        total = total + (there[:, None, None, start : start + 2 * BLOCK].to(dtype) @ probs).squeeze(-2)
    mean = _per_voter(total, there)
    if bias is not None:
        # Where all are hidden, the softmax was over nothing.
        mean = mean.masked_fill((bias == -torch.inf)[:, None], 0)
    return mean if moment == 1 else mean.pow(1 / moment)


def pool(score: Tensor, valid: Tensor, width: int, kind: str = "mean") -> Tensor:
    """Pool scores over each token's ``width`` nearest neighbours in the sequence, so that spans survive whole.

    Args:
        score: ``(B, N)`` non-negative.
        valid: ``(B, N)``; padding neither gives nor gets.
        width: odd number of tokens; 1 changes nothing.
        kind: ``"mean"`` over the neighbours that are there, or ``"max"``.

    Returns:
        ``(B, N)``, zero for padding.
    """
    if kind not in ("mean", "max"):
        raise ValueError(f"kind must be 'mean' or 'max', got {kind!r}")
    masked = torch.where(valid, score, 0.0)[:, None]
    if kind == "max":
        pooled = torch.nn.functional.max_pool1d(masked, width, stride=1, padding=width // 2)
    else:
        there = valid.to(masked.dtype)[:, None]
        total = torch.nn.functional.avg_pool1d(masked, width, stride=1, padding=width // 2)
        # Divide by the neighbours that are there, at the ends of the text as beside padding.
        share = torch.nn.functional.avg_pool1d(there, width, stride=1, padding=width // 2)
        pooled = total / share.clamp_min(1 / (2 * width))
    return torch.where(valid, pooled[:, 0], 0.0)


def numbered(group: Tensor) -> Tensor:
    """``(B, N)`` long: the spans of each row counted from 0, see `TokenView.group`."""
    begins = torch.ones_like(group, dtype=torch.bool)
    begins[:, 1:] = group[:, 1:] != group[:, :-1]
    # Counted anew, so that no number has to be looked up to know how many spans there are.
    return begins.long().cumsum(-1) - 1


def lift(score: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """Give every token the largest score in its span, so that a span is kept or merged as a whole.

    ``s_j = max of s_i over the tokens i of j's span``.

    Args:
        score: ``(B, N)`` non-negative.
        group: ``(B, N)`` long; neighbours with the same number are of one span, see `TokenView.group`.
        valid: ``(B, N)``; padding neither gives nor gets.

    Returns:
        ``(B, N)``, zero for padding.
    """
    span = numbered(group)
    masked = torch.where(valid, score, 0.0)
    largest = torch.zeros_like(masked).scatter_reduce(1, span, masked, "amax")
    return torch.where(valid, largest.gather(1, span), 0.0)
