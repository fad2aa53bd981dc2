"""The templates of pages, filled in so that no text of others ever becomes markup.

Every value that a template writes is cleaned and escaped, unless it is markup of another template. The styles and the
script are files beside this one, so that a page can allow exactly them, by hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quickmerge.viz.format import clean, shown_name

__all__ = ["allowed", "asset", "macro", "render"]

HERE = Path(__file__).parent


def render(template: str, **values: Any) -> Markup:
    """The template of that file name under ``templates``, filled in."""
    return Markup(_environment().get_template(template).render(**values))


def macro(name: str, *values: Any) -> Markup:
    """The macro of that name in ``templates/blocks.html``, filled in."""
    found: Markup = getattr(_blocks(), name)(*values)
    return found


@cache
def asset(name: str) -> Markup:
    """A style or a script beside this file, as a page holds it."""
    return Markup((HERE / name).read_text(encoding="utf-8"))


def allowed(*names: str) -> Markup:
    """How a Content-Security-Policy allows just these styles or scripts."""
    digests = (hashlib.sha256(asset(name).encode()).digest() for name in names)
    return Markup(" ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests))


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined, finalize=lambda value: value if isinstance(value, Markup) else clean(value),
    )  # fmt: skip
    made.filters["name"] = shown_name
    made.globals |= {"asset": asset, "allowed": allowed}
    return made


@cache
def _blocks() -> Any:
    return _environment().get_template("blocks.html").module
