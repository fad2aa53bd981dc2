"""The benchmark of vision-language models: right answers and cost of every method on the same annotated pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quickmerge.bench.quality import bootstrap
from quickmerge.datasets.annotated import Annotated
from quickmerge.datasets.images import open_image
from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.answers import FULL, AnswerArm, ask, exact_answers
from quickmerge.merge.observe import observe
from quickmerge.viz.page import facts, heading, page, paragraph, table, write_page

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Row = dict[str, Any]
Advance = Callable[[str], None]


def bench_answers(
    model: Any,
    processor: Any,
    pictures: Sequence[Annotated],
    arms: Sequence[AnswerArm],
    *,
    rounds: int = 5,
    advance: Advance = lambda _: None,
) -> tuple[list[Row], list[Row]]:
    """Measure what every method costs in right answers, and in time.

    Args:
        model: a vision-language model in eval mode.
        processor: its processor.
        pictures: with questions; see `quickmerge.datasets.annotated.read_annotated`.
        arms: see `quickmerge.merge.bench.answers`.
        rounds: how often each is timed; 0 leaves times out.
        advance: called with a label before each measurement, for progress: once for each picture and arm, the model
            as it is counted, and as often for each round and one more.

    Returns:
        One row for each arm, the model as it is first, and one record per picture and arm.

    Raises:
        QuickmergeError: a picture can't be read or there is none with a question.
    """
    records = [
        {"picture": number, **record}
        for number, picture in enumerate(pictures)
        for record in answer_records(model, processor, picture, arms, advance)
    ]
    rows = answer_rows(records)
    if rounds:
        times = time_answers(model, processor, pictures, arms, rounds, advance)
        rows = [row | spent for row, spent in zip(rows, times, strict=True)]
    return rows, records


def answer_records(
    model: Any, processor: Any, picture: Annotated, arms: Sequence[AnswerArm], advance: Advance = lambda _: None
) -> list[Row]:
    """What the model as it is and every arm answered to the questions about one picture: one record each."""
    image = open_image(picture.path)
    usual = ask(model, processor, image, picture.questions)
    records = []
    for arm in (FULL, *arms):
        advance(arm.label)
        asked = usual if arm.processor is None else ask(model, arm.processor, image, picture.questions)
        answered = exact_answers(model, asked, arm.context(), shared=arm.shared)
        records.append({
            "image": f"{picture.path.parent.name}/{picture.path.name}", "method": arm.name, "keep": arm.keep,
            "visual_in": int((usual[0].ids == model.config.image_token_id).sum()),
            "visual_kept": answered.visual_kept,
            "kinds": [q.kind for q in picture.questions], "right": list(answered.right),
        })  # fmt: skip
    return records


def answer_rows(records: Sequence[Row]) -> list[Row]:
    """Average over pictures, by method and share: all questions, each kind, and the change against the full model.

    Each record carries its ``picture``, a name or number of its own. Intervals are over pictures drawn with
    replacement, since questions about one picture have much in common.

    Raises:
        QuickmergeError: there is no record.
    """
    if not records:
        raise QuickmergeError("pictures must hold at least one with a question, got none")
    full = {r["picture"]: r["right"] for r in records if r["method"] == FULL.name}
    rows = []
    for method, keep in dict.fromkeys((r["method"], r["keep"]) for r in records):
        mine = [r for r in records if (r["method"], r["keep"]) == (method, keep)]
        count = [len(r["right"]) for r in mine]
        right = [sum(r["right"]) for r in mine]
        change = [sum(r["right"]) - sum(full[r["picture"]]) for r in mine]
        kinds: dict[str, list[bool]] = {}
        for record in mine:
            for kind, one in zip(record["kinds"], record["right"], strict=True):
                kinds.setdefault(kind, []).append(one)
        row: Row = {"method": method, "keep": keep, "pictures": len(mine), "questions": sum(count)}
        for key in ("visual_in", "visual_kept"):
            row[key] = sum(r[key] for r in mine) / len(mine)
        for name, values in (("exact", right), ("change", change)):
            row[name] = sum(values) / sum(count)
            low, high = bootstrap(np.array(values, float), np.array(count, float), resamples=2000, seed=0)
            row[f"{name}_low"], row[f"{name}_high"] = float(low), float(high)
        row["kinds"] = {
            kind: {"questions": len(kinds[kind]), "exact": sum(kinds[kind]) / len(kinds[kind])}
            for kind in sorted(kinds)
        }
        rows.append(row)
    return rows


def time_answers(
    model: Any,
    processor: Any,
    pictures: Sequence[Annotated],
    arms: Sequence[AnswerArm],
    rounds: int,
    advance: Advance = lambda _: None,
) -> list[Row]:
    """Time from a picture and its first question to the first token, by arm: they take turns, in another order each.

    Returns:
        One row for each arm, the model as it is first: median seconds of the whole (``seconds``), of the language model
        with the reducer inside (``prefill_seconds``), of the reducer with all that it has measured
        (``reducer_seconds``) and of the tower with what is measured there (``tower_seconds``); of the ratio to the
        whole of the model as it is in the same round the median and the quartiles; and ``cache_bytes`` behind it.
    """
    everything = (FULL, *arms)
    spent: list[list[Row]] = [[] for _ in everything]
    with torch.inference_mode():
        for round_ in range(rounds + 1):
            picture = pictures[max(0, round_ - 1) % len(pictures)]
            image = open_image(picture.path)
            for turn in range(len(everything)):
                at = (turn + round_) % len(everything)
                arm = everything[at]
                advance(arm.label)
                (asked,) = ask(model, arm.processor or processor, image, picture.questions[:1])
                with observe(model) if arm.attach is None else arm.attach() as run:
                    start = _now(model)
                    model(**asked.inputs, use_cache=True, logits_to_keep=1)
                    seconds = _now(model) - start
                    stats: Any = run.summary()  # of a model with pictures
                if round_:  # the first round warms up
                    spent[at].append({
                        "seconds": seconds, "prefill_seconds": stats.prefill_seconds,
                        "reducer_seconds": stats.reducer_seconds, "tower_seconds": stats.tower_seconds,
                        "cache_bytes": stats.prompt_cache_bytes,
                    })  # fmt: skip
    rows = []
    for each in spent:
        row: Row = {key: median(one[key] for one in each) for key in each[0]}
        gain = [full["seconds"] / one["seconds"] for full, one in zip(spent[0], each, strict=True)]
        low, middle, high = quantiles(gain, n=4) if len(gain) > 1 else gain * 3
        rows.append({**row, "rounds": rounds, "speedup": middle, "speedup_low": low, "speedup_high": high})
    return rows


def _now(model: Any) -> float:
    """Seconds, after the device has finished what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


# The benchmark of vision-language models in a terminal and on a page.


Rows = Sequence[Mapping[str, Any]]

_FIRST = ["method", "visual tokens"]
_CAPTION = "% of the questions answered to the letter; ± is half of the 95 % interval over pictures"
_METHOD = (
    "Right is the % of the questions that greedy decoding answers to the letter; change is that minus the model as it "
    "is, on the same questions. ± is half of the 95 % interval over pictures drawn with replacement.",
    "Milliseconds are from a picture and a question to the first token: vision tower, method and language model. "
    "Methods took turns, and speed-up is the time of the model as it is over the method's. The cache is as the prompt "
    "left it.",
)


def kinds_of(rows: Rows) -> list[str]:
    """Every kind of question, in order."""
    return list(dict.fromkeys(kind for row in rows for kind in row["kinds"]))


def cost_headers(rows: Rows, reducer: bool = True) -> list[str]:
    """What the columns beside method and tokens are called; those of time are there only where it was taken."""
    timed = ["ms to answer", "speed-up", *(["reducer ms"] if reducer else []), "cache MiB"]
    return ["right", "change", *(timed if "seconds" in rows[0] else [])]


def cost_cells(row: Mapping[str, Any], reducer: bool = True) -> list[str]:
    """One line of these columns."""
    full = row["method"] == "full"
    cells = [
        f"{100 * row['exact']:.1f} ±{50 * (row['exact_high'] - row['exact_low']):.1f}",
        "–" if full else f"{100 * row['change']:+.1f} ±{50 * (row['change_high'] - row['change_low']):.1f}",
    ]
    if "seconds" in row:
        own = [f"{1e3 * row['reducer_seconds']:.0f}"] if reducer else []
        cells += [f"{1e3 * row['seconds']:.0f}", f"{row['speedup']:.2f}x", *own, f"{row['cache_bytes'] / 2**20:.1f}"]
    return cells


def kind_cells(row: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    """The % of right answers to each kind of question."""
    return [f"{100 * row['kinds'][kind]['exact']:.0f}" if kind in row["kinds"] else "–" for kind in kinds]


def answers_table(rows: Rows, console: Console) -> None:
    """Print the rows, by share and the most right first; as two tables where one is too wide."""
    from quickmerge.terminal import plain

    kinds, body = kinds_of(rows), ordered(rows)
    first = [[row["method"], f"{row['visual_kept']:.0f}"] for row in body]
    asked = [kind_cells(row, kinds) for row in body]
    costs = [cost_cells(row) for row in body]
    whole = _table(cost_headers(rows) + kinds, first, [a + b for a, b in zip(costs, asked, strict=True)])
    whole.caption = _CAPTION
    if console.measure(whole, options=console.options.update(width=1000)).maximum <= console.width:
        console.print(whole)
        return
    cost = _table(cost_headers(rows, reducer=False), first, [cost_cells(row, reducer=False) for row in body])
    by_kind = _table(kinds, first, asked)
    cost.caption, by_kind.caption = _CAPTION, plain(_questions(rows))
    console.print(cost)
    console.print(by_kind)


def write_answers_report(path: Path, rows: Rows, meta: Mapping[str, Any]) -> None:
    """Write the rows and what was measured as a page."""
    kinds, body = kinds_of(rows), ordered(rows)
    first = [[row["method"], f"{row['visual_kept']:.0f} of {row['visual_in']:.0f}"] for row in body]
    cost, asked = [*_FIRST, *cost_headers(rows)], [*_FIRST, *kinds]
    blocks = [
        heading("What is still answered, for what it costs"),
        table(cost, [a + cost_cells(row) for a, row in zip(first, body, strict=True)], align=_align(cost)),
        *(paragraph(words) for words in _METHOD),
        heading("Right, by kind of question"),
        table(
            asked, [a + kind_cells(row, kinds) for a, row in zip(first, body, strict=True)], align=_align(asked),
            caption=_questions(rows),
        ),
        table(["", "this run"], facts(meta), align="ll"),
    ]  # fmt: skip
    write_page(path, page(f"{meta['model']}: fewer visual tokens on {_several(meta['images'], 'picture')}", blocks))


def ordered(rows: Rows) -> list[Mapping[str, Any]]:
    """The model as it is, then by the share that was asked for, most right answers first."""
    return sorted(rows, key=lambda row: (row["method"] != "full", -row["keep"], -row["exact"]))


def _table(headers: Sequence[str], first: Sequence[list[str]], rest: Sequence[list[str]]) -> Table:
    from rich.table import Table

    from quickmerge.terminal import plain

    printed = Table()
    for name in (*_FIRST, *headers):
        # Names take a line for each word, so that most tables fit, and cells one line.
        lines = plain("\n".join(name.split()))
        printed.add_column(lines, justify="left" if name == _FIRST[0] else "right", no_wrap=True)
    for start, end in zip(first, rest, strict=True):
        printed.add_row(*map(plain, [*start, *end]))
    return printed


def _align(headers: Sequence[str]) -> str:
    return "l" + "r" * (len(headers) - 1)


def _questions(rows: Rows) -> str:
    row = rows[0]
    told = ", ".join(f"{found['questions']:,} {kind}" for kind, found in row["kinds"].items())
    return f"{_several(row['questions'], 'question')} about {_several(row['pictures'], 'picture')}: {told}"


def _several(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
