"""Tokenizers in tiktoken's format: lines of a token in base64 and its rank, its id and its place in merging."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quickmerge.errors import QuickmergeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["read_ranks", "tiktoken_tokenizer"]


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken file and their ranks.

    Raises:
        QuickmergeError: a line is something else, a rank is given twice, or a single byte is lacking.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise QuickmergeError(
                f"{path} is not a tiktoken file: line {number} must be a token in base64 and a number"
            ) from error
    if len(set(ranks.values())) < len(ranks) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise QuickmergeError(
            f"{path} is not a whole tiktoken file: each byte must have a rank, and no rank come twice"
        )
    return ranks


def tiktoken_tokenizer(
    path: Path,
    *,
    pattern: str | None = None,
    special: Sequence[str] = (),
    roles: Mapping[str, str] | None = None,
) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer of a tiktoken file.

    Args:
        path: the file. It holds neither the pattern that words are found with, nor special tokens.
        pattern: the regular expression of a word; None means that of Llama 3 and cl100k. Where a vocabulary has no
            tokens of several digits it gives single digits too, since there is nothing that digits are merged to.
        special: special tokens, whose ids follow those of the file.
        roles: `"eos_token"` and the like, with the special token that has this role.

    Raises:
        QuickmergeError: the file is not in this format, or the pattern is not a regular expression.
    """
    from transformers import PreTrainedTokenizerFast

    from quickmerge.models.compat import TikTokenConverter

    ranks = read_ranks(path)

    class Converter(TikTokenConverter):  # type: ignore[misc]
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks  # transformers would ask the package tiktoken to read the same lines

    options = {} if pattern is None else {"pattern": pattern}
    try:
        backend = Converter(vocab_file=str(path), extra_special_tokens=list(special), **options).converted()
    except Exception as error:  # the library raises a bare Exception for a bad expression
        raise QuickmergeError(f"pattern must be a regular expression, got {pattern!r} ({error})") from error
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **(roles or {}))
