"""The card of what goes to the hub: what it is, what it was made for, what was measured of it, and how it is loaded.

Everything in it was read from the saved folder or given by whoever sends it; of what nobody said or measured the card
says that.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quickmerge._version import __version__
from quickmerge.errors import QuickmergeError, clean_name
from quickmerge.models.compat import CONFIG_PLACES
from quickmerge.models.kinds import HUB_ID, Kind
from quickmerge.models.part import HASH
from quickmerge.models.weights import read_json

__all__ = ["CARD", "MARK", "Section", "card_text", "read_results"]

CARD = "README.md"
MARK = "<!-- made by quickmerge -->"
"""By which a card is known that may be replaced by a newer one."""
Section = tuple[str, str]
"""A heading and what stands below it, as Markdown."""

SOURCES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Embedded models, and what they are called on the hub."""
MOST_RESULTS = 2**26
"""Bytes of a file of results: a benchmark's own have a few million."""
MOST_ROWS, MOST_SETTINGS = 64, 48
UNSAID = ("architectures", "transformers_version", "auto_map",  "quickmerge", "version", "type", "kind",
          "trained_for", HASH, *CONFIG_PLACES)  # fmt: skip
"""Entries of settings that stand elsewhere on the card, or say nothing to its reader."""
ENDS = ("_low", "_high")


def card_text(
    folder: Path,
    kind: Kind,
    name: str,
    *,
    results: Any = None,
    command: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    sections: Sequence[Section] = (),
    known: Callable[[str], bool] = lambda _: False,
) -> str:
    """Write the card of a saved folder.

    Args:
        folder: what was saved.
        kind: what it is.
        name: its id on the hub.
        results: what was measured, as `read_results` takes it.
        command: what makes it again.
        license: of the weights.
        base_model: id on the hub of the model that it was made for; default what its settings say, where that is
            an embedded model or one that is ``known``.
        sections: more to be said.
        known: whether the hub has a model of this name.

    Returns:
        Markdown with metadata in front.

    Raises:
        QuickmergeError: the results can't be read.
    """
    from huggingface_hub import ModelCard, ModelCardData

    settings = read_json(folder / kind.settings)
    made_for = settings.get("trained_for")
    made_for = made_for if isinstance(made_for, dict) else {}
    model = made_for.get("model")
    if base_model is None and isinstance(model, str):
        base_model = SOURCES.get(model) or (model if HUB_ID.fullmatch(model) and known(model) else None)
    tag = kind.mark[1].removeprefix("quickmerge-").removeprefix("quickmerge.")
    data = ModelCardData(base_model=base_model, library_name="quickmerge", license=license, tags=["quickmerge", tag])
    told = [
        (None, f"{kind.about} Saved by quickmerge {__version__}."),
        (
            "How to load it",
            f"```bash\npip install quickmerge\n```\n\n```python\n{kind.load.replace('NAME', name)}\n```",
        ),
        ("What it was made for", _made_for(made_for, base_model)),
        *sections,
        *([] if kind.name == "a recipe" else [("Settings", _settings(settings))]),
        ("Results", "\n\n".join([_results(results), *_training(folder)])),
        ("How it was made", f"```bash\n{_fenced(command)}\n```" if command else "The command was not given."),
        ("Licence", _plain(license) if license else "It was not said."),
    ]
    body = "\n\n".join(text if title is None else f"## {title}\n\n{text}" for title, text in told if text)
    card = ModelCard(f"---\n{data.to_yaml().strip()}\n---\n\n{MARK}\n\n# {_plain(name.partition('/')[2])}\n\n{body}\n")
    return str(card)


def _made_for(made_for: Mapping[str, Any], base_model: str | None) -> str:
    """The model, its weights' hash, layers and settings that a trained part belongs to."""
    rows = {"base model": base_model, **made_for}
    told = [f"- {_plain(key)}: {_value(value)}" for key, value in rows.items() if value is not None]
    if made_for.get("model") in SOURCES:
        told.append("\nThe model is the one of that name that quickmerge embeds, and the hash is that of its weights.")
    return "\n".join(told)


def _settings(settings: Mapping[str, Any]) -> str:
    rows: dict[str, Any] = {}
    for key, value in settings.items():
        if key in UNSAID or value is None or value == {}:
            continue
        for inner, one in value.items() if isinstance(value, dict) else [("", value)]:
            if one is not None and inner not in UNSAID and not isinstance(one, dict):
                rows[f"{key}.{inner}" if inner else key] = one
    left = len(rows) - MOST_SETTINGS
    lines = [f"| {_plain(key)} | {_value(value)} |" for key, value in list(rows.items())[:MOST_SETTINGS]]
    return "\n".join(["| setting | value |", "| --- | --- |", *lines]) + (f"\n\nand {left} more" if left > 0 else "")


# What was measured --------------------------------------------------------------------------------------------------


def read_results(given: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of what was measured, and what is said of all of them.

    Args:
        given: the JSON file of a benchmark, its content, its ``Result``, a list of rows by name, one such row, or None.

    Raises:
        QuickmergeError: it is something else.
    """
    if given is None:
        return [], {}
    if isinstance(given, (str, os.PathLike)):
        path = Path(given).expanduser()
        if not path.is_file():
            raise QuickmergeError(f"results must be a file of JSON that there is, got {path}")
        given = read_json(path, MOST_RESULTS, "measure it again")
    if hasattr(given, "rows"):
        given = {"rows": given.rows, "meta": getattr(given, "meta", {})}
    meta: Any = {}
    if isinstance(given, Mapping):
        meta = given.get("meta", {})
        given = given.get("rows", [given])
    rows = list(given) if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else None
    if not rows or not all(isinstance(row, Mapping) for row in rows) or not isinstance(meta, Mapping):
        raise QuickmergeError(
            "results must be a benchmark's JSON with rows, or rows such as [{'recovery': 0.93, 'recovery_low': 0.91, "
            f"'recovery_high': 0.95}}], got {given!r:.120}"
        )
    return [dict(row) for row in rows], dict(meta)


def _results(given: Any) -> str:
    """A table of what was measured, with intervals where there are some."""
    rows, meta = read_results(given)
    if not rows:
        return "None were given with this card: how well it does was not measured here."
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if _is_short(value)))
    ends = {name + end for name in names for end in ENDS}
    names = [name for name in names if name not in ends and any(row.get(name) is not None for row in rows)]
    with_interval = [name for name in names if any(_interval(row, name) for row in rows)]
    lines = ["| " + " | ".join(_plain(name.replace("_", " ")) for name in names) + " |", "| --- " * len(names) + "|"]
    lines += ["| " + " | ".join(_cell(row, name) for name in names) + " |" for row in rows[:MOST_ROWS]]
    notes = []
    if len(rows) > MOST_ROWS:
        notes.append(f"The first {MOST_ROWS} of {len(rows)} rows.")
    if with_interval:
        notes.append("In brackets stands an interval of 95 %; where there is none, none was measured.")
    else:
        notes.append("No intervals were measured.")
    told = {name: value for name, value in meta.items() if _is_short(value) and value is not None}
    about = meta.get("environment")
    told |= {name: value for name, value in about.items() if _is_short(value)} if isinstance(about, Mapping) else {}
    if told:
        notes.append("Measured with " + ", ".join(f"{_plain(k).replace('_', ' ')} {_value(v)}" for k, v in told.items())
                     + ".")  # fmt: skip
    return "\n".join(lines) + "\n\n" + " ".join(notes)


def _training(folder: Path) -> list[str]:
    """The last line of a training's ``metrics.jsonl``, if it lies beside what was trained."""
    path = folder / "metrics.jsonl"
    if not path.is_file() or path.stat().st_size > MOST_RESULTS:
        return []
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            told = ", ".join(f"{_plain(k).replace('_', ' ')} {_value(v)}" for k, v in found.items() if _is_short(v)
                             and v is not None and k not in ("seconds", "items_per_second"))  # fmt: skip
            return [f"The last line of its training, means of one interval on what it was trained on: {told}."]
    return []


def _interval(row: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    low, high = (row.get(name + end) for end in ENDS)
    return (low, high) if _is_number(low) and _is_number(high) else None  # type: ignore[return-value]


def _cell(row: Mapping[str, Any], name: str) -> str:
    value, ends = row.get(name), _interval(row, name)
    if value is None:
        return "not measured"
    return _value(value) if ends is None else f"{_value(value)} ({_value(ends[0])} to {_value(ends[1])})"


# Strings of others in Markdown --------------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_short(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _value(value: Any) -> str:
    """A value as one writes it: numbers to four digits, lists and objects as JSON."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (int, str)):
        return _plain(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"`{_plain(text).replace('`', '')}`"


def _plain(value: object) -> str:
    """A stranger's string in a line of Markdown: no markup, no break, no cell of a table is left."""
    text = clean_name(value)
    return re.sub(r"([\\`*|\[\]<>])", r"\\\1", text[:200])


def _fenced(command: str) -> str:
    return clean_name(command).replace("```", "'''")
