"""Perplexity of whole documents in block-causal mode: per original token, on the same positions for everybody."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def token_nll(model: Any, ids: Tensor, run: AbstractContextManager[Any] | None = None) -> Tensor:
    """NLL in nats of ``ids[:, 1:]``, ``(B, N - 1)``, in one pass without a cache."""
    with torch.inference_mode(), run or nullcontext():
        logits = model(ids.to(model.device), use_cache=False).logits[:, :-1]
        logp = logits.float().log_softmax(-1)
        picked: Tensor = logp.gather(-1, ids.to(model.device)[:, 1:, None])
        return -picked[..., 0]


def perplexity(model: Any, ids: Tensor, run: AbstractContextManager[Any] | None = None, skip: int = 0) -> float:
    """Exp of the mean NLL over all tokens after the first ``skip + 1``; never per merged token."""
    return float(token_nll(model, ids, run)[:, skip:].mean().exp())
