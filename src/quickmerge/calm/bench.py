"""The benchmark of CALMs: BrierLM, FLOPs for a token, and tokens a second, of every model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quickmerge.bench.harness import Result
from quickmerge.bench.report import Report, Section
from quickmerge.bench.table import Cell, Column, Table, interval, number, text, unless
from quickmerge.calm.cost import BATCHES, measure_speed, speed_rows, writing_cost
from quickmerge.calm.evaluate import BrierText, compare, is_calm, text_terms

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
) -> tuple[Result, dict[str, Tensor]]:
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
        A row for each model, and of each model and batch its speed as a record; and the terms ``(P, 4)`` of each model.
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
    return Result(rows, speeds), terms


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


# The benchmark of CALMs in a terminal and on a page.


Rows = Sequence[Mapping[str, Any]]

_METHOD = (
    "BrierLM is 100 times the geometric mean of the Brier scores of the next one to four tokens, each clamped at zero "
    "by itself, at the same places of the same texts for every model. CALMs are measured by draws, ordinary models by "
    "their probabilities; both are unbiased. Intervals are of 95 %, over documents or windows drawn with replacement, "
    "and differences are paired.",
    "FLOPs for a token are two for each weight of a matrix, with attention to half a window, the head, and the "
    "autoencoder's decoder with its logits. Speed is tokens a second of whole calls, models taking turns: medians and "
    "quartiles.",
)


MODEL = Column("model", text("method"))
PATCH = Column("K", unless(lambda r: r["kind"] == "tokens", text("patch")))
BRIER = Column("BrierLM", interval("brier_lm", ".2f"))
PARAMETERS = Column("parameters", number("parameters", ".2f", scale=1e-6, unit=" M"))
OPERATIONS = Column("FLOPs/token", lambda r: f"{r['flops'] / 1e6:.2f} M ({r['flops_ratio']:.2f}x)")
gap = interval("gap", "+.2f")
"""The difference to the model that others are set beside."""


def calm_report(rows: Rows, speeds: Rows, draws: Rows, meta: Mapping[str, Any]) -> Report:
    """The report of these rows and of what was measured: quality, cost and speed, and what temperatures do."""
    sections = [
        Section("Quality beside cost", brier_table(rows, speeds)),
        Section("Brier scores of the next one to four tokens", terms_table(rows), printed=False),
    ]
    if draws:
        sections.append(Section("Sampling at a temperature", draws_table(draws)))
    first = rows[0]
    over = f"{first['groups']} {first['unit']}, {first['positions']} places"
    legend = f"95 % intervals over {over}; speed: median of rounds"
    return Report("Several tokens as one vector: quality and cost", sections, _METHOD, meta, legend=legend)


def brier_table(rows: Rows, speeds: Rows) -> Table:
    """BrierLM, the difference, parameters, FLOPs and tokens a second by batch."""
    paces = [
        Column(f"tokens/s, batch {batch}", pace(speeds, batch), short=pace(speeds, batch, spread=False))
        for batch in dict.fromkeys(s["batch"] for s in speeds)
    ]
    return Table([MODEL, PATCH, BRIER, Column("difference", gap), PARAMETERS, OPERATIONS, *paces], rows)


def pace(speeds: Rows, batch: int, form: str = ".0f", *, spread: bool = True) -> Cell:
    """Tokens a second of a row's model at that batch, with quartiles, and their ratio to the other model's."""
    found = {s["method"]: s for s in speeds if s["batch"] == batch}
    write = (interval if spread else number)("tokens_per_second", form)
    return lambda r: f"{write(found[r['method']])}, {found[r['method']]['speedup']:.2f}x"


def terms_table(rows: Rows) -> Table:
    """The four scores with their intervals."""

    def term(n: int) -> Column:
        def cell(r: Mapping[str, Any]) -> str:
            middle, low, high = (f"{r[f'terms{end}'][n]:.4f}" for end in ("", "_low", "_high"))
            return f"{middle} ({low} to {high})"

        return Column(f"Brier-{n + 1}", cell)

    return Table([MODEL, *map(term, range(4))], rows)


def draws_table(draws: Rows) -> Table:
    """What a temperature does, and the draws that it takes beside those of the formula."""
    columns = [
        MODEL, Column("temperature", number("temperature", ".3g")), Column("method", text("temperature_method")),
        Column("right", number("right", ".1f", scale=100, unit=" %")),
        Column("same twice", number("same", ".1f", scale=100, unit=" %")), Column("draws", number("draws", ".1f")),
        Column("by the formula", number("expected", ".1f")),
        Column("gave up", number("gave_up", ".0f", scale=100, unit=" %")),
        Column("FLOPs/token", number("flops", ".1f", scale=1e-6, unit=" M")),
    ]  # fmt: skip
    return Table(columns, draws)
