"""One token of a document and what became of it, and the facts a map needs about all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from quickmerge.errors import QuickmergeError
from quickmerge.viz.drawing import DARK, LIGHT, ON_SLOT, SLOT_COLORS, Theme, rgb, tint_alpha, tint_level
from quickmerge.viz.format import clean, escape, escape_name, listed, one_line, split_lead

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


# The style and the script that every HTML token map carries.
#
# They are constants so that a page can allow exactly them, by hash, and nothing else.


def _variables(theme: Theme) -> str:
    return (
        f"--qi:{theme.ink};--qu:{theme.muted};--qf:{theme.faint};--ql:{theme.line};--qc:{theme.card};"
        f"--qk:{theme.chip};--qa:{theme.accent};--qs:{theme.soft};"
    )


_COLORS = "".join(
    f".qm-map .c{order}{{--c:{' '.join(map(str, rgb(color)))}}}" for order, color in enumerate(SLOT_COLORS)
)
_LEVELS = "".join(f".qm-map .w{level}{{--a:{tint_alpha(level):.3f}}}" for level in range(10))

TOKEN_MAP_CSS = (
    f".qm-map{{{_variables(LIGHT)}color-scheme:light dark}}"
    f"@media screen and (prefers-color-scheme:dark){{.qm-map{{{_variables(DARK)}}}}}"
    + _COLORS
    + _LEVELS
    + f"""
.qm-map{{margin:0;padding:1.25rem;background:var(--qc);color:var(--qi);border:1px solid var(--ql);
border-radius:14px;font:.9rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
print-color-adjust:exact;-webkit-print-color-adjust:exact}}
.qm-map figcaption strong{{font-size:1.05rem;margin-right:.75em}}
.qm-map .qm-sum{{color:var(--qa);font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}}
.qm-map p{{max-width:none}}
.qm-map figcaption p{{margin:.25rem 0 .75rem;color:var(--qu);max-width:70ch}}
.qm-map figcaption p:empty{{display:none}}
.qm-legend{{list-style:none;display:flex;flex-wrap:wrap;gap:.35rem 1.25rem;margin:0 0 .9rem;padding:0;
font-size:.82rem;color:var(--qu)}}
.qm-legend em{{font-style:normal;font-weight:600;color:var(--qi);font-variant-numeric:tabular-nums}}
.qm-legend .t{{padding:.1em .3em;margin-right:.2em}}
.qm-legend .qm-note{{flex-basis:100%;color:var(--qf)}}
.qm-strip{{display:block;width:100%;height:34px;background:var(--qk);border-radius:4px;overflow:hidden}}
.qm-strip .sk{{fill:var(--qa)}}.qm-strip .sm{{fill:var(--qa);fill-opacity:.36}}
.qm-map .qm-ends{{display:flex;justify-content:space-between;margin:.2rem 0 .9rem;font-size:.72rem;color:var(--qf)}}
.qm-text{{white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4;unicode-bidi:isolate;
font:.86rem/1.95 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace}}
.qm-map .t{{border-radius:3px;padding:.14em 0;box-decoration-break:clone;-webkit-box-decoration-break:clone;
font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace}}
.qm-map .k{{background:var(--qk);font-weight:600}}
.qm-map .a{{background:rgb(var(--c));color:{ON_SLOT};font-weight:600}}
.qm-map .m{{background:rgb(var(--c)/var(--a))}}
.qm-map .d{{color:var(--qf);text-decoration:line-through;text-decoration-thickness:1px}}
.qm-map .p{{border-bottom:2px solid var(--qi)}}
.qm-text .t+.t{{box-shadow:inset 1px 0 0 var(--qc)}}
.qm-text .t.on{{box-shadow:0 0 0 2px var(--qi);position:relative;z-index:1}}
.qm-text .m.on{{background:rgb(var(--c));color:{ON_SLOT}}}
.qm-text b::before{{content:"\\21b5";font-weight:400;color:var(--qf);opacity:.75}}
.qm-text .a b::before{{color:inherit}}
.qm-more summary{{cursor:pointer;margin:.8rem 0;color:var(--qa);font-weight:600}}
.qm-map .qm-read{{position:sticky;bottom:0;margin:.9rem -1.25rem -1.25rem;padding:.6rem 1.25rem;font-size:.8rem;
background:var(--qc);border-top:1px solid var(--ql);color:var(--qu);border-radius:0 0 14px 14px;z-index:2;
overflow-wrap:anywhere}}
@media print{{.qm-map .qm-read{{display:none}}}}
"""
)

# One listener for all maps of a page; the line it writes to shows only where it runs.
# It only ever moves text that is already there (textContent, never HTML).
TOKEN_MAP_JS = """
(()=>{
document.currentScript.parentNode.querySelector('.qm-read').hidden=false;
if(window.quickmergeMap)return;window.quickmergeMap=true;
let lit=[];
const point=event=>{
const token=event.target.closest?event.target.closest('.qm-text .t'):null;
for(const old of lit)old.classList.remove('on');
lit=[];
if(!token)return;
const map=token.closest('.qm-map');
map.querySelector('.qm-read').textContent=token.title;
lit=token.dataset.s===undefined?[token]:[...map.querySelectorAll('.t[data-s="'+Number(token.dataset.s)+'"]')];
for(const now of lit)now.classList.add('on')};
document.addEventListener('pointerover',point);
document.addEventListener('click',point)})();
"""


# The token map as an HTML fragment that works on its own and inside a report page.


_BINS = 160
_CLASS = {State.ALONE: "k", State.LEADS: "a", State.MERGED: "m", State.DROPPED: "d"}


def token_map_html(cells: Sequence[TokenCell], *, title: str, caption: str, fold_after: int | None = None) -> str:
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
    cut = len(cells) if fold_after is None else max(1, fold_after)
    text = f'<div class="qm-text" dir="auto">{_spans(slots, cells[:cut])}</div>'
    if cells[cut:]:
        text += (
            f'<details class="qm-more"><summary>Show the other {len(cells) - cut:,} tokens</summary>'
            f'<div class="qm-text" dir="auto">{_spans(slots, cells[cut:])}</div></details>'
        )
    return (
        f'<figure class="qm-map"><style>{TOKEN_MAP_CSS}</style>'
        f'<figcaption><strong>{escape_name(title)}</strong><span class="qm-sum">{escape(summary(slots))}</span>'
        f"<p>{escape_name(caption)}</p></figcaption>"
        f"{_legend(slots)}{_strip(slots)}{text}"
        '<p class="qm-read" hidden>Point at a token to see its slot.</p>'
        f"<script>{TOKEN_MAP_JS}</script></figure>"
    )


def _spans(slots: Slots, cells: Iterable[TokenCell]) -> str:
    """Return one span for every token; the text inside the spans is the document, character for character."""
    return "".join(_span(slots, cell) for cell in cells)


def _span(slots: Slots, cell: TokenCell) -> str:
    state = slots.state(cell)
    classes = f"t {_CLASS[state]}"
    if cell.slot in slots.order:
        classes += f" c{slots.order[cell.slot] % len(SLOT_COLORS)}"
    if state is State.MERGED:
        classes += f" w{tint_level(cell.weight)}"
    if cell.protected:
        classes += " p"
    slot = f' data-s="{cell.slot:d}"' if cell.slot >= 0 else ""
    lead, body = split_lead(clean(cell.text))
    # The arrow is drawn by CSS on an empty element, so copying the text gives the document back.
    text = escape(body).replace("\n", "<b></b>\n")
    return f'{lead}<span class="{classes}"{slot} title="{escape(slots.describe(cell))}">{text}</span>'


def _legend(slots: Slots) -> str:
    counts = slots.counts()
    samples = {State.ALONE: "t k", State.LEADS: "t a c0", State.MERGED: "t m c0 w4", State.DROPPED: "t d"}
    items = [
        f'<li><span class="{samples[state]}">token</span> {state.value} <em>{total:,}</em></li>'
        for state, total in counts.items()
        if total
    ]
    guarded = sum(cell.protected for cell in slots.cells)
    if guarded:
        items.append(f'<li><span class="t p">token</span> protected <em>{guarded:,}</em></li>')
    note = ""
    if counts[State.MERGED]:
        note = '<li class="qm-note">one colour per slot; the stronger the tint, the larger the share</li>'
    return f'<ul class="qm-legend">{"".join(items)}{note}</ul>'


def _strip(slots: Slots) -> str:
    """Return the whole document at a glance: per stretch of text, the shares kept, merged and dropped."""
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
                top, tall = height * (1 - above - share), height * share
                parts.append(f'<rect class="{name}" x="{index}" y="{top:.2f}" width="1" height="{tall:.2f}"/>')
    label = "Where in the document tokens were kept (solid), merged (pale) and dropped (empty), first to last"
    return (
        f'<svg class="qm-strip" viewBox="0 0 {bins} {height:.0f}" preserveAspectRatio="none" role="img">'
        f"<title>{label}</title>{''.join(parts)}</svg>"
        '<p class="qm-ends"><span>start</span><span>solid: kept · pale: merged · empty: dropped</span>'
        "<span>end</span></p>"
    )


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
