"""Tables of which vision-language models work, from what the tests hold: tests/merge/visual/zoo.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quickmerge.bench.table import Column, Table, text

ZOO = Path(__file__).parent.parent / "tests" / "merge" / "visual" / "zoo.json"
RAISES = "raises UnsupportedModelError: "
LAYOUTS = {
    "patches": "a patch each",
    "tiles": "squares of patches of a tile",
    "packed": "squares of patches, all images in one sequence",
    "traced": "found out by the gradient",
    "closed": "nothing is known of it",
}
"""How the table tells of a tower."""


def _rows() -> list[dict[str, Any]]:
    rows: dict[str, dict[str, str]] = json.loads(ZOO.read_text(encoding="utf-8"))
    return [{"family": family, **row} for family, row in rows.items()]


def vlm_zoo() -> Table:
    """The families that pass, and what can be done in each."""
    columns = [
        Column("family", text("family")),
        Column("what a visual token is made of", lambda r: LAYOUTS[r["layout"]]),
        Column("places", text("positions")),
        Column("methods that ask the tower", text("tower")),
        Column("inside the language model", text("inside")),
    ]
    return Table(columns, [row for row in _rows() if row["result"] == "pass"])


def vlm_zoo_refused() -> Table:
    """The families that raise, with the sentence; and those of which no small model is built."""
    columns = [Column("family", text("family")), Column("why not", lambda r: r["result"].removeprefix(RAISES))]
    return Table(columns, [row for row in _rows() if row["result"] != "pass"])


VLM_ZOO: dict[str, Callable[[], Table | None]] = {"vlm_zoo": vlm_zoo, "vlm_zoo_refused": vlm_zoo_refused}
"""By the name in the docs."""
