"""A tokenizer is tried as soon as it is read: what its files hold wrongly comes out only when it is used."""

from __future__ import annotations

from typing import Any, TypeVar

__all__ = ["tried"]

T = TypeVar("T")
WORDS = "The sea, 12."
MOST_IDS = 2**22
"""No vocabulary that was ever published has a fourth of it; whoever makes a row for each id pays for the highest."""


def tried(tokenizer: T) -> T:
    """Give back a tokenizer of transformers that splits a text and puts it together again.

    Raises:
        ValueError: its longest text is no number, or an id is out of all proportion. Whatever else its parts raise is
            raised as it is: call this where reading it is turned into one sentence.
    """
    any_: Any = tokenizer
    longest = any_.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)):
        raise ValueError(f"model_max_length must be a number, got {longest!r}")
    highest = max(any_.get_vocab().values(), default=0)
    if highest >= MOST_IDS:
        raise ValueError(f"ids must be below {MOST_IDS:,}, got {highest:,}")
    any_.decode(any_(WORDS, add_special_tokens=False, verbose=False)["input_ids"], skip_special_tokens=True)
    return tokenizer
