"""``quickmerge plan``: what a setting will cost, before running it."""

from __future__ import annotations

from typing import Annotated

import typer

from quickmerge.console.options import (
    JSON,
    KEEP,
    LAYER,
    MODEL,
    REDUCER,
    check_output,
    one_sentence,
    parse_layer,
    quiet,
    write_json,
)
from quickmerge.errors import QuickmergeError, clean_name
from quickmerge.merge.cli.options import parse_reducer

EXAMPLE = "Example: quickmerge plan --model smollm2-135m --tokens 4096 --keep 0.4 --layer 8"


def plan(
    tokens: Annotated[int, typer.Option("--tokens", help="Length of the prompt.")] = 4096,
    model: MODEL = "smollm2-135m",
    reducer: REDUCER = "quickmerge",
    keep: KEEP = 0.4,
    layer: LAYER = None,
    json: JSON = None,
) -> None:
    """Tokens per layer, FLOPs, cache bytes, expected speed-up and break-even length, from the shapes alone."""
    from rich.table import Table

    from quickmerge.merge.bench.cost import break_even, model_shape, plan_cost
    from quickmerge.merge.run import layer_runs
    from quickmerge.merge.tokens.budget import Schedule
    from quickmerge.models import load_shape_only
    from quickmerge.terminal import Terminal

    check_output(json)
    quiet()
    if tokens < 21:
        raise QuickmergeError(f"--tokens must be at least 21 (20 are protected: 4 sinks and 16 recent), got {tokens}")
    method = parse_reducer(reducer, keep)
    shape = model_shape(load_shape_only(model))
    with one_sentence():
        schedule = Schedule.of(parse_layer(layer), len(shape.weights))
        cost = plan_cost(shape, method, schedule, tokens)
        even = break_even(shape, method, schedule)
    lossy = cost.tokens_per_layer[-1] < tokens
    table = Table(title=f"{clean_name(model)}: {tokens} tokens, {reducer} keep {keep:g}", show_header=False)
    for first, last, count in layer_runs(cost.tokens_per_layer):
        table.add_row(f"layers {first} to {last}", f"{count:g} tokens")
    table.add_row("prefill FLOPs", f"{cost.flops:.3g} of {cost.flops_full:.3g} ({100 * cost.flops_ratio:.1f} %)")
    table.add_row(
        "cache after the prompt", f"{cost.cache_bytes / 2**20:.1f} MiB of {cost.cache_bytes_full / 2**20:.1f} MiB"
    )
    table.add_row("expected prefill speed-up", f"{cost.speedup:.2f}x if time goes as FLOPs")
    table.add_row("break-even prompt length", "never" if even is None else f"{even} tokens (FLOPs saved exceed spent)")
    table.add_row("quality", "lossy: the prompt is reduced" if lossy else "lossless: nothing is reduced")
    console = Terminal()
    console.print(table)
    if even is None or tokens < even:
        console.print("This setting can't pay off at this length: the reducer spends what it saves.", style="yellow")
    write_json(json, {
        "model": model, "reducer": reducer, "keep": keep, "layers": list(schedule.layers), "tokens": tokens,
        "tokens_per_layer": list(cost.tokens_per_layer), "flops": cost.flops, "flops_full": cost.flops_full,
        "flops_ratio": cost.flops_ratio, "cache_bytes": cost.cache_bytes, "cache_bytes_full": cost.cache_bytes_full,
        "cache_ratio": cost.cache_ratio, "expected_speedup": cost.speedup, "break_even_tokens": even, "lossy": lossy,
    })  # fmt: skip
