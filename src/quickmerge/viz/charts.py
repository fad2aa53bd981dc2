"""Charts of a page: drawn by matplotlib in both colour schemes, as images of which a browser takes the right one."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from quickmerge.errors import QuickmergeError
from quickmerge.viz.drawing import DARK, LIGHT, Theme, bare_axes, new_figure, plain_settings
from quickmerge.viz.format import count, one_line, seconds
from quickmerge.viz.render import macro

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

_FONT = b"system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, "
"""What a page is set in, before matplotlib's own."""


def picture(draw: Callable[[Theme], Figure], label: str) -> Markup:
    """What ``draw`` makes in either scheme as one image that reads out as ``label``.

    The same drawing gives the same text. Text stays text, in the page's own font.
    """
    return macro("image", *(_data(draw, theme) for theme in (LIGHT, DARK)), label)


def _data(draw: Callable[[Theme], Figure], theme: Theme) -> str:
    stream = io.BytesIO()
    with plain_settings(text_as_paths=False):
        draw(theme).savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    svg = stream.getvalue().replace(b"'DejaVu Sans'", _FONT + b"'DejaVu Sans'")
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


# Two small charts of one run: how many tokens each layer carries, and where the seconds go.


def layers_chart(tokens_per_layer: Sequence[int], full: int) -> Markup:
    """Return a step chart of the tokens that each layer reads, against the ``full`` number.

    Args:
        tokens_per_layer: The tokens that enter each layer, first layer first.
        full: The tokens of the prompt as given.
    """
    if not tokens_per_layer:
        raise QuickmergeError("A chart of tokens per layer needs at least one layer.")
    layers, last = len(tokens_per_layer), count(tokens_per_layer[-1])

    def draw(theme: Theme) -> Figure:
        figure = new_figure(6.8, 2.9)
        axes = figure.add_axes((0.09, 0.195, 0.885, 0.74))
        bare_axes(axes, theme, grid="")
        edges = list(range(layers + 1))
        axes.stairs([full] * layers, edges, fill=True, color=theme.chip, zorder=1)
        axes.stairs(tokens_per_layer, edges, fill=True, color=theme.soft, zorder=2)
        axes.stairs(tokens_per_layer, edges, color=theme.accent, linewidth=2.6, baseline=None, zorder=4)
        axes.axhline(full, color=theme.faint, linewidth=1, linestyle=(0, (1, 2)), zorder=3)
        top = max(full, *tokens_per_layer)
        axes.set_ylim(0, top * 1.16 or 1.0)
        axes.set_xlim(0, layers)
        axes.annotate(
            f"full prompt: {count(full)} tokens in every layer",
            (layers, full),
            xytext=(-2, 5),
            textcoords="offset points",
            ha="right",
            color=theme.muted,
            fontsize=9.5,
        )
        previous = full
        for layer, tokens in enumerate(tokens_per_layer):
            # Only the steps worth reading get a number; a gradual reducer would otherwise fill the chart with them.
            if previous - tokens > 0.08 * top:
                at_end = layer > 0.75 * layers
                # Near the end there is no room for a word before the step's own edge.
                axes.annotate(
                    count(tokens) if at_end else f"{count(tokens)} tokens",
                    (layers if at_end else layer, tokens),
                    xytext=(-6 if at_end else 6, 6),
                    textcoords="offset points",
                    fontsize=11,
                    ha="right" if at_end else "left",
                    color=theme.accent,
                    fontweight="bold",
                )
            previous = tokens
        every = max(1, round(layers / 8))
        axes.set_xticks([layer + 0.5 for layer in range(0, layers, every)])
        axes.set_xticklabels([str(layer) for layer in range(0, layers, every)])
        axes.yaxis.set_major_formatter(lambda value, _: count(value))
        axes.yaxis.set_major_locator(_whole_steps())
        axes.set_xlabel("layer", labelpad=6)
        return figure

    return picture(draw, f"Tokens in each of {layers} layers: {count(full)} as given, {last} in the last layer")


def bars_chart(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    before_label: str = "full prompt",
    after_label: str = "reduced",
) -> Markup:
    """Return two bars of seconds, each made of the same segments (such as prefill and decode).

    Args:
        before: Seconds by segment for the full prompt, in the order to draw.
        after: Seconds by segment for the reduced prompt.
        before_label: The name of the upper bar.
        after_label: The name of the lower bar.
    """
    bars = ((before_label, before), (after_label, after))
    longest = max((sum(parts.values()) for _, parts in bars), default=0.0)
    if longest <= 0 or any(value < 0 for _, parts in bars for value in parts.values()):
        raise QuickmergeError("A chart of seconds needs times that are not negative and not all zero.")
    names = list(dict.fromkeys([*before, *after]))
    totals = " and ".join(f"{one_line(label, 60)} {seconds(sum(parts.values()))}" for label, parts in bars)

    def draw(theme: Theme) -> Figure:
        figure = new_figure(6.8, 1.95)
        axes = figure.add_axes((0.0, 0.02, 1.0, 0.96))
        axes.set_axis_off()
        axes.set_xlim(0, longest * 1.19)
        axes.set_ylim(-0.05, 2.62)
        for level, (label, parts) in zip((1.3, 0.1), bars, strict=True):
            left = 0.0
            for order, name in enumerate(names):
                width = parts.get(name, 0.0)
                face, ink = ((theme.accent, theme.card), (theme.soft, theme.ink))[order % 2]
                axes.barh(level, width, height=0.62, left=left, color=face, align="edge")
                value = seconds(width, like=longest)
                # The name goes first where a segment is too narrow for both, then the value.
                fitting = [w for w in (f"{one_line(name, 24)} {value}", value) if width / longest > 0.0135 * len(w)]
                for words in fitting[:1]:
                    axes.text(left + width / 2, level + 0.31, words, ha="center", va="center", color=ink, fontsize=10)
                left += width
            axes.text(0, level + 0.74, one_line(label, 60), color=theme.muted, fontsize=10.5, va="bottom")
            axes.text(
                left + 0.012 * longest,
                level + 0.31,
                seconds(left, like=longest),
                va="center",
                color=theme.ink,
                fontsize=12,
                fontweight="bold",
            )
        return figure

    return picture(draw, f"Seconds for {' and '.join(names)}: {totals}")


def _whole_steps() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, integer=True)
