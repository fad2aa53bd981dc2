"""The vision encoders of transformers, by family: those that the tests prove, and why the others are refused.

The table is written by tests/merge/vision/test_zoo.py, which holds it against the installed transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent.parent / "data" / "vision.json"


@dataclass(frozen=True)
class VisionRow:
    """One family.

    Args:
        family: its ``model_type``.
        model: the class that was tried.
        refused: the trait because of which it is refused; None where it is served.
        prefix: how many tokens stand in front of its patches.
        any_size: whether it reads images of other sizes than its configuration says.
        traits: what a block is told of places, and the like.
    """

    family: str
    model: str
    refused: str | None = None
    prefix: int | None = None
    any_size: bool | None = None
    traits: tuple[str, ...] = ()

    @property
    def proven(self) -> bool:
        """Whether the tests prove it."""
        return self.refused is None


@cache
def vision_rows() -> tuple[VisionRow, ...]:
    """Every family with a model that reads images or videos, by name."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return tuple(
        VisionRow(family, **{**row, "traits": tuple(row.get("traits", ()))}) for family, row in table["rows"].items()
    )


VISION_FAMILIES: tuple[str, ...] = tuple(row.family for row in vision_rows() if row.proven)
"""``config.model_type`` of the vision transformers that the tests prove. Others are served if they are built alike."""
