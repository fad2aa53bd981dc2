"""Tables of what hostile inputs and kills came to: each takes the rows of a list in a result file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

WORDS = {
    "model": "folders of language models", "prior": "priors", "heads": "draft heads", "calm": "CALMs",
    "recognizer": "recognizers", "predictor": "DynamicViT predictors", "vit": "vision transformers",
    "vlm": "vision-language models", "picture": "pictures", "video": "videos and playlists", "text": "text files",
    "typed": "texts on the command line", "name": "names of files and models", "prompts": "lists of prompts",
    "labels": "lists of labels", "annotations": "annotations of pictures", "output": "places to write to",
    "option": "options out of range",
}  # fmt: skip


def inputs(rows: Sequence[Row]) -> Table:
    """How many inputs of each kind ended how, and what the dearest cost."""
    headers = ["input", "tried", "right work", "one sentence", "anything else", "longest", "most memory"]
    total: Row = {"group": "all"}
    total |= {key: max(r[key] for r in rows) for key in ("seconds", "megabytes")}
    total |= {key: sum(r[key] for r in rows) for key in ("inputs", "right", "sentence")}
    body = [
        [
            WORDS.get(r["group"], r["group"]),
            f"{r['inputs']:,}",
            f"{r['right']:,}",
            f"{r['sentence']:,}",
            f"{r['inputs'] - r['right'] - r['sentence']:,}",
            f"{r['seconds']:.1f} s",
            f"{r['megabytes']:,.0f} MB",
        ]
        for r in [*sorted(rows, key=lambda r: list(WORDS).index(r["group"])), total]
    ]
    return headers, body


def kills(rows: Sequence[Row]) -> Table:
    """How many kills hit each command where. None left anything wrong: the first one that does fails the run."""
    headers = ["command", "killed at a moment", "killed before a change of the disk", "had ended already"]
    kinds = ("moment", "change", "late")
    total: Row = {"job": "all", **{kind: sum(r[kind] for r in rows) for kind in kinds}}
    return headers, [[r["job"], *(str(r[kind]) for kind in kinds)] for r in [*rows, total]]


TRUST: dict[str, tuple[str, Callable[[Sequence[Row]], Table], str]] = {
    "fuzz": ("fuzz", inputs, "rows"),
    "kills": ("kills", kills, "rows"),
}
"""By the name in the docs: the result file, what makes the table of it, and the list that it is made of."""
