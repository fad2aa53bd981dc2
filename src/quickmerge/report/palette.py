"""The colours of every report, in one place, so page, charts and pictures agree.

Slot colours are bright fills that carry dark ink in both schemes. Their order matters: neighbours (also the
last and the first) stay apart for readers with deuteranopia, protanopia or tritanopia, and state is never told
by colour alone: bold, strike and underline say it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SLOT_COLORS: tuple[str, ...] = ("#5bb8ec", "#f0a12b", "#9b8cf0", "#e88cc3", "#e6d544", "#43c59e", "#f58766")

# The ink on a filled slot colour, in both schemes.
ON_SLOT = "#11151c"


@dataclass(frozen=True)
class Theme:
    """The colours of one scheme, by role."""

    paper: str
    card: str
    ink: str
    muted: str
    faint: str
    line: str
    chip: str
    accent: str
    soft: str


LIGHT = Theme(
    paper="#f6f7f9",
    card="#ffffff",
    ink="#161a22",
    muted="#566070",
    faint="#717a8a",
    line="#dfe3ea",
    chip="#e6e9ef",
    accent="#1f5fd6",
    soft="#cfdcf7",
)
DARK = Theme(
    paper="#0e1116",
    card="#161a22",
    ink="#e9ecf2",
    muted="#a3adbd",
    faint="#8690a1",
    line="#2a303b",
    chip="#2b323e",
    accent="#7fb0ff",
    soft="#2a3f66",
)

# Muted companions for the reducers that are not ours: (light scheme, dark scheme).
OTHERS: tuple[tuple[str, str], ...] = (
    ("#a5670f", "#d9a255"),
    ("#2b7f66", "#63bd9f"),
    ("#7a5ba6", "#b39ddb"),
    ("#b0466f", "#e08cae"),
    ("#566070", "#a3adbd"),
    ("#7b7420", "#c2ba5c"),
)


def slot_color(order: int) -> str:
    """Return the fill of the slot that is the ``order``-th to appear."""
    return SLOT_COLORS[order % len(SLOT_COLORS)]


def rgb(color: str) -> tuple[int, int, int]:
    """Return the three 0..255 channels of ``#rrggbb``."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def blend(top: str, bottom: str, alpha: float) -> str:
    """Return ``top`` laid over ``bottom`` with opacity ``alpha``."""
    mixed = (round(a * alpha + b * (1 - alpha)) for a, b in zip(rgb(top), rgb(bottom), strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def tint_level(weight: float) -> int:
    """Return the strength step 0..9 for a token that holds ``weight`` of its slot.

    The square root keeps small shares apart: in a slot of eight equal members each holds an eighth.
    """
    share = min(max(weight, 0.0), 1.0) if math.isfinite(weight) else 0.0
    return round(9 * math.sqrt(share))


def tint_alpha(level: int) -> float:
    """Return the opacity of strength step ``level``."""
    return 0.16 + 0.055 * level
