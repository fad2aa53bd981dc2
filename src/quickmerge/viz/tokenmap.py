"""One token of a document and what became of it, and the facts a map needs about all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from quickmerge.errors import QuickmergeError
from quickmerge.viz.drawing import SLOT_COLORS, tint_level
from quickmerge.viz.format import clean, listed, one_line, split_lead
from quickmerge.viz.render import render

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class TokenCell:
    """A token of the document and where it went.

    Attributes:
        text: The raw text of the token, such as ``" the"`` or ``"\\n"``.
        slot: The slot the token went into, or -1 where it was dropped.
        weight: The share of the slot that this token makes up.
        anchor: Whether the token leads its slot.
        protected: Whether the token was protected from merging and dropping.
        saliency: How much the model looked at the token, where the reducer measured it.
        position: The position of the token in the prompt.
    """

    text: str
    slot: int
    weight: float
    anchor: bool
    protected: bool
    saliency: float | None
    position: int


class State(Enum):
    """What became of a token."""

    ALONE = "kept alone"
    LEADS = "leads a slot"
    MERGED = "merged"
    DROPPED = "dropped"


class Slots:
    """The slots of a map: their members, their colours and the state of every token."""

    def __init__(self, cells: Sequence[TokenCell]) -> None:
        if not cells:
            raise QuickmergeError("A token map needs at least one token.")
        self.cells = cells
        self.members: dict[int, list[TokenCell]] = {}
        for cell in cells:
            if cell.slot >= 0:
                self.members.setdefault(cell.slot, []).append(cell)
        # Colours go round in order of appearance among slots that hold several tokens, so neighbours differ.
        shared = (slot for slot, members in self.members.items() if len(members) > 1)
        self.order: dict[int, int] = {slot: order for order, slot in enumerate(shared)}
        self._labels: dict[int, str] = {}

    def state(self, cell: TokenCell) -> State:
        """Return what became of ``cell``."""
        if cell.slot < 0:
            return State.DROPPED
        if cell.slot not in self.order:
            return State.ALONE
        return State.LEADS if cell.anchor else State.MERGED

    def counts(self) -> dict[State, int]:
        """Return how many tokens are in each state."""
        found = dict.fromkeys(State, 0)
        for cell in self.cells:
            found[self.state(cell)] += 1
        return found

    def describe(self, cell: TokenCell) -> str:
        """Return the facts about ``cell`` as one plain line, for a tooltip."""
        state = self.state(cell)
        parts = [f"“{one_line(cell.text, 40)}” (token {cell.position:,})", state.value]
        if state in (State.LEADS, State.MERGED):
            parts[1] = f"{'leads' if state is State.LEADS else 'merged into'} slot {cell.slot:,}"
            parts.append(f"{100 * cell.weight:.0f}% of it")
            parts.append(f"slot holds {self._label(cell.slot)}")
        elif state is State.ALONE:
            parts.append(f"slot {cell.slot:,}")
        if cell.protected:
            parts.append("protected")
        if cell.saliency is not None:
            parts.append(f"saliency {cell.saliency:.3g}")
        return " · ".join(parts)

    def _label(self, slot: int) -> str:
        """Return the members of ``slot``, cut short: a slot may hold thousands."""
        if slot not in self._labels:
            self._labels[slot] = listed([f"“{one_line(member.text, 24)}”" for member in self.members[slot]])
        return self._labels[slot]


def summary(slots: Slots) -> str:
    """Return how many tokens went into how many slots, as a phrase."""
    into, kept = len(slots.cells), len(slots.members)
    return f"{into:,} token{'' if into == 1 else 's'} → {kept:,} slot{'' if kept == 1 else 's'}"


# The token map as an HTML fragment that works on its own and inside a report page.


_BINS = 160
_CLASS = {State.ALONE: "k", State.LEADS: "a", State.MERGED: "m", State.DROPPED: "d"}
_SAMPLES = {State.ALONE: "t k", State.LEADS: "t a c0", State.MERGED: "t m c0 w4", State.DROPPED: "t d"}


def token_map_html(cells: Sequence[TokenCell], *, title: str, caption: str, fold_after: int | None = None) -> Markup:
    """Return an HTML fragment showing the document as it reads, every token marked with what became of it.

    Pointing at a token rings every token of its slot and tells the slot's members; without JavaScript the
    native tooltip still tells them. The fragment carries its own style and script and makes no request.

    Args:
        cells: The tokens of the document in reading order.
        title: The heading of the map.
        caption: One or two sentences under the heading.
        fold_after: Fold everything after this many tokens away until the reader asks for it.
    """
    slots = Slots(cells)
    counts = slots.counts()
    legend = [(_SAMPLES[state], state.value, total) for state, total in counts.items() if total]
    if guarded := sum(cell.protected for cell in cells):
        legend.append(("t p", "protected", guarded))
    tokens = [_token(slots, cell) for cell in cells]
    cut = len(cells) if fold_after is None else max(1, fold_after)
    return render(
        "tokenmap.html", title=title, caption=caption, summary=summary(slots), legend=legend,
        merged=counts[State.MERGED], width=min(_BINS, len(cells)), strip=_strip(slots), shown=tokens[:cut],
        folded=tokens[cut:],
    )  # fmt: skip


def _token(slots: Slots, cell: TokenCell) -> dict[str, Any]:
    """What the template needs of a token; its lines apart, since the arrow of a line break is drawn by CSS."""
    state = slots.state(cell)
    classes = f"t {_CLASS[state]}"
    if cell.slot in slots.order:
        classes += f" c{slots.order[cell.slot] % len(SLOT_COLORS)}"
    if state is State.MERGED:
        classes += f" w{tint_level(cell.weight)}"
    if cell.protected:
        classes += " p"
    lead, body = split_lead(clean(cell.text))
    slot = cell.slot if cell.slot >= 0 else None
    return {"lead": lead, "classes": classes, "slot": slot, "title": slots.describe(cell), "lines": body.split("\n")}


def _strip(slots: Slots) -> list[tuple[str, int, str, str]]:
    """The whole document at a glance: per stretch of text, the shares kept and merged, as rectangles."""
    total = len(slots.cells)
    bins = min(_BINS, total)
    height = 20.0
    parts = []
    for index in range(bins):
        stretch = slots.cells[index * total // bins : (index + 1) * total // bins]
        states = [slots.state(cell) for cell in stretch]
        kept = sum(state in (State.ALONE, State.LEADS) for state in states) / len(states)
        merged = states.count(State.MERGED) / len(states)
        for name, share, above in (("sk", kept, 0.0), ("sm", merged, kept)):
            if share:
                parts.append((name, index, f"{height * (1 - above - share):.2f}", f"{height * share:.2f}"))
    return parts


# The token map for the terminal.


# Named terminal colours follow the user's own theme, so they stay legible on light and on dark. Red and green
# never meet, for readers who cannot tell them apart.
_TERMINAL_COLORS = ("cyan", "yellow", "magenta", "green", "blue")


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
        State.LEADS: f"bold reverse {_TERMINAL_COLORS[0]}",
        State.MERGED: _TERMINAL_COLORS[0],
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
    color = _TERMINAL_COLORS[slots.order[cell.slot] % len(_TERMINAL_COLORS)]
    return (f"bold reverse {color}" if state is State.LEADS else color) + mark
