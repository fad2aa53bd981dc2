"""The benchmark of vision-language models: right answers and cost of every method on the same annotated images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from quickmerge.bench.harness import Arm, Result, interleave, seconds_of
from quickmerge.bench.report import Report, Section
from quickmerge.bench.stats import ratio_interval, spread
from quickmerge.bench.table import Column, Table, half_width, number, text, unless
from quickmerge.datasets.annotated import Annotated
from quickmerge.datasets.images import open_image
from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.answers import FULL, ask, exact_answers
from quickmerge.merge.run import observe

if TYPE_CHECKING:
    pass

Row = dict[str, Any]
Advance = Callable[[str], None]


def bench_answers(
    model: Any,
    processor: Any,
    pictures: Sequence[Annotated],
    arms: Sequence[Arm],
    *,
    rounds: int = 5,
    advance: Advance = lambda _: None,
) -> Result:
    """Measure what every method costs in right answers, and in time.

    Args:
        model: a vision-language model in eval mode.
        processor: its processor.
        images: with questions; see `quickmerge.datasets.annotated.read_annotated`.
        arms: see `quickmerge.merge.bench.answers`.
        rounds: how often each is timed; 0 leaves times out.
        advance: called with a label before each measurement, for progress: once for each image and arm, the model
            as it is counted, and as often for each round and one more.

    Returns:
        One row for each arm, the unmodified model first, and one record per image and arm.

    Raises:
        QuickmergeError: an image can't be read or there is none with a question.
    """
    records = [
        {"image": number, **record}
        for number, picture in enumerate(pictures)
        for record in answer_records(model, processor, picture, arms, advance)
    ]
    rows = answer_rows(records)
    if rounds:
        times = time_answers(model, processor, pictures, arms, rounds, advance)
        rows = [row | spent for row, spent in zip(rows, times, strict=True)]
    return Result(rows, records)


def answer_records(
    model: Any, processor: Any, picture: Annotated, arms: Sequence[Arm], advance: Advance = lambda _: None
) -> list[Row]:
    """What the unmodified model and every arm answered to the questions about one image: one record each."""
    image = open_image(picture.path)
    usual = ask(model, processor, image, picture.questions)
    records = []
    for arm in (FULL, *arms):
        advance(arm.label)
        own = arm.settings.get("processor")
        asked = usual if own is None else ask(model, own, image, picture.questions)
        answered = exact_answers(model, asked, arm.context(), shared=arm.settings.get("shared", True))
        records.append({
            "image": f"{picture.path.parent.name}/{picture.path.name}", "method": arm.name, "keep": arm.keep,
            "visual_in": int((usual[0].ids == model.config.image_token_id).sum()),
            "visual_kept": answered.visual_kept,
            "kinds": [q.kind for q in picture.questions], "right": list(answered.right),
        })  # fmt: skip
    return records


def answer_rows(records: Sequence[Row]) -> list[Row]:
    """Average over images, by method and share: all questions, each kind, and the change against the full model.

    Each record carries its ``image``, a name or number of its own. Intervals are over images drawn with
    replacement, since questions about one image have much in common.

    Raises:
        QuickmergeError: there is no record.
    """
    if not records:
        raise QuickmergeError("images must hold at least one with a question, got none")
    full = {r["image"]: r["right"] for r in records if r["method"] == FULL.name}
    rows = []
    for method, keep in dict.fromkeys((r["method"], r["keep"]) for r in records):
        mine = [r for r in records if (r["method"], r["keep"]) == (method, keep)]
        count = [len(r["right"]) for r in mine]
        right = [sum(r["right"]) for r in mine]
        change = [sum(r["right"]) - sum(full[r["image"]]) for r in mine]
        kinds: dict[str, list[bool]] = {}
        for record in mine:
            for kind, one in zip(record["kinds"], record["right"], strict=True):
                kinds.setdefault(kind, []).append(one)
        row: Row = {"method": method, "keep": keep, "images": len(mine), "questions": sum(count)}
        for key in ("visual_in", "visual_kept"):
            row[key] = sum(r[key] for r in mine) / len(mine)
        for name, values in (("exact", right), ("change", change)):
            row[name] = sum(values) / sum(count)
            row[f"{name}_low"], row[f"{name}_high"] = ratio_interval(values, count)
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
    arms: Sequence[Arm],
    rounds: int,
    advance: Advance = lambda _: None,
) -> list[Row]:
    """Time from an image and its first question to the first token, by arm: they take turns, in another order each.

    Returns:
        One row for each arm, the unmodified model first: median seconds of the whole (``seconds``), of the language
        model with the reducer inside (``prefill_seconds``), of the reducer with all that it has measured
        (``reducer_seconds``) and of the tower with what is measured there (``tower_seconds``); of the ratio to the
        whole of the unmodified model in the same round the median and the quartiles; and ``cache_bytes`` behind it.
    """

    def timed(arm: Arm, picture: Annotated, number: int) -> Row:
        advance(arm.label)
        image, own = open_image(picture.path), arm.settings.get("processor") or processor
        (asked,) = ask(model, own, image, picture.questions[:1])
        with torch.inference_mode(), observe(model) if arm.attach is None else arm.context() as run:
            seconds = seconds_of(partial(model, **asked.inputs, use_cache=True, logits_to_keep=1), model.device)
            stats: Any = run.summary()  # of a model with images
        return {
            "seconds": seconds, "prefill_seconds": stats.prefill_seconds, "reducer_seconds": stats.reducer_seconds,
            "tower_seconds": stats.tower_seconds, "cache_bytes": stats.prompt_cache_bytes,
        }  # fmt: skip

    shown = [pictures[turn % len(pictures)] for turn in range(rounds)]
    spent = interleave((FULL, *arms), shown, timed, warm_up=timed)
    rows = []
    for each in spent:
        row: Row = {key: median(one[key] for one in each) for key in each[0]}
        gain = [full["seconds"] / one["seconds"] for full, one in zip(spent[0], each, strict=True)]
        rows.append({**row, "rounds": rounds, **spread("speedup", gain)})
    return rows


# The benchmark of vision-language models in a terminal and on a page.


Rows = Sequence[Mapping[str, Any]]

_LEGEND = "% of the questions answered with exact match; ± is half of the 95 % interval over images"
_METHOD = (
    "Right is the % of the questions that greedy decoding answers with an exact match; change is that minus the "
    "unmodified model, on the same questions. ± is half of the 95 % interval over images drawn with replacement.",
    "Milliseconds are from an image and a question to the first token: vision tower, method and language model. "
    "Methods took turns, and speed-up is the time of the unmodified model over the method's. The cache is as the "
    "prompt left it.",
)


def _timed(rows: Rows) -> bool:
    return "seconds" in rows[0]


METHOD = Column("method", text("method"))
TOKENS = Column(
    "visual tokens", lambda r: f"{r['visual_kept']:.0f} of {r['visual_in']:.0f}", short=number("visual_kept", ".0f")
)
CHANGE = Column("change", unless(lambda r: r["method"] == "full", half_width("change", "+.1f", scale=100), "–"))
COST = (
    Column("right", half_width("exact", ".1f", scale=100)),
    CHANGE,
    Column("ms to answer", number("seconds", ".0f", scale=1e3), when=_timed),
    Column("speed-up", number("speedup", ".2f", unit="x"), when=_timed),
    Column("reducer ms", number("reducer_seconds", ".0f", scale=1e3), when=_timed, spare=True),
    Column("cache MiB", number("cache_bytes", ".1f", scale=2**-20), when=_timed),
)


def kind_columns(rows: Rows) -> list[Column]:
    """The % of right answers, a column for each kind of question."""

    def of(kind: str) -> Column:
        right = unless(lambda r: kind not in r["kinds"], lambda r: f"{100 * r['kinds'][kind]['exact']:.0f}", "–")
        return Column(kind, right)

    return [of(kind) for kind in dict.fromkeys(kind for row in rows for kind in row["kinds"])]


def answers_report(rows: Rows, meta: Mapping[str, Any]) -> Report:
    """The report of these rows and of what was measured."""
    body = ordered(rows)
    sections = [
        Section("What is still answered, for what it costs", Table([METHOD, TOKENS, *COST], body)),
        Section("Right, by kind of question", Table([METHOD, TOKENS, *kind_columns(rows)], body), _questions(rows)),
    ]
    title = f"{meta['model']}: fewer visual tokens on {_several(meta['images'], 'image')}"
    return Report(title, sections, _METHOD, meta, legend=_LEGEND)


def ordered(rows: Rows) -> list[Mapping[str, Any]]:
    """The unmodified model, then by the share that was asked for, most right answers first."""
    return sorted(rows, key=lambda row: (row["method"] != "full", -row["keep"], -row["exact"]))


def _questions(rows: Rows) -> str:
    row = rows[0]
    told = ", ".join(f"{found['questions']:,} {kind}" for kind, found in row["kinds"].items())
    return f"{_several(row['questions'], 'question')} about {_several(row['images'], 'image')}: {told}"


def _several(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
