"""The vision encoders of transformers: those that are merged in, and why the others are refused."""

from __future__ import annotations

import re
from collections import defaultdict

from quickmerge.bench.table import Column, Table, text
from quickmerge.models.vision_families import vision_rows


def vision_zoo() -> Table:
    """Families that the tests prove."""
    rows = [
        {
            "family": row.family, "model": row.model, "prefix": row.prefix,
            "sizes": "any" if row.any_size else "its own", "traits": ", ".join(row.traits),
        }
        for row in vision_rows() if row.proven
    ]  # fmt: skip
    columns = [
        Column("family", text("family")), Column("model", text("model")), Column("tokens in front", text("prefix")),
        Column("images of size", text("sizes")), Column("its blocks have", text("traits")),
    ]  # fmt: skip
    return Table(columns, rows)


def vision_refused() -> Table:
    """Families that are refused, by the trait that is told; names of one model in it are left out."""
    by_trait: defaultdict[str, list[str]] = defaultdict(list)
    for row in vision_rows():
        if row.refused is not None:
            by_trait[re.sub(r" \([^)]*\)", "", row.refused)].append(row.family)
    rows = [{"trait": trait, "families": ", ".join(found)} for trait, found in sorted(by_trait.items())]
    return Table([Column("refused because of its", text("trait")), Column("families", text("families"))], rows)
