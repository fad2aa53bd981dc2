"""A table of results, defined once for terminal, page and Markdown: its columns, and how a row fills them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, TypeAlias

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from quickmerge.terminal import plain
from quickmerge.viz.page import table

__all__ = ["Cell", "Column", "Row", "Table", "half_width", "interval", "number", "plus_minus", "text", "unless"]

Row: TypeAlias = Mapping[str, Any]
Cell: TypeAlias = Callable[[Row], str]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        header: what it is called.
        cell: writes a row's cell.
        align: ``l``, ``r`` or ``c``; empty for left in a table's first column and right in the others.
        short: what a terminal shows in place of ``cell``.
        when: says of all rows whether the table has this column; None for always.
        spare: whether a terminal that is too narrow leaves it out.
    """

    header: str
    cell: Cell
    align: str = ""
    short: Cell | None = None
    when: Callable[[Sequence[Row]], bool] | None = None
    spare: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under columns.

    Attributes:
        columns: from left to right.
        rows: from the top, each whatever its columns' cells take.
        strong: which rows are set off.
        group: what rows have in common that stand together, apart from the others.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    strong: Callable[[Row], bool] = lambda row: False
    group: Callable[[Row], object] = lambda row: None

    @property
    def shown(self) -> list[Column]:
        """The columns that these rows call for."""
        return [column for column in self.columns if column.when is None or column.when(self.rows)]

    @property
    def headers(self) -> list[str]:
        """Their names."""
        return [column.header for column in self.shown]

    @property
    def body(self) -> list[list[str]]:
        """The cells, row by row."""
        return [[column.cell(row) for column in self.shown] for row in self.rows]

    @property
    def align(self) -> str:
        """A letter for each column."""
        return "".join(column.align or "lr"[at > 0] for at, column in enumerate(self.shown))

    def markdown(self) -> str:
        """The table in Markdown, a final line break included."""
        rule = ["---" if letter == "l" else "---:" if letter == "r" else ":---:" for letter in self.align]
        lines = [self.headers, rule, *self.body]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)

    def html(self, caption: str = "") -> Markup:
        """The table as a block of a page; see `quickmerge.viz.page.table`."""
        strong = [order for order, row in enumerate(self.rows) if self.strong(row)]
        return table(self.headers, self.body, align=self.align, caption=caption, strong=strong, ruled=self._ruled())

    def print(self, console: Console, *, title: str | None = None, caption: str | None = None) -> None:
        """Print the table; where it is too wide with broken names, without spare columns, or with broken cells.

        Args:
            console: where to.
            title: above it.
            caption: below it.
        """
        needed = [column for column in self.shown if not column.spare]
        for columns, narrow in ((self.shown, False), (self.shown, True), (needed, True)):
            made = self._rich(columns, narrow=narrow)
            if _fits(made, console):
                break
        else:
            made = self._rich(needed, narrow=True, fold=True)
        if title:
            console.print(plain(title, "italic"))
        console.print(made)
        if caption:
            console.print(plain(caption, "italic"))

    def _ruled(self) -> list[int]:
        """The numbers of the rows that begin a new group."""
        groups = [self.group(row) for row in self.rows]
        return [order for order in range(1, len(groups)) if groups[order] != groups[order - 1]]

    def _rich(self, columns: Sequence[Column], *, narrow: bool, fold: bool = False) -> RichTable:
        justify: dict[str, Any] = {"l": "left", "r": "right", "c": "center"}
        made = RichTable(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        letters = dict(zip(map(id, self.shown), self.align, strict=True))
        cells = [[(column.short or column.cell)(row) for column in columns] for row in self.rows]
        for at, column in enumerate(columns):
            letter = letters[id(column)]
            # Broken, a name takes no more room than its longest word and the cells do.
            room = max(map(len, [*column.header.split(), *(line[at] for line in cells), "-"]))
            header = "\n".join(wrap(column.header, room)) if narrow else column.header
            made.add_column(plain(header), justify=justify[letter], no_wrap=not fold and letter == "r", overflow="fold")
        ruled = self._ruled()
        for order, (row, line) in enumerate(zip(self.rows, cells, strict=True)):
            if order in ruled:
                made.add_row()
            made.add_row(*(plain(cell, "bold" if self.strong(row) else "") for cell in line))
        return made


def _fits(made: RichTable, console: Console) -> bool:
    return console.measure(made, options=console.options.update(width=1000)).maximum <= console.width


# What fills the cells of most columns.


def text(key: str) -> Cell:
    """What stands under ``key``; nothing where that is None or nothing."""
    return lambda row: "" if row.get(key) is None else str(row[key])


def number(key: str, form: str = "g", *, scale: float = 1.0, unit: str = "", none: str = "") -> Cell:
    """The number under ``key`` in a format such as ``".2f"``, or ``none`` where there is none."""

    def cell(row: Row) -> str:
        value = row.get(key)
        return none if value is None else f"{value if scale == 1 else scale * value:{form}}{unit}"

    return cell


def interval(
    key: str,
    form: str,
    *,
    scale: float = 1.0,
    unit: str = "",
    ends: tuple[str, str] = ("_low", "_high"),
    base: str | None = None,
) -> Cell:
    """``0.912 (0.900 to 0.920)``: a number and its interval, nothing where there is no number.

    Args:
        key: of the number.
        form: of all three, such as ``".3f"``.
        scale: what all three are multiplied by.
        unit: behind the number.
        ends: what the keys of the interval's ends are called behind ``base``.
        base: ``key`` unless given.
    """

    def cell(row: Row) -> str:
        if row.get(key) is None:
            return ""
        names = (key, *(f"{key if base is None else base}{end}" for end in ends))
        middle, low, high = (f"{scale * row[name]:{form}}" for name in names)
        return f"{middle}{unit} ({low} to {high})"

    return cell


def half_width(key: str, form: str, *, scale: float = 1.0) -> Cell:
    """``0.912 ±0.010``: a number and half the width of its interval."""
    bare = form.removeprefix("+")
    return lambda row: f"{scale * row[key]:{form}} ±{scale * (row[f'{key}_high'] - row[f'{key}_low']) / 2:{bare}}"


def plus_minus(key: str, form: str, error: str, *, scale: float = 1.0) -> Cell:
    """``0.912 ± 0.010``: a number and its error under ``key`` and ``error``, which two add up to the error's key."""
    bare = form.removeprefix("+")
    digits = int(bare.strip(".f"))
    # Rounded first and 0 added, so that nothing prints as -0.
    return lambda row: f"{round(scale * row[key], digits) + 0.0:{form}} ± {scale * row[f'{key}{error}']:{bare}}"


def unless(test: Callable[[Row], bool], cell: Cell, otherwise: str = "") -> Cell:
    """A cell where ``test`` of the row does not hold, else ``otherwise``."""
    return lambda row: otherwise if test(row) else cell(row)
