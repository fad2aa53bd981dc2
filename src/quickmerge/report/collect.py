"""The tokens of a text beside what became of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quickmerge.evaluation.first_tokens import first_tokens
from quickmerge.hosts import reduce
from quickmerge.hosts.summary import RunStats
from quickmerge.reducers import Reducer
from quickmerge.report.cells import TokenCell
from quickmerge.tokens.plan import MergePlan


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token; bytes that are no character on their own show as a replacement sign."""
    return [tokenizer.decode([i]) for i in ids]


def plan_cells(tokenizer: Any, ids: Tensor, plan: MergePlan, protected: Tensor | None = None) -> list[TokenCell]:
    """One cell per token of a one-row plan; ``ids (N,)``.

    The anchor of a slot is the member that stands at the slot's position.
    """
    texts = token_texts(tokenizer, ids.tolist())
    slot, weight, place = plan.slot[0].tolist(), plan.weight[0].tolist(), plan.position[0].tolist()
    shut = [False] * len(texts) if protected is None else protected[0].tolist()
    return [
        TokenCell(
            text=text,
            slot=s,
            weight=w if s >= 0 else 0.0,
            anchor=s >= 0 and place[s] == i,
            protected=bool(p),
            saliency=None,
            position=i,
        )
        for i, (text, s, w, p) in enumerate(zip(texts, slot, weight, shut, strict=True))
    ]


def token_cells(
    model: Any,
    tokenizer: Any,
    text: str,
    reducer: Reducer,
    layer: Any = None,
    *,
    limit: int = 2048,
    min_tokens: int = 0,
) -> tuple[list[TokenCell], RunStats]:
    """Read the first ``limit`` tokens of a text through a reducer; its tokens as cells and the run's statistics.

    Of fewer than ``min_tokens`` tokens none are reduced, nor where all are protected.
        QuickmergeError: the text has no tokens.
    """
    ids = torch.tensor([first_tokens(tokenizer, text, limit)], device=model.device)
    with torch.inference_mode(), reduce(model, reducer, layer, min_tokens=min_tokens) as run:
        model(ids, use_cache=False, logits_to_keep=1)
    plan, protected = run.main_plan, run.protected
    return plan_cells(tokenizer, ids[0], plan, protected), run.summary()
