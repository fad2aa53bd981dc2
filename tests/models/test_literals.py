"""What a literal is, beside a slow statement of it; and which tokens are of one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop
from tokenizer_samples import byte_level, sentencepiece_bpe

from quickmerge.models.literals import (
    BRACKETS,
    END,
    MARKS,
    QUOTES,
    is_literal,
    literal_mask,
    literal_tokens,
    literals,
    stretches,
)
from quickmerge.models.spans import NO_SPACES, pieces_of

WHOLE = {
    "numbers": ["12", "1,234.56", "-5", "3.5e-10", "5%", "$1,200", "½3", "٣٤"],
    "dates and times": ["2024-03-12", "12/03/2024", "12:30:05", "1990–1995"],
    "versions": ["v1.2.3-rc1", "2.13.0+cpu", "gpt2"],
    "keys": ["550e8400-e29b-41d4-a716-446655440000", "0xdeadBEEF", "9f86d081884c7d65"],
    "identifiers": ["max_size", "__init__", "_private", "QuickMerge", "camelCase", "std::vector", "os.path", "--flag",
                    "$HOME"],
    "paths": ["/etc", "/usr/lib/python", "./run", "~/notes", "docs/methods/floor.md", "src/a/b", "C:\\Users\\me"],
    "addresses": ["https://en.wikipedia.org/wiki/Foo_(bar)?a=b&c=d", "ftp://x", "a.b@c.org", "@user"],
    "quoted text": ['"hello world"', "'it's fine'", "`rm x`", "“so”", "«oui»", '"say \\"hi\\" now"'],
}  # fmt: skip
NONE = ["word", "and/or", "e.g", "U.S", "don't", "NASA", "well-known", "end.", "...", "_very_", "TCP/IP", "…", "C", "'"]


@pytest.mark.parametrize("literal", [each for some in WHOLE.values() for each in some])
@pytest.mark.parametrize("frame", ["{}", "it is {} here", "({})", "so {}, and", "at the end {}.", "x = {}; y"])
def test_literals_are_found_whole_and_nothing_beside_them(literal: str, frame: str) -> None:
    text = frame.format(literal)
    start = text.index(literal)
    assert literals(text) == [(start, start + len(literal))]


@pytest.mark.parametrize("text", NONE)
def test_words_are_none(text: str) -> None:
    assert literals(f"a {text} b") == []


def test_scripts_without_spaces_end_a_number() -> None:
    assert [text[a:b] for text in ["在2024年の１２月", "ราคา100บาท"] for a, b in literals(text)] == [
        "2024",
        "１２",
        "100",
    ]


def test_what_is_too_long_or_goes_over_a_line_is_no_quoted_text() -> None:
    assert literals('"' + "so " * 40 + 'far"') == [] and literals('"so\nfar"') == [] and literals('" so "') == []


# A slow statement of runs: character by character, what ends one, and what its ends lose.

SIGNS = "ab A0_9.,:;-/\\@$(\"'\n?! é年１—"


def ends(text: str, i: int) -> bool:
    c = text[i]
    if c.isdecimal():
        return False
    if c == ",":
        return not (0 < i < len(text) - 1 and text[i - 1].isdecimal() and text[i + 1].isdecimal())
    return c.isspace() or c in BRACKETS + QUOTES + MARKS or any(a <= ord(c) <= b for a, b in NO_SPACES)


def runs(text: str) -> set[int]:
    """The characters that are of a literal run."""
    found: set[int] = set()
    i = 0
    while i < len(text):
        if ends(text, i):
            i += 1
            continue
        j = i
        while j < len(text) and not ends(text, j):
            j += 1
        a, b = i, j
        while a < b and text[a] == ":":
            a += 1
        while b > a and text[b - 1] in END:
            b -= 1
        if a < b and is_literal(text[a:b]):
            found |= set(range(a, b))
        i = j
    return found


@prop(300)
@given(st.text(SIGNS, max_size=40))
def test_runs_are_what_the_slow_statement_says(text: str) -> None:
    bare = text.replace('"', " ").replace("'", " ")  # quoted text besides is told apart above
    got = {i for a, b in literals(bare) for i in range(a, b)}
    if "://" not in bare:
        assert got == runs(bare)
    spans = literals(text)
    assert all(a < b for a, b in spans) and all(x[1] <= y[0] for x, y in pairwise(spans))


@prop(100)
@given(st.text(SIGNS, max_size=30))
def test_every_digit_is_of_a_literal(text: str) -> None:
    inside = {i for a, b in literals(text) for i in range(a, b)}
    assert all(i in inside for i, c in enumerate(text) if c.isdecimal())


@pytest.mark.parametrize(
    "unit", ['"', "a", "a:", "://", "'a", "1,", "a://", "\\", "“", ".", '"\\', "a.a", "(", "'a'b", '" ', "a" * 65 + '"']
)
def test_hostile_texts_end(unit: str) -> None:
    """Of 60,000 characters: were time to grow with their square, nobody would wait for it."""
    literals((unit * 60_000)[:60_000])


# Tokens --------------------------------------------------------------------------------------------------------------

TOKENIZERS = {"byte level": byte_level, "sentencepiece": sentencepiece_bpe}


@pytest.mark.parametrize("kind", TOKENIZERS)
@prop(60)
@given(text=st.text('abc 0123.,_é年🙂\n"/', max_size=40))
def test_tokens_that_write_a_character_of_a_literal_are_of_it(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(ids, tokenizer)
    written, places = stretches(pieces)
    owners = literal_tokens(pieces)
    spans = literals(written)
    # Together the tokens write the text, each its own stretch of it, and of a character in pieces each its part.
    assert len(owners) == len(ids) and all(a <= b for a, b in places)
    for (a, b), owner in zip(places, owners, strict=True):
        over = [i for i, (x, y) in enumerate(spans) if a < y and x < b]
        assert owner == (over[0] if over else -1)
    for number, (a, b) in enumerate(spans):
        covered = {i for (x, y), o in zip(places, owners, strict=True) if o >= 0 for i in range(x, y)}
        assert set(range(a, b)) <= covered, number


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_mask_knows_padding_special_tokens_and_rows(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer("the cat 6789 sat on max_size", add_special_tokens=False)["input_ids"]
    mark = tokenizer.eos_token_id
    one = torch.tensor([ids])
    alone = literal_mask(one, torch.ones_like(one, dtype=torch.bool), tokenizer)[0]
    assert 0 < int(alone.sum()) < len(ids)
    padded = torch.tensor([[mark] * 3 + ids, ids + [mark] * 3])
    valid = torch.tensor([[False] * 3 + [True] * len(ids), [True] * len(ids) + [False] * 3])
    got = literal_mask(padded, valid, tokenizer)
    assert torch.equal(got[0, 3:], alone) and torch.equal(got[1, :-3], alone) and not bool(got[~valid].any())
    # A special token is of no literal, and none goes over it.
    number = tokenizer("12", add_special_tokens=False)["input_ids"]
    cut = torch.tensor([[*number, mark, *number]])
    found = literal_tokens(pieces_of(cut[0].tolist(), tokenizer))
    assert found[len(number)] == -1 and found[-1] == found[0] + 1
