"""One token of a document and what became of it, and the facts a map needs about all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from quickmerge.errors import QuickmergeError
from quickmerge.report.text import listed, one_line


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
