"""The token map for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quickmerge.report.cells import Slots, State, TokenCell, summary
from quickmerge.report.text import clean, split_lead

if TYPE_CHECKING:
    from rich.console import Console

# Named terminal colours follow the user's own theme, so they stay legible on light and on dark. Red and green
# never meet, for readers who cannot tell them apart.
_COLORS = ("cyan", "yellow", "magenta", "green", "blue")


def token_map_text(cells: Sequence[TokenCell], console: Console) -> None:
    """Print the document to ``console``: kept bold, merged in the colour of its slot, dropped struck through."""
    from rich.text import Text

    slots = Slots(cells)
    # Built piece by piece, never parsed: a document that says "[bold]" must print as "[bold]".
    text = Text()
    for cell in cells:
        lead, body = split_lead(clean(cell.text))
        text.append(lead)
        text.append(body.replace("\n", "↵\n"), style=_style(slots, cell))
    legend = Text(f"{summary(slots)}   ", style="bold")
    samples = {
        State.ALONE: "bold",
        State.LEADS: f"bold reverse {_COLORS[0]}",
        State.MERGED: _COLORS[0],
        State.DROPPED: "dim strike",
    }
    for state, total in slots.counts().items():
        if total:
            legend.append(f"{state.value} {total:,}", style="not bold " + samples[state])
            legend.append("   ")
    if any(cell.protected for cell in cells):
        legend.append("protected", style="not bold underline")
    console.print(legend)
    console.print()
    console.print(text, highlight=False)


def _style(slots: Slots, cell: TokenCell) -> str:
    state = slots.state(cell)
    if state is State.DROPPED:
        return "dim strike"
    mark = " underline" if cell.protected else ""
    if state is State.ALONE:
        return "bold" + mark
    color = _COLORS[slots.order[cell.slot] % len(_COLORS)]
    return (f"bold reverse {color}" if state is State.LEADS else color) + mark
