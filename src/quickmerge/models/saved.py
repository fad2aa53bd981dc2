"""Saving models of transformers: the same bytes, wherever on a disk the parts came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quickmerge.models.compat import CONFIG_PLACES

__all__ = ["model_label", "save_parts"]

CONFIG = "config.json"


def save_parts(folder: Path, *parts: Any) -> None:
    """Save models, processors and tokenizers in ``folder``, without the paths of the user's disk.

    Args:
        folder: an empty folder.
        parts: what has ``save_pretrained``; None is passed over.
    """
    for part in parts:
        if part is not None:
            part.save_pretrained(folder)
    for path in folder.rglob(CONFIG):
        given = json.loads(path.read_text(encoding="utf-8"))
        cleaned = _without_places(given)
        if cleaned != given:
            # as transformers writes it
            path.write_text(json.dumps(cleaned, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items() if key not in CONFIG_PLACES}
    return [_without_places(item) for item in value] if isinstance(value, list) else value


def model_label(name: str) -> str:
    """What a model is called in a file that may be given away: its name, or of a whole path the last part."""
    return Path(name).name or name if Path(name).is_absolute() else name
