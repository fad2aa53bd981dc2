"""The colours of every report, in one place, so page, charts and images agree.

Slot colours are bright fills that carry dark ink in both schemes. Their order matters: neighbours (also the
last and the first) stay apart for readers with deuteranopia, protanopia or tritanopia, and state is never told
by colour alone: bold, strike and underline say it too.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.errors import QuickmergeError
from quickmerge.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


# The fonts of the token map image, and which characters they can draw.


# The first comes with matplotlib, so a Latin, Greek or Cyrillic document looks the same everywhere; the others are
# what systems have for the scripts it lacks.
_FAMILIES = (
    "DejaVu Sans Mono",
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "MS Gothic",
    "Malgun Gothic",
    "Noto Sans Devanagari",
    "Noto Sans Arabic",
)
_MISSING = "▯"


def families() -> list[str]:
    """Return the families to draw with, first choice first, of those that are installed."""
    return list(_characters())


def heading_families() -> list[str]:
    """Return the families for titles: proportional first, then those for other scripts."""
    return ["DejaVu Sans", *families()]


def drawable(text: str) -> str:
    """Return ``text`` with a box for every character that no family has, instead of a warning for each."""
    known = _characters().values()
    return "".join(char if any(ord(char) in table for table in known) else _MISSING for char in text)


@cache
def _characters() -> dict[str, frozenset[int]]:
    from matplotlib.font_manager import findfont, fontManager
    from matplotlib.ft2font import FT2Font

    installed = set(fontManager.get_font_names())
    return {name: frozenset(FT2Font(findfont(name)).get_charmap()) for name in _FAMILIES if name in installed}


# Write a file whole or not at all.


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write ``content`` to ``path``, creating its folders, so that no reader ever sees half a file.

    Raises:
        QuickmergeError: the folder or the file cannot be written.
    """
    target = Path(path)
    if not target.name:
        raise QuickmergeError(f"Cannot write {os.fspath(target)!r}: it names a folder, not a file.")
    write_bytes(target, content)
    return target


# Draw with matplotlib without touching its global state for longer than one figure, and save the result.


_SUFFIXES = ("png", "svg")
APART = 13
"""Points between names, one above the other."""


@contextmanager
def plain_settings(*, text_as_paths: bool) -> Iterator[None]:
    """Use matplotlib's own defaults, whatever the user's matplotlibrc says, so output is the same everywhere.

    ``$`` is never read as mathematics: names and document texts are data.
    """
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in a script that the font lacks shows as a box; a page of warnings would not help the reader.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.fonttype"] = "path" if text_as_paths else "none"
        matplotlib.rcParams["svg.hashsalt"] = "quickmerge"
        matplotlib.rcParams["text.parse_math"] = False
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` by ``height`` inches, tied to no window and no pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=72)


def bare_axes(axes: Axes, theme: Theme, *, grid: str = "y") -> None:
    """Strip ``axes`` to what a reader needs: hairlines along ``grid``, quiet ticks, no box."""
    axes.set_facecolor("none")
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.line)
    axes.tick_params(colors=theme.muted, labelsize=10, length=0, pad=6)
    axes.xaxis.label.set(color=theme.muted, size=10.5)
    axes.yaxis.label.set(color=theme.muted, size=10.5)
    axes.set_axisbelow(True)
    if grid:
        for axis in grid:
            (axes.yaxis if axis == "y" else axes.xaxis).grid(True, color=theme.line, linewidth=0.8)


def note(axes: Axes, words: str, at: tuple[float, float], by: tuple[float, float], **style: Any) -> None:
    """Write ``words`` into ``axes``, ``by`` so many points away from ``at``."""
    axes.annotate(words, at, xytext=by, textcoords="offset points", annotation_clip=False, **style)


def note_ends(axes: Axes, ends: Sequence[tuple[str, tuple[float, float], str]], by: tuple[float, float]) -> None:
    """Write names ``by`` so many points away from where lines end, one above the other where they would touch.

    The limits of ``axes`` must be settled.

    Args:
        axes: where the lines are.
        ends: of each line its name, its end and its colour; all ends in one column.
        by: points to the right, and up.
    """
    figure = axes.get_figure()
    assert figure is not None
    last = float("-inf")
    for name, end, colour in sorted(ends, key=lambda one: one[1][1]):
        height = float(axes.transData.transform(end)[1]) * 72 / figure.dpi
        last = max(height + by[1], last + APART)
        note(axes, name, end, (by[0], last - height), color=colour, fontsize=10.5)


def suffix_of(path: str | os.PathLike[str]) -> str:
    """Return ``png`` or ``svg``, the format that the name of ``path`` asks for.

    Raises:
        QuickmergeError: the name ends in neither.
    """
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in _SUFFIXES:
        raise QuickmergeError(f"Cannot draw to {os.fspath(path)!r}: the name has to end in .png or .svg.")
    return suffix


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 200) -> Path:
    """Write ``figure`` to ``path`` as PNG or SVG by its suffix; the same figure gives the same bytes."""
    kind = suffix_of(path)
    # Dates and the version of the drawing library would make every file differ.
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, dpi=dpi, metadata=metadata, facecolor=figure.get_facecolor())
    return write_atomically(path, stream.getvalue())
