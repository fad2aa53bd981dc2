"""Chat templates of a model, one or several by name, wherever they are kept, and which a new vocabulary can have.

transformers keeps one in ``chat_template.jinja`` and further ones in ``additional_chat_templates/``; older folders have
them in ``tokenizer_config.json``, as a text, as a dict by name or as a list of names and texts; processors once kept
theirs in ``chat_template.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from quickmerge.errors import QuickmergeError, check_text

__all__ = ["ROLES", "Template", "Templates", "as_templates", "choose_template", "of_folder", "of_tokenizer"]

Templates: TypeAlias = str | dict[str, str]
"""One template, or several by name, ``default`` among them or not."""

ROLES = ("bos", "eos", "pad")
"""Roles whose tokens templates ask for by name."""
DEFAULT = "default"
FILE, FOLDER, LEGACY = "chat_template.jinja", "additional_chat_templates", "chat_template.json"


@dataclass(frozen=True)
class Template:
    """The chat template of the new model."""

    text: Templates | None
    source: str
    """``"base"``, ``"tokenizer"`` or ``"none"``."""
    why: str
    """A clause that says why, for the report."""


def as_templates(value: Any, what: str) -> Templates | None:
    """A template in any of the forms in which they are kept; ``what`` it is called in messages.

    Raises:
        QuickmergeError: it is in none of them.
    """
    if value is None or value == {} or value == []:
        return None
    if isinstance(value, str):
        check_text(what, value)
        return value
    if isinstance(value, (list, tuple)) and all(
        isinstance(one, Mapping) and {"name", "template"} <= set(one) for one in value
    ):
        value = {one["name"]: one["template"] for one in value}
    if not isinstance(value, Mapping) or not all(isinstance(x, str) for pair in value.items() for x in pair):
        raise QuickmergeError(f"{what} must be a text, or texts by name, got a {type(value).__name__}")
    for name, text in value.items():
        check_text(f"{what} {name}", text)
    return dict(value)


def of_tokenizer(tokenizer: Any) -> Templates | None:
    """What a tokenizer has.

    Raises:
        QuickmergeError: it is no template.
    """
    return as_templates(tokenizer.chat_template, "chat_template of the tokenizer")


def of_folder(folder: Path) -> Templates | None:
    """What lies in a folder beside the files of a tokenizer, for one that doesn't say so itself.

    Raises:
        QuickmergeError: a file can't be read as a template.
    """
    found: dict[str, str] = {}
    try:
        if (folder / FILE).is_file():
            found[DEFAULT] = (folder / FILE).read_text(encoding="utf-8")
        elif (folder / LEGACY).is_file():
            held = json.loads((folder / LEGACY).read_text(encoding="utf-8"))
            found |= _by_name(as_templates(held["chat_template"], str(folder / LEGACY)))
        for path in sorted((folder / FOLDER).glob("*.jinja")):
            if path.is_file():
                found[path.stem] = path.read_text(encoding="utf-8")
    except OSError as error:
        raise QuickmergeError(f"the chat templates in {folder} can't be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, QuickmergeError):
            raise
        raise QuickmergeError(f"the chat templates in {folder} must be UTF-8 text, got something else") from error
    return found[DEFAULT] if list(found) == [DEFAULT] else found or None


def choose_template(base: Any, tokenizer: Any) -> Template:
    """Keep the base's chat templates if the new vocabulary has their markers, since the body was trained on them.

    The one that is used by default decides. Further ones that lack a marker are left out.

    Args:
        base: the base's tokenizer.
        tokenizer: the new one.

    Raises:
        QuickmergeError: one of the two has a template that is none.
    """
    ours, theirs = of_tokenizer(base), of_tokenizer(tokenizer)
    if ours is None:
        return Template(theirs, "none" if theirs is None else "tokenizer", "the base has no template")
    lacking = {name: _lacking(text, base, tokenizer) for name, text in _by_name(ours).items()}
    decides = lacking.get(DEFAULT) if DEFAULT in lacking else min(lacking.values(), key=len)
    if decides:
        why = f"the new vocabulary lacks {', '.join(decides[:3])} of the base's template"
        return Template(theirs, "none" if theirs is None else "tokenizer", why)
    if isinstance(ours, str):
        return Template(ours, "base", "the new vocabulary has all of its markers")
    kept = {name: text for name, text in ours.items() if not lacking[name]}
    if len(kept) == len(ours):
        return Template(kept, "base", "the new vocabulary has all of their markers")
    gone = ", ".join(name for name in ours if name not in kept)
    return Template(kept, "base", f"the new vocabulary has their markers, but not those of {gone}, left out")


def _by_name(templates: Templates | None) -> dict[str, str]:
    if templates is None:
        return {}
    return {DEFAULT: templates} if isinstance(templates, str) else templates


def _lacking(text: str, base: Any, tokenizer: Any) -> list[str]:
    """Markers that a template of the base writes and the new vocabulary doesn't have."""
    markers = [str(token) for token in base.added_tokens_decoder.values() if token.special and str(token) in text]
    there = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    lacking = [marker for marker in markers if marker not in there]
    # names of roles that the template reads are spelled out by the tokenizer that applies it
    return lacking + [
        f"{role}_token" for role in ROLES
        if re.search(rf"\b{role}_token\b", text) and getattr(tokenizer, f"{role}_token", None) is None
    ]  # fmt: skip
