"""The tables and explanations of a demo report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quickmerge.report.blocks import heading, paragraph, table
from quickmerge.report.loose import facts, words
from quickmerge.report.numbers import NONE, change, count, loss, number, percent, seconds, share, size

_Run = Mapping[str, Any]


def cost_table(data: _Run, full: _Run, reduced: _Run) -> str:
    """Return what both runs took, line by line, with how much less or more that is."""
    lines: list[tuple[str, str, str, str]] = []
    tokens_in, kept = number(data, "tokens_in"), number(data, "tokens_kept")
    lines.append(("tokens per layer once reduced", count(tokens_in), count(kept), change(tokens_in, kept)))
    compute = number(data, "flops_ratio")
    if compute is not None:
        lines.append(("compute to read the prompt", "100%", percent(compute), change(1.0, compute)))
    for name, key, write in (
        ("time to read the prompt", "prefill_seconds", seconds),
        ("of which choosing and merging tokens", "reducer_seconds", seconds),
        ("time to the first answer token", "ttft_seconds", seconds),
        ("time for each further answer token", "decode_seconds_per_token", seconds),
        ("cache memory", "cache_bytes", size),
    ):
        before, after = number(full, key), number(reduced, key)
        if before is not None or after is not None:
            lines.append((name, write(before), write(after), change(before, after)))
    return table(["", "full prompt", "reduced", "difference"], lines)


def prediction(data: _Run, full: _Run, reduced: _Run) -> list[str]:
    """Return how well the text after the document was predicted, each measure explained in a sentence."""
    losses = (number(full, "nll"), number(reduced, "nll"), number(data, "nll_none"))
    recovery = number(data, "recovery")
    if recovery is None and all(value is None for value in losses):
        return []
    whole, less, without = losses
    span = without - whole if whole is not None and without is not None else None
    blocks = [
        heading("How well the model predicts what comes next"),
        paragraph(
            "NLL is how surprised the model is, on average, by each token of the text that really follows the "
            "document: lower is better."
        ),
        paragraph(
            "Recovery is the share of the improvement from reading the document that is left after the reduction: "
            "100% is as good as the full document, 0% no better than never having read it."
        ),
        table(
            ["what the model read", "NLL", "recovery"],
            [
                ("the full document", loss(whole), "100%" if whole is not None else NONE),
                ("the reduced document", loss(less), percent(recovery)),
                ("nothing", loss(without), "0%" if without is not None else NONE),
            ],
            strong=(1,),
        ),
    ]
    if span is not None and span < 0.02:
        blocks.append(
            paragraph(
                "On this text the full document hardly helps the prediction at all, so the recovery says little here."
            )
        )
    return blocks


def measured(data: _Run) -> list[str]:
    """Return how the numbers came about, in sentences."""
    keep = share(number(data, "keep"))
    layer = count(number(data, "layer"))
    sentences = [
        f"The same model read the same prompt twice: once in full, and once with the reducer "
        f"“{words(data, 'reducer')}” set to keep {keep} of the tokens "
        f"on average over the layers from {layer} on. Everything else was the same.",
        "Times are by the clock on the machine named here and differ on another one; token counts, compute and cache "
        "memory follow from the model and the prompt.",
    ]
    method = data.get("method")
    sentences += [method] if isinstance(method, str) else [str(line) for line in method or ()]
    hardware = "; ".join(f"{name} {value}".strip() for name, value in facts(data.get("hardware")))
    if data.get("hardware"):
        sentences.append(f"Machine: {hardware}.")
    return sentences
