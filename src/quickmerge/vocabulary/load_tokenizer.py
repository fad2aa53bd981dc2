"""One way to load a tokenizer without its model: a name, a folder, a hub id or a single file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from quickmerge.errors import (
    QuickmergeError,
    UnknownModelError,
    UnsupportedModelError,
    door,
    first_sentence,
    near_match,
)
from quickmerge.models.cache import cache_folder
from quickmerge.models.console import transformers_silenced
from quickmerge.models.embedded import MODELS, SENTENCE_MODELS, prepare_embedded
from quickmerge.models.folder import TEXT_BYTES, check_files
from quickmerge.models.hub import hub_folder
from quickmerge.models.paths import check_regular, local_path
from quickmerge.models.sentencepiece_file import sentencepiece_tokenizer
from quickmerge.models.tiktoken_file import tiktoken_tokenizer
from quickmerge.models.tokenizers import TOKENIZERS, prepare_tokenizer
from quickmerge.models.tried import tried
from quickmerge.vocabulary.special import roles_by_spelling
from quickmerge.vocabulary.templates import of_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer"]

BARE = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "*.model")
ALLOWED = (
    "a folder with a tokenizer.json, a tokenizer.json, a SentencePiece tokenizer.model, a tiktoken file, "
    f"an embedded name ({', '.join([*MODELS, *SENTENCE_MODELS, *TOKENIZERS])}) or a hub id such as owner/name"
)


def load_tokenizer(
    source: str | os.PathLike[str],
    *,
    pattern: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that the `tokenizers` library runs; no weights are read.

    Args:
        source: an embedded name (a model's, or one of `quickmerge.models.tokenizers.TOKENIZERS`), a folder of a model
            or of a tokenizer, a hub id (`"owner/name"`), or a file: a `tokenizer.json`, a SentencePiece
            `tokenizer.model` (needs the package sentencepiece) or one in tiktoken's format.
        pattern: the regular expression of a word, for a tiktoken file, which doesn't hold it; None means that of
            Llama 3 and cl100k.
        cache_dir: where embedded models are kept; None means `$QUICKMERGE_CACHE`, else the user's cache folder.
        progress: whether to show on stderr what goes on.

    Returns:
        The tokenizer as its files say. Where there is but one file, special tokens have the roles that they are
        usually spelled for.

    Raises:
        UnknownModelError: there is no such thing, or the hub can't be reached.
        UnsupportedModelError: it isn't a tokenizer, or not one that the `tokenizers` library runs.
        CacheFolderError: the cache folder can't be written.
        FetchError: an embedded one could not be downloaded.
        DamagedWeightsError: an embedded one is not what was published.
        QuickmergeError: `pattern` can't be used.
    """
    name = os.fspath(source)
    path = local_path("tokenizer", name, UnknownModelError) if name else Path()
    if name in TOKENIZERS:
        path = prepare_tokenizer(name, cache_folder(cache_dir), progress=progress)
    elif name in MODELS or name in SENTENCE_MODELS:
        path = prepare_embedded(name, cache_folder(cache_dir), progress=progress)
    folder = path if name and path.is_dir() else None
    if folder is not None:
        path = _in_folder(folder)
    if pattern is not None and not _is_tiktoken(path):
        raise QuickmergeError(f"pattern is for a tiktoken file, which doesn't say how words are found; got {name}")
    if not name or not path.exists():
        _check_hub_id(name)
    with transformers_silenced():
        tokenizer = _read(name, path, pattern)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UnsupportedModelError(
            f"{name} has a {type(tokenizer).__name__}, which runs in Python alone: give {ALLOWED}"
        )
    if folder is not None and tokenizer.chat_template is None:
        tokenizer.chat_template = of_folder(folder)
    return tokenizer


def _in_folder(folder: Path) -> Path:
    """The folder itself if it says what its tokenizer is, else the one file in it."""
    if any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json")):
        return folder
    found = next((path for name in BARE for path in sorted(folder.glob(name))), None)
    if found is None:
        raise UnknownModelError(f"the folder {folder} holds no tokenizer (tokenizer.json): give {ALLOWED}")
    return found


def _check_hub_id(name: str) -> None:
    # a hub id is exactly owner/name; whatever else has a slash was meant as a path
    owner, slash, rest = name.partition("/")
    if not slash or owner in ("", ".", "..", "~") or not rest or "/" in rest:
        names = [*MODELS, *SENTENCE_MODELS, *TOKENIZERS]
        raise UnknownModelError(f"there is no tokenizer {name!r}{near_match(name, names)}: give {ALLOWED}")


def _read(name: str, path: Path, pattern: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if path.is_file():
        return _read_file(path, pattern)
    if not path.is_dir():
        path = hub_folder(name, weights=False)
    check_files(path)
    try:
        tokenizer: PreTrainedTokenizerBase = tried(AutoTokenizer.from_pretrained(str(path), trust_remote_code=False))
    except Exception as error:  # transformers raises whatever its parsers raise
        if path.is_dir() and (path / "tokenizer.json").is_file():
            return _read_file(path / "tokenizer.json", None)
        if path.is_dir():
            raise UnsupportedModelError(f"{path} has no usable tokenizer ({first_sentence(error)})") from error
        raise UnknownModelError(
            f"the hub has no tokenizer {name!r} that can be reached from here ({first_sentence(error)}): "
            f"check the id and the connection, or give {ALLOWED}"
        ) from error
    return tokenizer


def _read_file(path: Path, pattern: str | None) -> PreTrainedTokenizerBase:
    check_regular(path, TEXT_BYTES)
    with door(f"{path} holds no usable tokenizer", UnsupportedModelError):
        if _is_json(path):
            return tried(_read_json(path))
        if _is_tiktoken(path):
            return tried(tiktoken_tokenizer(path, pattern=pattern))
        return tried(sentencepiece_tokenizer(path))


def _read_json(path: Path) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False)
    except Exception as error:  # the parser raises a bare Exception
        raise UnsupportedModelError(
            f"{path} is not a tokenizer.json of the tokenizers library ({first_sentence(error)})"
        ) from error
    return _with_roles(tokenizer)


def _with_roles(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    flagged = [
        token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values() if token.special
    ]
    for role, text in roles_by_spelling(flagged).items():
        if getattr(tokenizer, f"{role}_token") is None:
            setattr(tokenizer, f"{role}_token", text)
    return tokenizer


def _is_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{")


def _is_tiktoken(path: Path) -> bool:
    """Whether a file starts with a line of base64 and a number."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline(4096).split()
    return len(first) == 2 and first[1].isdigit() and first[0].isascii() and first[0].rstrip(b"=").isalnum()
