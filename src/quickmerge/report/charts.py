"""Two small charts of one run: how many tokens each layer carries, and where the seconds go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quickmerge.errors import QuickmergeError
from quickmerge.report.drawing import bare_axes, new_figure, plain_settings
from quickmerge.report.inline_svg import inline_svg
from quickmerge.report.numbers import count, seconds
from quickmerge.report.palette import LIGHT
from quickmerge.report.text import one_line

if TYPE_CHECKING:
    from matplotlib.ticker import MaxNLocator


def layers_svg(tokens_per_layer: Sequence[int], full: int) -> str:
    """Return an inline SVG step chart of the tokens that each layer reads, against the ``full`` number.

    Args:
        tokens_per_layer: The tokens that enter each layer, first layer first.
        full: The tokens of the prompt as given.
    """
    if not tokens_per_layer:
        raise QuickmergeError("A chart of tokens per layer needs at least one layer.")
    layers = len(tokens_per_layer)
    with plain_settings(text_as_paths=False):
        figure = new_figure(6.8, 2.9)
        axes = figure.add_axes((0.09, 0.195, 0.885, 0.74))
        bare_axes(axes, LIGHT, grid="")
        edges = list(range(layers + 1))
        axes.stairs([full] * layers, edges, fill=True, color=LIGHT.chip, zorder=1)
        axes.stairs(tokens_per_layer, edges, fill=True, color=LIGHT.soft, zorder=2)
        axes.stairs(tokens_per_layer, edges, color=LIGHT.accent, linewidth=2.6, baseline=None, zorder=4)
        axes.axhline(full, color=LIGHT.faint, linewidth=1, linestyle=(0, (1, 2)), zorder=3)
        top = max(full, *tokens_per_layer)
        axes.set_ylim(0, top * 1.16 or 1.0)
        axes.set_xlim(0, layers)
        axes.annotate(
            f"full prompt: {count(full)} tokens in every layer",
            (layers, full),
            xytext=(-2, 5),
            textcoords="offset points",
            ha="right",
            color=LIGHT.muted,
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
                    color=LIGHT.accent,
                    fontweight="bold",
                )
            previous = tokens
        every = max(1, round(layers / 8))
        axes.set_xticks([layer + 0.5 for layer in range(0, layers, every)])
        axes.set_xticklabels([str(layer) for layer in range(0, layers, every)])
        axes.yaxis.set_major_formatter(lambda value, _: count(value))
        axes.yaxis.set_major_locator(_whole_steps())
        axes.set_xlabel("layer", labelpad=6)
        last = count(tokens_per_layer[-1])
        return inline_svg(
            figure, f"Tokens in each of {layers} layers: {count(full)} as given, {last} in the last layer"
        )


def bars_svg(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    before_label: str = "full prompt",
    after_label: str = "reduced",
) -> str:
    """Return an inline SVG of two bars of seconds, each made of the same segments (such as prefill and decode).

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
    with plain_settings(text_as_paths=False):
        figure = new_figure(6.8, 1.95)
        axes = figure.add_axes((0.0, 0.02, 1.0, 0.96))
        axes.set_axis_off()
        axes.set_xlim(0, longest * 1.19)
        axes.set_ylim(-0.05, 2.62)
        for level, (label, parts) in zip((1.3, 0.1), bars, strict=True):
            left = 0.0
            for order, name in enumerate(names):
                width = parts.get(name, 0.0)
                face, ink = ((LIGHT.accent, LIGHT.card), (LIGHT.soft, LIGHT.ink))[order % 2]
                axes.barh(level, width, height=0.62, left=left, color=face, align="edge")
                value = seconds(width, like=longest)
                # The name goes first where a segment is too narrow for both, then the value.
                fitting = [w for w in (f"{one_line(name, 24)} {value}", value) if width / longest > 0.0135 * len(w)]
                for words in fitting[:1]:
                    axes.text(left + width / 2, level + 0.31, words, ha="center", va="center", color=ink, fontsize=10)
                left += width
            axes.text(0, level + 0.74, one_line(label, 60), color=LIGHT.muted, fontsize=10.5, va="bottom")
            axes.text(
                left + 0.012 * longest,
                level + 0.31,
                seconds(left, like=longest),
                va="center",
                color=LIGHT.ink,
                fontsize=12,
                fontweight="bold",
            )
        totals = " and ".join(f"{one_line(label, 60)} {seconds(sum(parts.values()))}" for label, parts in bars)
        return inline_svg(figure, f"Seconds for {' and '.join(names)}: {totals}")


def _whole_steps() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, integer=True)
