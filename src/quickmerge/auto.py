"""Teaches transformers to open what quickmerge saves, once transformers is loaded and not before.

``import quickmerge`` must stay cheap, and so may not load transformers. It looks out for the module of transformers
that holds the table of model types instead, and adds our configs to the table when that is loaded. A config, when it is
made, loads its model, which adds itself to the tables of models.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["watch"]

TABLE = "transformers.models.auto.configuration_auto"
CONFIGS = "quickmerge.continuous.config"
"""Adds itself, and the config of the autoencoder, at its end."""


def _add() -> None:
    if CONFIGS not in sys.modules:  # else it may be what has asked for transformers, and is not through yet
        import_module(CONFIGS)


class _Watch(MetaPathFinder):
    """Finds the table as ever, and adds to it when it has been filled."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The table's own spec, or None for any other module."""
        if fullname != TABLE:
            return None
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
    if TABLE in sys.modules:
        _add()
