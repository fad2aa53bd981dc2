"""A run as markup for the page: built by the templates of reports, so that no text of others becomes markup.

The token map, which holds the whole text, stands in a frame of its own with a policy of its own: it has no access to
the page, may run its one script and can fetch nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from quickmerge.viz.format import change, clean, count, percent, seconds, share, shown_name, size
from quickmerge.viz.page import cards, columns, inset, paragraph, table
from quickmerge.viz.tokenmap import TokenCell, token_map_html

if TYPE_CHECKING:
    from quickmerge.serve.studio.work import Side, TextRun
    from quickmerge.serve.studio.work_images import ImageRun, Sheet

__all__ = ["answers", "download", "frame", "nothing_yet", "numbers", "sheets", "status", "token_map", "verdict"]

FOLD = 1500
"""Tokens of a map that are shown at first."""
SIDES = ("all tokens", "by the recipe")


def status(words: str, done: float | None = None, kind: str = "note") -> str:
    """A line on what goes on, read out by screen readers.

    Args:
        words: what it says.
        done: share of the work, for a bar; None for none.
        kind: ``"note"``, ``"error"`` or ``"good"``.
    """
    bar = Markup("")
    if done is not None:
        bar = Markup('<progress max="100" value="{}" aria-label="progress"></progress>').format(round(100 * done))
    role = "alert" if kind == "error" else "status"
    # What is said may hold a name of others: on one line, nothing in it disguised.
    return str(Markup('<div class="qs-status qs-{}" role="{}">{}<span>{}</span></div>').format(
        kind, role, bar, shown_name(words)))  # fmt: skip


def nothing_yet(words: str) -> str:
    """What stands where a run will be shown."""
    return str(Markup('<p class="qs-empty">{}</p>').format(words))


def answers(plain: str | None, reduced: str | None, note: str = "") -> str:
    """Both answers side by side; None is one that is still to come."""
    waiting = "…"
    said = columns(SIDES[0], waiting if plain is None else plain or "(an empty answer)",
                   SIDES[1], waiting if reduced is None else reduced or "(an empty answer)")  # fmt: skip
    return str(Markup('<div class="qs">{}{}</div>').format(said, paragraph(note) if note else ""))


def numbers(run: TextRun | ImageRun) -> str:
    """What a run took, beside what the model alone takes."""
    blocks: list[Markup] = [cards(_cards(run))]
    if run.plain is not None and run.reduced is not None:
        blocks.append(_cost(run.plain, run.reduced))
    if run.remark:
        blocks.append(paragraph(run.remark))
    return str(Markup('<div class="qs">{}</div>').format(Markup("").join(blocks)))


def _cards(run: Any) -> list[tuple[str, str, str]]:
    made = []
    if hasattr(run, "tokens") and hasattr(run, "kept"):
        note = f"{count(run.kept)} of {count(run.tokens)}"
        made.append(("tokens kept", percent(run.kept / max(1, run.tokens)), note))
    elif run.reduced.read:
        mean = sum(run.reduced.read) / len(run.reduced.read)
        note = f"{count(mean)} of {count(run.tokens)}, mean over the layers"
        made.append(("tokens read", percent(mean / max(1, run.tokens)), note))
    if run.plain is not None and run.reduced is not None:
        before, after = run.plain.ttft_seconds, run.reduced.ttft_seconds
        if before > 0 and after > 0:
            note = f"{seconds(after)}, and {seconds(before)} with all tokens"
            made.append(("first token", _times(before / after), note))
        if run.plain.cache_bytes and run.reduced.cache_bytes:
            part = run.reduced.cache_bytes / run.plain.cache_bytes
            note = f"{size(run.reduced.cache_bytes)} of {size(run.plain.cache_bytes)}"
            made.append(("cache memory", percent(part), note))
    if getattr(run, "recovery", None) is not None:
        made.append(("recovery", percent(run.recovery), "of what reading the text is worth"))
    return made


def _times(ratio: float) -> str:
    return f"{ratio:.1f}× faster" if ratio >= 1.05 else "the same" if ratio > 0.95 else f"{1 / ratio:.1f}× slower"


def _cost(plain: Side, reduced: Side) -> Markup:
    def each(side: Side) -> float | None:
        return (side.seconds - side.ttft_seconds) / (side.tokens - 1) if side.tokens > 1 else None

    def row(name: str, before: float | None, after: float | None, write: Any) -> tuple[str, str, str, str]:
        return (name, write(before), write(after), change(before, after))

    rows = [
        row("time to first token", plain.ttft_seconds, reduced.ttft_seconds, seconds),
        row("each further token", each(plain), each(reduced), seconds),
        row("whole answer", plain.seconds, reduced.seconds, seconds),
        row("tokens of the answer", plain.tokens, reduced.tokens, count),
        row("cache after the prompt", plain.cache_bytes, reduced.cache_bytes, size),
    ]
    if plain.read and reduced.read:
        rows.insert(0, row("tokens read, mean of layers", _mean(plain.read), _mean(reduced.read), count))
    return table(["", *SIDES, "difference"], rows, caption="One run of each, one after the other, on this machine.")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def verdict(run: TextRun | ImageRun) -> str:
    """One sentence for the status line when a run is done."""
    kept = f" at keep {share(run.keep)}" if run.keep is not None else ""
    if run.plain is None:
        return f"Done{kept}."
    return f"Done{kept}: " + ("both answers are the same, token for token." if run.same else "the answers differ.")


# Maps ---------------------------------------------------------------------------------------------------------------


def token_map(cells: Sequence[TokenCell], keep: float | None, remark: str = "") -> str:
    """The text as the model read it, in a frame."""
    if not cells:
        return nothing_yet(remark or "No tokens were merged or dropped: the model read all of them.")
    kept = sum(cell.anchor for cell in cells)
    mean = "" if keep is None else f" Keep {share(keep)} is the mean over all of those blocks."
    caption = f"Most blocks behind the merge read {count(kept)} of {count(len(cells))} tokens.{mean}"
    block = token_map_html(cells, title="Token map", caption=caption, fold_after=FOLD)
    return frame("Token map", inset("Token map", block))


def frame(title: str, document: str) -> str:
    """A whole document inside the page, which it can't reach."""
    # a Markup would be taken as it is, and this one is a text here, the value of an attribute
    content = escape("".join(map(str, document)))
    made = '<iframe class="qs-frame" title="{}" sandbox="allow-scripts" srcdoc="{}"></iframe>'
    return str(Markup(made).format(title, content))


def sheets(drawn: Sequence[Sheet]) -> str:
    """Patch maps, light or dark as the page is."""
    one = Markup('<figure class="qs-sheet"><img class="qs-light" src="{}" alt="{}"><img class="qs-dark" src="{}" '
                 'alt="{}"><figcaption>{}</figcaption></figure>')  # fmt: skip
    return str(Markup("").join(one.format(s.light, s.label, s.dark, s.label, s.label) for s in drawn))


def download(content: str) -> str:
    """A link that saves the recipe: the file's name is always the same."""
    data = base64.b64encode(clean(content).encode()).decode()
    made = '<a class="qs-save" download="recipe.json" href="data:application/json;base64,{}">Save recipe.json</a>'
    return str(Markup(made).format(data))
