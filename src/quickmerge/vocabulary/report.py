"""What a transplant did, for a caller, for JSON and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quickmerge.vocabulary.digits import DigitReport
from quickmerge.vocabulary.plan import KINDS

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """What was done; everything but the rows themselves."""

    base: str
    donor: str | None
    tokenizer: str
    out: str | None
    """None where nothing was written."""
    base_rows: int
    rows: int
    counts: Mapping[str, int]
    """Rows of each kind."""
    kinds: NDArray[np.uint8] = field(repr=False)
    """``(rows,)``: for each id its place in ``plan.KINDS``."""
    unmapped: tuple[str, ...]
    """Special tokens of the new vocabulary that have no counterpart."""
    special: Mapping[str, tuple[str, ...]]
    """Special token -> the base's tokens that have its job."""
    matrices: Mapping[str, Mapping[str, Any]]
    """For each matrix the rule, the held-out table, what fell out of it, norms."""
    tied: bool
    identical: bool
    way_back: bool
    template: tuple[str, str]
    """Where the chat template is from, and why."""
    digits: DigitReport
    notes: tuple[str, ...]

    def rows_that_are(self, *kinds: str) -> NDArray[np.bool_]:
        """``(rows,)``: which rows are of these kinds."""
        return np.isin(self.kinds, [KINDS.index(kind) for kind in kinds])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        digits = {name: getattr(self.digits, name) for name in ("numbers", "different", "share", "base", "donor")}
        return {
            "base": self.base, "donor": self.donor, "tokenizer": self.tokenizer, "out": self.out,
            "base_rows": self.base_rows, "rows": self.rows, "counts": dict(self.counts),
            "unmapped": list(self.unmapped), "special": {k: list(v) for k, v in self.special.items()},
            "matrices": {side: dict(made) for side, made in self.matrices.items()}, "tied": self.tied,
            "identical": self.identical, "way_back": self.way_back,
            "chat_template": {"from": self.template[0], "why": self.template[1]},
            "digits": {**digits, "examples": [list(map(list_or_same, one)) for one in self.digits.examples]},
            "notes": list(self.notes),
        }  # fmt: skip


def list_or_same(value: Any) -> Any:
    """A tuple as a list, for JSON."""
    return list(value) if isinstance(value, tuple) else value
