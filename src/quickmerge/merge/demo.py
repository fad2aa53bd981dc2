"""The tables and explanations of a demo report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from quickmerge.bench.rows import demo_verdict, pace
from quickmerge.viz.charts import bars_chart, layers_chart
from quickmerge.viz.format import NONE, change, count, loss, number, percent, seconds, share, size
from quickmerge.viz.page import (
    cards,
    cells_of,
    columns,
    facts,
    figure,
    heading,
    lead,
    needed,
    page,
    paragraph,
    part,
    table,
    words,
)
from quickmerge.viz.tokenmap import token_map_html

_Run = Mapping[str, Any]


def cost_table(data: _Run, full: _Run, reduced: _Run) -> Markup:
    """Return what both runs took, line by line, with how much less or more that is."""
    lines: list[tuple[str, str, str, str]] = []
    tokens_in, kept = number(data, "tokens_in"), number(data, "tokens_kept")
    lines.append(("tokens per layer once reduced", count(tokens_in), count(kept), change(tokens_in, kept)))
    compute = number(data, "flops_ratio")
    if compute is not None:
        lines.append(("FLOPs to read the prompt", "100%", percent(compute), change(1.0, compute)))
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


def prediction(data: _Run, full: _Run, reduced: _Run) -> list[Markup]:
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
            "NLL is the mean negative log-likelihood of the text that really follows the document, in nats per token: "
            "lower is better."
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
        "Times are by the clock on the machine named here and differ on another one; token counts, FLOPs and cache "
        "memory follow from the model and the prompt.",
    ]
    method = data.get("method")
    sentences += [method] if isinstance(method, str) else [str(line) for line in method or ()]
    hardware = "; ".join(f"{name} {value}".strip() for name, value in facts(data.get("hardware")))
    if data.get("hardware"):
        sentences.append(f"Machine: {hardware}.")
    return sentences


# The report of one run: a document read in full and read reduced, by the same model.


_FOLD = 1500
_ANSWER_TOKENS = 100


def demo_report(data: Mapping[str, Any]) -> str:
    """Return the whole report of ``quickmerge demo`` as one HTML page.

    Args:
        data: ``model``, ``document_name``, ``question``, ``reducer``, ``keep``, ``layer``, ``full`` and ``reduced``
            (each ``answer``, ``prefill_seconds``, ``ttft_seconds``, ``decode_seconds_per_token``, ``cache_bytes``,
            ``tokens_per_layer``, ``nll``; the reduced one also ``reducer_seconds``, which is part of its
            ``prefill_seconds``), ``nll_none``, ``recovery``, ``flops_ratio``, ``tokens_in``, ``tokens_kept``, ``cells``
            (:class:`TokenCell` or mappings of its fields), ``hardware``, ``versions``, and optionally
            ``answer_tokens`` (the answer length that the time chart assumes, 100) and ``method`` (more sentences on
            how it was measured).

    Raises:
        QuickmergeError: something the report cannot do without is missing.
    """
    full, reduced = part(data, "full"), part(data, "reduced")
    document, model = words(data, "document_name"), words(data, "model")
    verdict = demo_verdict(
        model=model.partition(",")[0],  # the name, without how it was packed
        document=document,
        tokens_in=needed(data, "tokens_in"),
        tokens_kept=needed(data, "tokens_kept"),
        full_seconds=number(full, "prefill_seconds"),
        reduced_seconds=number(reduced, "prefill_seconds"),
        recovery=number(data, "recovery"),
    )
    blocks = [
        lead(verdict),
        cards(_cards(data, full, reduced)),
        *_answers(data, full, reduced),
        *_layers(data, reduced),
        heading("What it saved, and what it cost"),
        *_times(data, full, reduced),
        cost_table(data, full, reduced),
        *prediction(data, full, reduced),
        *_map(data),
        heading("How this was measured"),
        *(paragraph(text) for text in measured(data)),
        table(["", "version"], facts(data.get("versions") or {}), align="ll") if data.get("versions") else "",
    ]
    settings = (
        f"{words(data, 'reducer')} from layer {count(needed(data, 'layer'))} on, keeping {share(number(data, 'keep'))}"
    )
    return page(f"Reading {document} with fewer tokens", blocks, subtitle=f"{model} · {settings}")


def _cards(data: Mapping[str, Any], full: Mapping[str, Any], reduced: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    tokens_in, kept = needed(data, "tokens_in"), needed(data, "tokens_kept")
    before, after = number(full, "ttft_seconds"), number(reduced, "ttft_seconds")
    made = [("tokens kept", share(round(kept / max(tokens_in, 1), 3)), f"{count(kept)} of {count(tokens_in)}")]
    if before and after:
        factor, _, way = pace(before, after).rpartition(" ")
        label = f"{way} to first token" if factor != "as" else "time to first token"
        took = f"{seconds(after)} instead of {seconds(before)}"
        made.append((label, factor if factor != "as" else "the same", took))
    cache, cache_after = number(full, "cache_bytes"), number(reduced, "cache_bytes")
    if cache and cache_after is not None:
        made.append(("cache memory", percent(cache_after / cache), f"{size(cache_after)} instead of {size(cache)}"))
    recovery = number(data, "recovery")
    if recovery is not None:
        made.append(("recovery", percent(recovery), "of the benefit of reading the document"))
    return made


def _answers(data: Mapping[str, Any], full: Mapping[str, Any], reduced: Mapping[str, Any]) -> list[Markup]:
    before, after = words(full, "answer"), words(reduced, "answer")
    blocks = [
        heading("The answers"),
        paragraph(f"Question: {words(data, 'question')}"),
        columns("after the full document", before, "after the reduced document", after),
    ]
    if before.strip() == after.strip():
        blocks.append(paragraph("Both answers are the same, word for word."))
    return blocks


def _layers(data: Mapping[str, Any], reduced: Mapping[str, Any]) -> list[Markup]:
    layers = [int(value) for value in reduced.get("tokens_per_layer") or ()]
    if not layers:
        return []
    tokens_in = int(needed(data, "tokens_in"))
    saved = 1 - sum(layers) / max(1, tokens_in * len(layers))
    caption = (
        f"The model has {len(layers)} layers, and each works on every token that reaches it. Added up over the layers, "
        f"the reduced prompt has {percent(saved)} fewer tokens to work on."
    )
    return [heading("What each layer reads"), figure(layers_chart(layers, tokens_in), caption)]


def _times(data: Mapping[str, Any], full: Mapping[str, Any], reduced: Mapping[str, Any]) -> list[Markup]:
    length = int(number(data, "answer_tokens") or _ANSWER_TOKENS)
    bars = []
    for run in (full, reduced):
        prefill, decode = number(run, "prefill_seconds"), number(run, "decode_seconds_per_token")
        if prefill is None or decode is None:
            return []
        bars.append({"reading": prefill, "answering": decode * length})
    if not any(bars[0].values()):
        return []
    before, after = (sum(bar.values()) for bar in bars)
    ratio = change(before, after)
    caption = (
        f"Time to read the prompt and to write an answer of {length:,} tokens, worked out from the time of one answer "
        f"token. In all, the reduced prompt takes {ratio if ratio == 'the same' else f'{ratio} time'}."
    )
    return [figure(bars_chart(*bars), caption)]


def _map(data: Mapping[str, Any]) -> list[Markup]:
    cells = cells_of(data)
    if not cells:
        return []
    merged = any(cell.slot >= 0 and not cell.anchor for cell in cells)
    rest = (
        "A merged token lives on as a share of its slot; a dropped one is gone" if merged else "A dropped one is gone"
    )
    intro = (
        "This is the document as most layers after the first reduction saw it. A slot is what they read in place of "
        f"the tokens in it. {rest}."
    )
    caption = "Point at a token, or tap it, to see every token that shares its slot."
    return [
        heading("What became of every token"),
        paragraph(intro),
        token_map_html(cells, title=words(data, "document_name"), caption=caption, fold_after=_FOLD),
    ]
