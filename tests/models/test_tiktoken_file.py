"""Files in tiktoken's format."""

from __future__ import annotations

import base64
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quickmerge.errors import QuickmergeError
from quickmerge.models.tokenizer_files import read_ranks, tiktoken_tokenizer

# later words are merged from earlier ones, as training leaves them
WORDS = [b"ab", b"abc", b"cd", b"abcd", b" a", b" ab", "é".encode(), b"dd"]


def write(path: Path, tokens: list[bytes]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def cut(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """The plain statement of the method: join the two neighbours whose union has the lowest rank, until none has."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        unions = [(ranks[left + right], at) for at, (left, right) in enumerate(pairwise(parts))
                  if left + right in ranks]  # fmt: skip
        if not unions:
            return [ranks[part] for part in parts]
        _, at = min(unions)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("ranks") / "a.tiktoken", [bytes([byte]) for byte in range(256)] + WORDS)


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from("abcdé"), min_size=1, max_size=12))
def test_words_are_merged_by_rank(path: Path, text: str) -> None:
    tokenizer = tiktoken_tokenizer(path)
    assert tokenizer(text).input_ids == cut(read_ranks(path), text.encode())


def test_special_tokens_follow_and_may_have_roles(path: Path) -> None:
    tokenizer = tiktoken_tokenizer(path, special=["<|end|>", "<|user|>"], roles={"eos_token": "<|end|>"})
    assert tokenizer("ab<|end|><|user|>").input_ids == [256, 264, 265]
    assert tokenizer.eos_token_id == 264
    assert tokenizer.decode([256, 260, 262]) == "ab aé"


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tiktoken"
    for content, message in (
        (b"QQ== 0\nhello\n", "line 2 must be a token in base64 and a number"),
        (b"Q! 0\n", "line 1 must be"),
        (b"QQ== x\n", "line 1 must be"),
        (b"QQ== 0\n", "each byte must have a rank"),
    ):
        path.write_bytes(content)
        with pytest.raises(QuickmergeError, match=message):
            read_ranks(path)
    write(path, [bytes([byte]) for byte in range(256)])
    path.write_bytes(path.read_bytes() + base64.b64encode(b"ab") + b" 7\n")
    with pytest.raises(QuickmergeError, match="no rank come twice"):
        read_ranks(path)
