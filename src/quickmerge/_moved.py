"""Modules of version 0.1 by the names that they had then; each tells once what it is called now.

The finder stands in front of all others: a package by its old name has the path of the new one, and what lies there
must not be loaded a second time under another name.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["watch"]

PARTED = {
    "quickmerge.evaluation": (
        "merge.bench.text", "merge.bench.cost", "merge.bench.linearity", "bench.quality", "datasets.text",
    ),
    "quickmerge.hosts": (
        "merge.attach", "merge.run", "merge.vision.vit", "merge.visual.vlm", "models.attachment",
        "models.decoder", "models.encoder", "models.vlm",
    ),
    "quickmerge.report": (
        "bench.pareto", "merge.bench.text", "merge.demo", "viz.charts", "viz.page", "viz.patchmap",
        "viz.patchmap_sheet", "viz.patchmap_video", "viz.tokenmap", "viz.tokenmap_figure",
    ),
}  # fmt: skip
"""Packages whose names have parted, and where they are to be found now."""


@cache
def _table() -> dict[str, str]:
    found: dict[str, str] = json.loads((Path(__file__).parent / "data" / "moved.json").read_text(encoding="utf-8"))
    return found


class _Moved(MetaPathFinder, Loader):
    """Finds what has another name now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for a name of version 0.1, None for any other."""
        if not fullname.startswith("quickmerge."):
            return None
        if fullname not in PARTED and fullname not in _table():
            if fullname.rpartition(".")[0] in _table():
                raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        """Put the module that it is now in the place of the one that was asked for."""
        name = module.__name__
        now = "in other folders" if name in PARTED else _table()[name]
        warnings.warn(f"{name} is {now} since quickmerge 0.2", DeprecationWarning, stacklevel=2)
        if name not in PARTED:
            sys.modules[name] = import_module(now)
            return

        def get(wanted: str) -> Any:
            if not wanted.startswith("__"):
                for home in PARTED[name]:
                    there = import_module(f"quickmerge.{home}")
                    if hasattr(there, wanted):
                        return getattr(there, wanted)
            raise AttributeError(f"module {name!r} has no attribute {wanted!r}")

        module.__getattr__ = get  # type: ignore[method-assign]


def watch() -> None:
    """Begin; a second call changes nothing."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())
