"""Names of a package that are loaded when they are first used, so that importing the package stays cheap."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

__all__ = ["lazy"]


def lazy(
    package: str, homes: Mapping[str, Sequence[str]], *more: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a package's ``__init__`` calls ``__getattr__``, ``__dir__`` and ``__all__``.

    Args:
        package: its dotted name.
        homes: the names by the module that holds them: one of the package, or by its whole dotted name another.
        more: names that the package holds itself.
    """
    where = {
        name: module if module.startswith("quickmerge.") else f"{package}.{module}"
        for module, names in homes.items()
        for name in names
    }

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(import_module(where[name]), name)
        setattr(sys.modules[package], name, found)  # the next use doesn't come here
        return found

    public = sorted({*where, *more})
    return get, lambda: public, public
