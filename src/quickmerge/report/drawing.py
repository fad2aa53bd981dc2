"""Draw with matplotlib without touching its global state for longer than one figure, and save the result."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.errors import QuickmergeError
from quickmerge.report.files import write_atomically
from quickmerge.report.palette import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
