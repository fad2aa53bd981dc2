"""``--config`` of every command: a file that stands for its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from quickmerge.errors import QuickmergeError, clean_name, near_match
from quickmerge.files import read_settings

__all__ = ["NONE", "take_config"]

NONE = "none"
"""What is written on the command line for a setting that shall be left out, where that is not its default."""
OWN = ("config", "help", "help_all")
"""Options that no file holds."""


def take_config(context: typer.Context, path: Path | None) -> Path | None:
    """Put what a file says in the place of the defaults of a command's options.

    Raises:
        QuickmergeError: the file can't be read, or a setting is unknown or not what the option takes.
    """
    if path is not None and not context.resilient_parsing:
        context.default_map = _values(context, path)
    return path


def _values(context: typer.Context, path: Path) -> dict[str, Any]:
    """The file's settings by the names of the command's parameters, each checked as if it had been typed."""
    known = {_key(param): param for param in context.command.params if param.name not in OWN}
    found: dict[str, Any] = {}
    for name, value in read_settings(path).items():
        param: Any = known.get(name.replace("-", "_"))
        if param is None:
            told = near_match(name, known) or f": {context.command_path} knows {', '.join(known)}"
            raise QuickmergeError(f"{path} holds an unknown setting {name!r}{told}")
        typed = _typed(param, value, f"{path}: {name}")
        if typed is None:
            continue
        try:
            param.process_value(context, typed)
        except Exception as error:
            if isinstance(error, QuickmergeError) or not hasattr(error, "format_message"):
                raise
            raise QuickmergeError(f"{path}: {clean_name(error.format_message()).rstrip('.')}") from None
        found[str(param.name)] = typed
    return found


def _key(param: Any) -> str:
    """What a parameter is called in a file: as its option, with underscores."""
    spelled = param.opts[0] if param.param_type_name == "option" else param.name
    return str(spelled).lstrip("-").replace("-", "_")


def _typed(param: Any, value: Any, where: str) -> Any:
    """A value as the command line would have given it; None for one that says nothing."""
    if getattr(param, "is_flag", False):
        if value is not None and not isinstance(value, bool):
            raise QuickmergeError(f"{where} must be true or false, got {value!r}")
        return value
    parts = value if isinstance(value, list) else [value]
    if any(isinstance(part, (dict, list, bool)) for part in parts):
        raise QuickmergeError(f"{where} must be a number, a text, or a list of them")
    if value is None:
        return NONE if NONE in str(param.metavar or "") else None
    words = [part if isinstance(part, str) else repr(part) for part in parts]
    return words if param.nargs != 1 or getattr(param, "multiple", False) else ",".join(words)
