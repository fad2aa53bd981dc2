"""Turn a matplotlib figure into SVG that belongs inside a page.

Matplotlib writes whole documents with dates, RDF, a global style rule and fixed colours. Inside a page with a
strict policy and two colour schemes it has to be: no metadata, no style attributes or rules (attributes instead),
ids that no other picture uses, colours that follow the page, and text in the page's own font.
"""

from __future__ import annotations

import hashlib
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from quickmerge.errors import QuickmergeError
from quickmerge.viz.drawing import LIGHT, OTHERS, bare_axes, new_figure, plain_settings
from quickmerge.viz.format import clean_name, count, one_line, seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_SHORTHAND = re.compile(r"(?P<rest>.*?)(?P<size>[\d.]+)px\s")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_DROPPED = {"metadata", "style", "title"}
_INHERITED = {"stroke-linejoin": "round", "stroke-linecap": "butt"}


def inline_svg(figure: Figure, label: str) -> str:
    """Return ``figure`` as one ``<svg>`` element that reads out as ``label``; the same figure gives the same text."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ET.fromstring(stream.getvalue())
    _tidy(root)
    prefix = "qm" + hashlib.sha256(stream.getvalue()).hexdigest()[:8]
    _rename_ids(root, prefix)
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": clean_name(label),
        "class": "qm-chart",
        "font-family": _FONT,
        **_INHERITED,
    }
    return ET.tostring(root, encoding="unicode")


def theme_name(color: str) -> str | None:
    """Return the CSS expression for ``color`` where it has a role in the light scheme, else None.

    The fallback inside ``var()`` keeps the picture right where no page defines the roles.
    """
    return _ROLES.get(color.lower())


def role_variables(dark: bool) -> str:
    """Return the CSS declarations for the chart colours that :func:`inline_svg` refers to."""
    return "".join(f"--o{order}:{pair[dark]};" for order, pair in enumerate(OTHERS))


def _roles() -> dict[str, str]:
    # Companions first: where one shares a colour with a role of the theme, the role wins.
    roles = {pair[0]: f"var(--o{order}, {pair[0]})" for order, pair in enumerate(OTHERS)}
    for field in fields(LIGHT):
        color = getattr(LIGHT, field.name)
        roles[color] = f"var(--{field.name}, {color})"
    return roles


_ROLES = _roles()


def _tidy(element: ET.Element) -> None:
    """Drop namespaces, metadata and style rules below ``element``; make style attributes plain attributes."""
    element.tag = element.tag.rpartition("}")[2]
    element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    for declaration in element.attrib.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            element.attrib.update(_font(value))
        elif name and name != "font-family" and _INHERITED.get(name) != value:
            element.attrib[name] = _ROLES.get(value.lower(), value)
    for child in list(element):
        if child.tag.rpartition("}")[2] in _DROPPED:
            element.remove(child)
        else:
            _tidy(child)
    if element.attrib.get("stroke-opacity") == "0":
        del element.attrib["stroke-opacity"]
        element.set("stroke", "none")
    if element.tag == "text" and not element.get("fill"):
        element.set("fill", _ROLES[LIGHT.ink])


def _font(shorthand: str) -> dict[str, str]:
    """Return weight, style and size of a CSS ``font`` shorthand; the family is the page's."""
    found = _SHORTHAND.match(shorthand)
    if not found:
        return {}
    result = {"font-size": found["size"]}
    for word in found["rest"].split():
        if word in ("italic", "oblique"):
            result["font-style"] = word
        elif word == "bold" or word.isdigit():
            result["font-weight"] = word
    return result


def _rename_ids(root: ET.Element, prefix: str) -> None:
    """Keep only the ids something refers to, made unique to this picture."""
    elements = list(root.iter())
    used = {name for e in elements for value in e.attrib.values() for name in _REFERENCE.findall(value)}
    used |= {e.attrib["href"][1:] for e in elements if e.attrib.get("href", "").startswith("#")}
    for element in elements:
        if element.attrib.get("id") not in used:
            element.attrib.pop("id", None)
        for name, value in list(element.attrib.items()):
            if name == "id":
                element.set(name, f"{prefix}-{value}")
            elif name == "href":
                element.set(name, f"#{prefix}-{value[1:]}")
            else:
                element.set(name, _REFERENCE.sub(rf"url(#{prefix}-\1)", value))


# Two small charts of one run: how many tokens each layer carries, and where the seconds go.


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
