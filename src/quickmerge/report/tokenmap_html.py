"""The token map as an HTML fragment that works on its own and inside a report page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quickmerge.report.cells import Slots, State, TokenCell, summary
from quickmerge.report.palette import SLOT_COLORS, tint_level
from quickmerge.report.text import clean, escape, escape_name, split_lead
from quickmerge.report.tokenmap_style import TOKEN_MAP_CSS, TOKEN_MAP_JS

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
