"""A donor with vectors: the vocabulary of Llama 2 and the static embeddings that WordLlama trained for it.

The package wordllama holds the tokenizer, and a 256-wide vector for each of its 32,000 tokens. Of its releases an old
one is taken: it is one file for all platforms, with the same vectors and tokenizer as the newest.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from quickmerge.models.download import (
    WheelFile,
    build_once,
    check_folder,
    download_files,
    folder_name,
    installed_file,
    write_manifest,
)

__all__ = [
    "DESCRIPTION",
    "FILES",
    "NAME",
    "TOKENIZER",
    "VECTORS",
    "VECTORS_KEY",
    "check_folder",
    "folder_in",
    "prepare",
]

NAME = "wordllama-l2"
DESCRIPTION = "the vocabulary of Llama 2 (32,000 tokens) with WordLlama's static 256-wide vectors"
PACKAGE = "wordllama==0.2.0"
WHEEL_SHA256 = "832bbd0878cb5b09e2e42e2751eaa475370f036f11602ccc0c473835df298a92"
TOKENIZER = "tokenizer.json"
VECTORS = "l2_supercat_256.safetensors"
VECTORS_KEY = "embedding.weight"
"""The tensor in `VECTORS`: ``(32000, 256)``, float16, a row for each id."""
MEMBERS = {
    "tokenizers/l2_supercat_tokenizer_config.json": "bf467c9e0f536bda271283c6ef85eb1a943e3196b621c8a912d64953b205df83",
    f"weights/{VECTORS}": "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
}
FILES = tuple(
    WheelFile(
        package=PACKAGE,
        wheel_sha256=WHEEL_SHA256,
        wheel_bytes=15_725_942,
        module="wordllama",
        member=member,
        sha256=digest,
        model=NAME,
        title="WordLlama's vectors",
    )
    for member, digest in MEMBERS.items()
)
# Raise this when other files are taken, so that nobody goes on with what an older release wrote.
RECIPE = "1"


def folder_in(cache: Path) -> Path:
    """Where the donor lies in `cache`; the name changes with the vectors and with what is taken."""
    return cache / folder_name(NAME, MEMBERS[f"weights/{VECTORS}"], RECIPE)


def prepare(cache: Path, *, progress: bool = True) -> Path:
    """Give the folder of the donor, fetching it if it is not there yet.

    Args:
        cache: the cache folder.
        progress: whether to show what goes on.

    Returns:
        A folder with `TOKENIZER` and `VECTORS`.

    Raises:
        CacheFolderError: the cache cannot be written.
        FetchError: the package could not be downloaded.
        DamagedWeightsError: what was downloaded, or what lies in the cache, is not what was written.
    """
    return build_once(folder_in(cache), lambda work: _fill(work, progress=progress))


def _fill(work: Path, *, progress: bool) -> None:
    download = work / "download"
    download.mkdir()
    installed = [path for path in map(installed_file, FILES) if path is not None]
    found = installed if len(installed) == len(FILES) else download_files(FILES, download, progress=progress)
    for path, name in zip(found, (TOKENIZER, VECTORS), strict=True):
        shutil.copyfile(path, work / name)
    shutil.rmtree(download)
    facts = {
        "name": NAME,
        "description": DESCRIPTION,
        "source": f"{PACKAGE}, the package says MIT; the vocabulary is Llama 2's",
        "wheel_sha256": WHEEL_SHA256,
    }
    write_manifest(work, facts, ["tokenizers"])
