"""The benchmark of CALMs: BrierLM, operations for a token, and tokens a second, of every model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quickmerge.evaluation.calm import BrierText, compare, is_calm, text_terms
from quickmerge.evaluation.calm_cost import writing_cost
from quickmerge.evaluation.calm_speed import BATCHES, measure_speed, speed_rows

__all__ = ["bench_calm", "calm_rows", "prompts_of", "sizes"]

Row = dict[str, Any]

PROMPT = 64
"""Tokens of a prompt in the timing, at most."""


def bench_calm(
    models: Mapping[str, Any],
    text: BrierText,
    *,
    samples: int = 16,
    paths: int = 4,
    batches: Sequence[int] = BATCHES,
    new: int = 128,
    rounds: int = 5,
    seed: int = 0,
    against: str | None = None,
    advance: Callable[[str, int], None] = lambda _, __: None,
) -> tuple[list[Row], list[Row], dict[str, Tensor]]:
    """Measure every model at the same places, and let all write on in turn.

    Args:
        models: by name, in eval mode; CALMs, and ordinary language models of the same tokenizer.
        text: places of held-out texts.
        samples: draws of a CALM at each place and chunk.
        paths: of colliding chunks or tokens at each place.
        batches: texts that are written at a time; none: no timing.
        new: tokens that each is to have.
        rounds: how often each model takes its turn.
        seed: of all that is random.
        against: the model that others are set beside; None for the first ordinary one, or else the first.
        advance: called with a label and the places or turns done.

    Returns:
        A row for each model, one for each model and batch, and the terms ``(P, 4)`` of each model.
    """
    ordinary = [name for name, model in models.items() if not is_calm(model)]
    other = against if against is not None else (ordinary or list(models))[0]
    terms = {}
    for name, model in models.items():
        terms[name] = text_terms(model, text, samples=samples, paths=paths, seed=seed, advance=partial(advance, name))
    rows = calm_rows(models, terms, text, against=other)
    speeds: list[Row] = []
    if batches:
        prompts = prompts_of(text, max(batches))
        records = measure_speed(
            models, prompts, batches=batches, new=new, rounds=rounds, advance=lambda label: advance(label, 1)
        )
        speeds = speed_rows(records, other)
    return rows, speeds, terms


def calm_rows(models: Mapping[str, Any], terms: dict[str, Tensor], text: BrierText, *, against: str) -> list[Row]:
    """BrierLM of every model beside its size and what a token costs in the middle of a window of the text."""
    context = text.windows.shape[1] / 2
    rows = []
    for row in compare(terms, text, against=against):
        model = models[row["method"]]
        cost = writing_cost(model, context)
        rows.append({**row, **sizes(model), "flops": cost.total, "flops_parts": asdict(cost)})
    for row in rows:
        row["flops_ratio"] = row["flops"] / next(r["flops"] for r in rows if r["method"] == against)
    return rows


def sizes(model: Any) -> Row:
    """K (1 for an ordinary model, of kind ``"tokens"``), parameters, and those of the autoencoder among them."""
    total = sum(p.numel() for p in model.parameters())
    if not is_calm(model):
        return {"kind": "tokens", "patch": 1, "parameters": total, "autoencoder_parameters": 0}
    own = sum(p.numel() for p in model.autoencoder.parameters())
    return {"kind": model.config.head, "patch": model.config.patch, "parameters": total, "autoencoder_parameters": own}


def prompts_of(text: BrierText, count: int) -> Tensor:
    """``count`` prompts: the beginnings of windows, again from the first where there are fewer."""
    length = max(1, min(PROMPT, text.windows.shape[1] // 2))
    return text.windows[torch.arange(count) % len(text.windows), :length]
