"""``quickmerge plan``: what a setting will cost, before running it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import (
    DTYPE,
    JSON,
    KEEP,
    LAYER,
    MODEL,
    REDUCER,
    Alone,
    check_dtype,
    check_output,
    load_writer,
    one_sentence,
    parse_layer,
    progress,
    quiet,
    write_json,
)
from quickmerge.errors import QuickmergeError, clean_name
from quickmerge.merge.cli.options import parse_reducer

if TYPE_CHECKING:
    from quickmerge.merge.bench.break_even import BreakEven

EXAMPLE = "Example: quickmerge plan --model smollm2-135m --tokens 4096 --keep 0.4 --layer 8"


def plan(
    tokens: Annotated[int, typer.Option("--tokens", help="Length of the prompt.")] = 4096,
    model: MODEL = "smollm2-135m",
    reducer: REDUCER = "quickmerge",
    keep: KEEP = 0.4,
    layer: LAYER = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and time from which length merging pays here.")
    ] = False,
    dtype: DTYPE = "float32",
    json: JSON = None,
) -> None:
    """Tokens per layer, FLOPs, cache bytes, expected speed-up and break-even length, from the shapes alone.

    With --measure prefills of several lengths are timed, for half a minute; --dtype is for that.
    """
    from rich.table import Table

    from quickmerge.merge.bench.cost import break_even, model_shape, plan_cost
    from quickmerge.merge.run import layer_runs
    from quickmerge.merge.text.modes import MIN_TOKENS
    from quickmerge.merge.tokens.budget import Schedule
    from quickmerge.models import load_shape_only
    from quickmerge.terminal import Terminal

    check_output(json)
    check_dtype(dtype)
    quiet()
    if tokens < 21:
        raise QuickmergeError(f"--tokens must be at least 21 (20 are protected: 4 sinks and 16 recent), got {tokens}")
    method = parse_reducer(reducer, keep)
    shape = model_shape(load_shape_only(model))
    with one_sentence():
        schedule = Schedule.of(parse_layer(layer), len(shape.weights))
        cost = plan_cost(shape, method, schedule, tokens)
        even = break_even(shape, method, schedule)
    timed = _measured(model, dtype, method, parse_layer(layer)) if measure else None
    lossy = cost.tokens_per_layer[-1] < tokens
    table = Table(title=f"{clean_name(model)}: {tokens} tokens, {reducer} keep {keep:g}", show_header=False)
    for first, last, count in layer_runs(cost.tokens_per_layer):
        table.add_row(f"layers {first} to {last}", f"{count:g} tokens")
    table.add_row("prefill FLOPs", f"{cost.flops:.3g} of {cost.flops_full:.3g} ({100 * cost.flops_ratio:.1f} %)")
    table.add_row(
        "cache after the prompt", f"{cost.cache_bytes / 2**20:.1f} MiB of {cost.cache_bytes_full / 2**20:.1f} MiB"
    )
    table.add_row("expected prefill speed-up", f"{cost.speedup:.2f}x if time goes as FLOPs")
    table.add_row("break-even by FLOPs", "never" if even is None else f"{even} tokens (FLOPs saved exceed spent)")
    if timed is None:
        told = f"not measured (--measure); shorter prompts than {MIN_TOKENS} tokens, the default, are read in full"
    else:
        at = timed.at
        told = "never at these lengths" if at is None else f"{at.tokens} tokens ({at.ratio:.2f}x, {timed.dtype})"
    table.add_row("break-even measured", told)
    table.add_row("quality", "lossy: the prompt is reduced" if lossy else "lossless: nothing is reduced")
    console = Terminal()
    console.print(table)
    if even is None or tokens < even:
        console.print("This setting can't pay off at this length: the reducer spends what it saves.", style="yellow")
    if timed is not None:
        console.print(str(timed))
        if timed.tokens is not None:
            console.print(f"Take it by --min-tokens {timed.tokens}; quickmerge calibrate --speed keeps it in a recipe.")
    write_json(json, {
        "model": model, "reducer": reducer, "keep": keep, "layers": list(schedule.layers), "tokens": tokens,
        "tokens_per_layer": list(cost.tokens_per_layer), "flops": cost.flops, "flops_full": cost.flops_full,
        "flops_ratio": cost.flops_ratio, "cache_bytes": cost.cache_bytes, "cache_bytes_full": cost.cache_bytes_full,
        "cache_ratio": cost.cache_ratio, "expected_speedup": cost.speedup, "break_even_tokens": even, "lossy": lossy,
        "break_even_measured": None if timed is None else timed.as_dict(),
    })  # fmt: skip


def _measured(model: str, dtype: str, method: Any, layer: Any) -> BreakEven:
    """The prefill of the real model, plain and merged, at one length after another."""
    from quickmerge.merge.bench.break_even import time_merge
    from quickmerge.merge.place import Merge

    lm, tokenizer = load_writer(model, dtype)
    with one_sentence(Alone.writing(lm, tokenizer)), progress() as bar:
        task = bar.add_task("measuring", total=None)
        return time_merge(
            lm, tokenizer, Merge(method, layer),
            advance=lambda label: bar.update(task, advance=1, description=f"prefill of {label}"),
        )  # fmt: skip
