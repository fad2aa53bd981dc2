"""Packages that only some readers need."""

from __future__ import annotations

import importlib
from types import ModuleType

from quickmerge.errors import QuickmergeError


def need(module: str, extra: str, what: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: the name that is imported.
        extra: the extra of quickmerge that installs it.
        what: what cannot be read without it, as the beginning of a sentence.

    Raises:
        QuickmergeError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # it is there, and something that it needs is not
            raise
        package = module.replace("_", "-")
        raise QuickmergeError(
            f"{what} need the package {package}, which is not installed: pip install quickmerge[{extra}]"
        ) from None
