"""Where the files of a model lie: in a folder, in the cache of embedded models, or, once fetched, in the hub's."""

from __future__ import annotations

import os
from pathlib import Path

from quickmerge.models.cache import cache_folder
from quickmerge.models.embedded import MODELS, SENTENCE_MODELS, prepare_embedded
from quickmerge.models.folder import check_model_folder
from quickmerge.models.hub import hub_folder
from quickmerge.models.load import find_model

__all__ = ["model_folder"]


def model_folder(name: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """The folder that holds a model's files.

    Args:
        name: an embedded name, a model folder, or a hub id.
        progress: whether to show on stderr that something is fetched.

    Raises:
        UnknownModelError: there is no such model, or the hub can't be reached.
        DamagedWeightsError: the folder holds truncated or garbled weights.
        CacheFolderError: the cache folder can't be written.
        FetchError: an embedded model can't be downloaded.
    """
    text = os.fspath(name)
    if text in MODELS or text in SENTENCE_MODELS:
        return prepare_embedded(text, cache_folder(None), progress=progress)
    found = find_model(text)
    if Path(found).is_dir():
        return Path(found)
    folder = hub_folder(found)
    check_model_folder(folder)
    return folder
