"""What a package says that it offers is there: names that are loaded on first use are loaded once here."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import quickmerge

PACKAGES = [
    "quickmerge",
    *(f"quickmerge.{each.name}" for each in pkgutil.iter_modules(quickmerge.__path__) if each.ispkg),
]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_offered_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    for offered in getattr(module, "__all__", ()):
        assert getattr(module, offered) is not None, f"{package}.{offered}"
