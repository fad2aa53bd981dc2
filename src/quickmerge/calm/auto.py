"""Teaches transformers to open what quickmerge saves, once transformers is loaded and not before.

``import quickmerge`` must stay cheap, and so may not load transformers. It looks out for the module of transformers
that holds the table of model types instead, and adds our configs to the table when that is loaded. A config, when it is
made, loads its model, which adds itself to the tables of models.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["watch"]

CONFIGS = "quickmerge.calm.config"
"""Adds itself, and the config of the autoencoder, at its end."""


def _table() -> str:
    from quickmerge.models.compat import CONFIG_TABLE

    return CONFIG_TABLE


def _add() -> None:
    """Add to the table; whatever goes wrong is told and leaves transformers as it would be without us."""
    try:
        if CONFIGS not in sys.modules:  # else it may be what has asked for transformers, and is not through yet
            import_module(CONFIGS)
    except Exception as error:
        _tell(error)


def _is_filled() -> bool:
    try:
        return "transformers" in sys.modules and _table() in sys.modules
    except Exception as error:
        _tell(error)
        return False


def _tell(error: Exception) -> None:
    # By the log and not by a warning: where warnings are errors this one would break the import that it is about.
    logging.getLogger(__name__).warning(
        "transformers can't open what quickmerge saves, for quickmerge can't be loaded (%s: %s): reinstall it",
        type(error).__name__, error,
    )  # fmt: skip


class _Watch(MetaPathFinder):
    """Finds the table as ever, and adds to it when it has been filled."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The table's own spec, or None for any other module, and where anything goes wrong."""
        if not fullname.startswith("transformers."):
            return None
        try:
            return _watched(fullname, path, target) if fullname == _table() else None
        except Exception as error:
            _tell(error)
            return None


def _watched(fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    spec = PathFinder.find_spec(fullname, path, target)
    if spec is None or spec.loader is None:
        return None
    run = spec.loader.exec_module

    def run_and_add(module: ModuleType) -> None:
        run(module)
        _add()

    spec.loader.exec_module = run_and_add  # type: ignore[method-assign]
    return spec


def watch() -> None:
    """Begin; if the table is there already it is added to now. A second call changes nothing."""
    if any(isinstance(finder, _Watch) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Watch())
    if _is_filled():
        _add()
