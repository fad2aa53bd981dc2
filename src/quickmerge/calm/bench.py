"""The benchmark of CALMs: BrierLM, operations for a token, and tokens a second, of every model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quickmerge.calm.cost import BATCHES, measure_speed, speed_rows, writing_cost
from quickmerge.calm.evaluate import BrierText, compare, is_calm, text_terms
from quickmerge.viz.page import facts, heading, page, paragraph, table, write_page

if TYPE_CHECKING:
    from rich.console import Console

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


# The benchmark of CALMs in a terminal and on a page.


Rows = Sequence[Mapping[str, Any]]

_METHOD = (
    "BrierLM is 100 times the geometric mean of the Brier scores of the next one to four tokens, each clamped at zero "
    "by itself, at the same places of the same texts for every model. CALMs are measured by draws, ordinary models by "
    "their probabilities; both are unbiased. Intervals are of 95 %, over documents or windows drawn with replacement, "
    "and differences are paired.",
    "Operations for a token are two for each weight of a matrix, with attention to half a window, the head, and the "
    "autoencoder's decoder with its logits. Speed is tokens a second of whole calls, models taking turns: medians and "
    "quartiles.",
)


def calm_table(rows: Rows, speeds: Rows, draws: Rows, console: Console) -> None:
    """Print BrierLM, cost and speed of every model, and what temperatures do."""
    _print(console, *brier_cells(rows, speeds, short=True))
    if draws:
        _print(console, *draw_cells(draws))
    first = rows[0]
    console.print(
        f"95 % intervals over {first['groups']} {first['unit']}, {first['positions']} places; speed: median of rounds"
    )


def write_calm_report(path: Path, rows: Rows, speeds: Rows, draws: Rows, meta: Mapping[str, Any]) -> None:
    """Write the rows and what was measured as a page."""
    blocks = [heading("Quality beside cost"), _table(*brier_cells(rows, speeds))]
    blocks += [paragraph(words) for words in _METHOD]
    blocks += [heading("Brier scores of the next one to four tokens"), _table(*term_cells(rows))]
    if draws:
        blocks += [heading("Sampling at a temperature"), _table(*draw_cells(draws))]
    blocks.append(table(["", "this run"], facts(meta), align="ll"))
    write_page(path, page("Several tokens as one vector: quality and cost", blocks))


def brier_cells(rows: Rows, speeds: Rows, *, short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: BrierLM, the difference, parameters, operations and tokens a second by batch."""
    batches = list(dict.fromkeys(s["batch"] for s in speeds))
    headers = ["model", "K", "BrierLM", "difference", "parameters", "operations/token"]
    headers += [f"tokens/s, batch {batch}" for batch in batches]
    pace = {(s["method"], s["batch"]): s for s in speeds}
    body = []
    for r in rows:
        gap = "" if "gap" not in r else f"{r['gap']:+.2f} ({r['gap_low']:+.2f} to {r['gap_high']:+.2f})"
        cells = [
            str(r["method"]),
            "" if r["kind"] == "tokens" else str(r["patch"]),
            f"{r['brier_lm']:.2f} ({r['brier_lm_low']:.2f} to {r['brier_lm_high']:.2f})",
            gap,
            f"{r['parameters'] / 1e6:.2f} M",
            f"{r['flops'] / 1e6:.2f} M ({r['flops_ratio']:.2f}x)",
        ]
        for batch in batches:
            s = pace[r["method"], batch]
            spread = "" if short else f" ({s['per_second_low']:.0f} to {s['per_second_high']:.0f})"
            cells.append(f"{s['per_second']:.0f}{spread}, {s['speedup']:.2f}x")
        body.append(cells)
    return headers, body


def term_cells(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: the four scores with their intervals."""
    body = [
        [
            str(r["method"]),
            *(
                f"{term:.4f} ({low:.4f} to {high:.4f})"
                for term, low, high in zip(r["terms"], r["terms_low"], r["terms_high"], strict=True)
            ),
        ]
        for r in rows
    ]
    return ["model", *(f"Brier-{n}" for n in range(1, 5))], body


def draw_cells(draws: Rows) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: what a temperature does, and the draws that it takes beside those of the formula."""
    headers = ["model", "temperature", "method", "right", "same twice", "draws", "by the formula", "gave up",
               "operations/token"]  # fmt: skip
    body = [
        [
            str(r["method"]),
            f"{r['temperature']:.3g}",
            str(r["temperature_method"]),
            f"{100 * r['right']:.1f} %",
            f"{100 * r['same']:.1f} %",
            f"{r['draws']:.1f}",
            f"{r['expected']:.1f}",
            f"{100 * r['gave_up']:.0f} %",
            f"{r['flops'] / 1e6:.1f} M",
        ]
        for r in draws
    ]
    return headers, body


def _table(headers: list[str], body: list[list[str]]) -> str:
    return table(headers, body, align="l" + "r" * (len(headers) - 1))


def _print(console: Console, headers: list[str], body: list[list[str]]) -> None:
    from rich.table import Table

    from quickmerge.terminal import plain

    printed = Table()
    for at, name in enumerate(headers):
        printed.add_column(plain(name), justify="left" if at == 0 else "right", overflow="fold")
    for cells in body:
        printed.add_row(*map(plain, cells))
    console.print(printed)
