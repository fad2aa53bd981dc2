"""Tokens a second that CALMs and ordinary language models write, taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.evaluation.calm import is_calm

__all__ = ["BATCHES", "measure_speed", "speed_rows", "write_on"]

Row = dict[str, Any]

BATCHES = (1, 8, 32)


def measure_speed(
    models: Mapping[str, Any],
    prompts: Tensor,
    *,
    batches: Sequence[int] = BATCHES,
    new: int = 128,
    rounds: int = 5,
    advance: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Let every model write on from the same prompts in turn, with its cache, sampling at temperature 1.

    Nothing ends a text, so that all write equally much. Each model writes a few tokens unmeasured first.

    Args:
        models: by name, in eval mode.
        prompts: ``(B, n)`` token ids, at least as many as the largest batch.
        batches: texts that are written at a time.
        new: tokens that each is to have.
        rounds: how often each model takes its turn, the order turning.
        advance: called with a label before each turn.

    Returns:
        A record for each turn: its method, batch, round, seconds, and tokens that were written.

    Raises:
        QuickmergeError: there are too few prompts.
        ValueError: a number is out of range.
    """
    new, rounds = whole_number("new", new), whole_number("rounds", rounds)
    batches = [whole_number("batch", batch) for batch in batches]
    if len(prompts) < max(batches):
        raise QuickmergeError(
            f"prompts must be at least {max(batches)}, as many as the largest batch, got {len(prompts)}"
        )
    records = []
    names = list(models)
    for batch in batches:
        rows = prompts[:batch]
        for name in names:
            write_on(models[name], rows, min(new, 8), seed=0)
        for turn in range(rounds):
            for at in range(len(names)):
                name = names[(at + turn) % len(names)]
                advance(f"{name}, batch {batch}")
                seconds, tokens = write_on(models[name], rows, new, seed=turn)
                records.append({"method": name, "batch": batch, "round": turn, "seconds": seconds, "tokens": tokens})
    return records


def write_on(model: Any, prompts: Tensor, new: int, seed: int) -> tuple[float, int]:
    """Seconds of one call of ``generate``, and tokens that it wrote: ``new`` in each row."""
    prompts = prompts.to(model.device)
    torch.manual_seed(seed)
    with torch.inference_mode(), _endless(model):
        _wait(model)
        start = time.perf_counter()
        if is_calm(model):
            out = model.generate(prompts, torch.ones_like(prompts), max_new_tokens=new, eos_token_id=[], seed=seed)
        else:
            out = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=True, top_k=0,
                top_p=1.0, temperature=1.0,
            )  # fmt: skip
        _wait(model)
        seconds = time.perf_counter() - start
    return seconds, (out.shape[1] - prompts.shape[1]) * len(out)


def speed_rows(records: Sequence[Row], against: str | None = None) -> list[Row]:
    """A row for each batch and model: medians over rounds, with quartiles.

    ``per_second`` is tokens a second, ``speedup`` the same over that of the model ``against`` (the first unless given)
    in the same round.
    """
    other = against if against is not None else records[0]["method"]
    rows = []
    for batch, method in dict.fromkeys((r["batch"], r["method"]) for r in records):
        pace = {r["round"]: r["tokens"] / r["seconds"] for r in records if (r["batch"], r["method"]) == (batch, method)}
        own = {r["round"]: r["tokens"] / r["seconds"] for r in records if (r["batch"], r["method"]) == (batch, other)}
        row: Row = {"method": method, "batch": batch, "against": other, "rounds": len(pace)}
        ratios = [pace[turn] / own[turn] for turn in pace]
        for name, values in (("per_second", list(pace.values())), ("speedup", ratios)):
            low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
            row |= {name: median(values), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


@contextmanager
def _endless(model: Any) -> Iterator[None]:
    """Let no token end a text of an ordinary model meanwhile."""
    config = getattr(model, "generation_config", None)
    if is_calm(model) or config is None:
        yield
        return
    known = config.eos_token_id, config.pad_token_id
    config.eos_token_id, config.pad_token_id = None, known[1] if known[1] is not None else 0
    try:
        yield
    finally:
        config.eos_token_id, config.pad_token_id = known


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
