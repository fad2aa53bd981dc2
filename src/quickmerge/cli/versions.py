"""``quickmerge --version``: what a report of a fault has to name."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

OTHERS = ("torch", "transformers", "tokenizers", "safetensors")


def versions() -> str:
    """One line: ours, Python's, and those of the libraries that decide what a model does. Nothing is imported."""
    from quickmerge._version import __version__

    found = [f"Python {platform.python_version()}"]
    for name in OTHERS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} missing")
    return f"quickmerge {__version__} ({', '.join(found)})"
