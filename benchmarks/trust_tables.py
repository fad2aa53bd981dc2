"""Tables of what hostile inputs and kills came to: each takes the rows of a list in a result file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quickmerge.bench.table import Column, Table, number, text

Row = dict[str, Any]

WORDS = {
    "model": "folders of language models", "prior": "priors", "heads": "draft heads", "calm": "CALMs",
    "recognizer": "recognizers", "predictor": "DynamicViT predictors", "vit": "vision transformers",
    "vlm": "vision-language models", "image": "images", "video": "videos and playlists", "text": "text files",
    "typed": "texts on the command line", "name": "names of files and models", "prompts": "lists of prompts",
    "labels": "lists of labels", "annotations": "annotations of images", "output": "places to write to",
    "options": "files of options (--config)", "option": "options out of range",
}  # fmt: skip


def inputs(rows: Sequence[Row]) -> Table:
    """How many inputs of each kind ended how, and what the most expensive cost."""
    total: Row = {"group": "all"}
    total |= {key: max(r[key] for r in rows) for key in ("seconds", "megabytes")}
    total |= {key: sum(r[key] for r in rows) for key in ("inputs", "right", "sentence")}
    columns = [
        Column("input", lambda r: WORDS.get(r["group"], r["group"])), Column("tried", number("inputs", ",")),
        Column("right work", number("right", ",")), Column("one sentence", number("sentence", ",")),
        Column("anything else", lambda r: f"{r['inputs'] - r['right'] - r['sentence']:,}"),
        Column("longest", number("seconds", ".1f", unit=" s")),
        Column("most memory", number("megabytes", ",.0f", unit=" MB")),
    ]  # fmt: skip
    return Table(columns, [*sorted(rows, key=lambda r: list(WORDS).index(r["group"])), total])


def kills(rows: Sequence[Row]) -> Table:
    """How many kills hit each command where. None left anything wrong: the first one that does fails the run."""
    columns = [
        Column("command", text("job")), Column("killed at a moment", text("moment")),
        Column("killed before a change of the disk", text("change")), Column("had ended already", text("late")),
    ]  # fmt: skip
    total = {"job": "all", **{kind: sum(r[kind] for r in rows) for kind in ("moment", "change", "late")}}
    return Table(columns, [*rows, total])


TRUST: dict[str, tuple[str, Callable[[Sequence[Row]], Table], str]] = {
    "fuzz": ("fuzz", inputs, "rows"),
    "kills": ("kills", kills, "rows"),
}
"""By the name in the docs: the result file, what makes the table of it, and the list that it is made of."""
