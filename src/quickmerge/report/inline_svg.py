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
from dataclasses import fields
from typing import TYPE_CHECKING

from quickmerge.report.palette import LIGHT, OTHERS
from quickmerge.report.text import clean_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
