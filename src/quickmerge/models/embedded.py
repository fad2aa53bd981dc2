"""The embedded models, which need no hub."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from quickmerge.models import focus_vit, minilm, smollm2

__all__ = ["MODELS", "SENTENCE_MODELS", "VISION_MODELS", "check_embedded", "embedded_folder", "prepare_embedded"]

MODELS: dict[str, str] = {smollm2.NAME: smollm2.DESCRIPTION}
"""The embedded language models: their names, and how to describe each in a report."""

VISION_MODELS: dict[str, str] = {focus_vit.NAME: focus_vit.DESCRIPTION}
"""The embedded vision models: their names, and how to describe each in a report."""

SENTENCE_MODELS: dict[str, str] = {minilm.NAME: minilm.DESCRIPTION}
"""The embedded sentence encoders: their names, and how to describe each in a report."""


class _Maker(Protocol):
    """What the module of an embedded model offers."""

    def folder_in(self, cache: Path) -> Path: ...
    def prepare(self, cache: Path, *, progress: bool = True) -> Path: ...
    def check_folder(self, folder: Path, *, full: bool = False) -> None: ...


_MAKERS: dict[str, _Maker] = {smollm2.NAME: smollm2, focus_vit.NAME: focus_vit, minilm.NAME: minilm}


def prepare_embedded(name: str, cache: Path, *, progress: bool) -> Path:
    """The folder of an embedded model, fetched and converted if need be; raises what its own `prepare` raises."""
    return _MAKERS[name].prepare(cache, progress=progress)


def embedded_folder(name: str, cache: Path) -> Path:
    """Where an embedded model lies in `cache`, whether or not it is there yet."""
    return _MAKERS[name].folder_in(cache)


def check_embedded(name: str, folder: Path) -> None:
    """Hash every file of an embedded model; raises DamagedWeightsError for one that is not what was written."""
    _MAKERS[name].check_folder(folder, full=True)
