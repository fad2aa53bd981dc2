"""How two tokenizers cut numbers: a difference that no choice of embeddings repairs.

A model learns to calculate over the pieces that its tokenizer gives it. If the new tokenizer groups digits another way,
the model meets pieces, or sequences of pieces, that it never learned to calculate with.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.vocabulary.tokens import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DigitReport", "cut_number", "digit_report", "grouping"]

SHORT = 10_000
LONG = 1_000
LONG_DIGITS = (5, 15)
EXAMPLES = 5


@dataclass(frozen=True)
class DigitReport:
    """How often two tokenizers cut a number differently.

    Attributes:
        numbers: how many were tried.
        different: how many of them are cut differently.
        share: `different / numbers`.
        base: how the base's tokenizer groups digits, in words.
        donor: how the donor's does.
        examples: number, the base's pieces, the donor's; the shortest numbers first.
    """

    numbers: int
    different: int
    share: float
    base: str
    donor: str
    examples: tuple[tuple[int, tuple[str, ...], tuple[str, ...]], ...]

    def __str__(self) -> str:
        if not self.different:
            return f"numbers are cut alike by both tokenizers ({self.donor}; {self.numbers:,} tried)"
        number, old, new = self.examples[-1]
        ways = f"base: {self.base}; donor: {self.donor}"
        return (
            f"{self.different:,} of {self.numbers:,} numbers are cut differently ({ways}; {number} is "
            f"{'|'.join(old)} for the base, {'|'.join(new)} for the donor): arithmetic will suffer, and no choice of "
            "embeddings repairs that"
        )


def digit_report(
    base_tokenizer: PreTrainedTokenizerBase,
    donor_tokenizer: PreTrainedTokenizerBase,
    *,
    numbers: Sequence[int] | None = None,
    seed: int = 0,
) -> DigitReport:
    """Compare how two tokenizers cut numbers.

    Args:
        base_tokenizer: of the model.
        donor_tokenizer: the one that is wanted.
        numbers: which to try; None means 0 to 9999, and 1,000 random ones of 5 to 15 digits.
        seed: draws the random ones.

    Raises:
        QuickmergeError: a tokenizer can't be read, or `numbers` is empty or holds something else than whole numbers
            of at least 0.
    """
    tried = _default_numbers(seed) if numbers is None else list(numbers)
    if not tried:
        raise QuickmergeError("numbers must hold at least one number, got none")
    try:
        tried = [whole_number("each of numbers", number, 0) for number in tried]
    except ValueError as error:
        raise QuickmergeError(str(error)) from None
    cuts = [
        [cut_number(tokenizer, vocabulary, number) for number in tried]
        for tokenizer, vocabulary in ((one, read_vocabulary(one)) for one in (base_tokenizer, donor_tokenizer))
    ]
    differing = [(number, old, new) for number, old, new in zip(tried, *cuts, strict=True) if old != new]
    return DigitReport(
        numbers=len(tried),
        different=len(differing),
        share=len(differing) / len(tried),
        base=grouping(cuts[0]),
        donor=grouping(cuts[1]),
        examples=tuple(_examples(differing)),
    )


def cut_number(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, number: int) -> tuple[str, ...]:
    """The pieces that a number is cut into after a space, as in running text; the space itself left out.

    A token that isn't text, such as the unknown one, gives the piece `"?"`.
    """
    encoding = tokenizer.backend_tokenizer.encode(f" {number}", add_special_tokens=False)
    # a backend may pad by itself
    data = [vocabulary.by_id[one].data for one, real in zip(encoding.ids, encoding.attention_mask, strict=True) if real]
    pieces = [b"?" if one is None else one.strip(b" ") for one in data]
    return tuple(piece.decode("utf-8", "replace") for piece in pieces if piece)


def grouping(cuts: Sequence[tuple[str, ...]]) -> str:
    """Say in words how numbers were cut.

    Args:
        cuts: the pieces of each number.
    """
    if any("?" in cut for cut in cuts):
        return "some digits are unknown to it"
    if all(len(piece) == 1 for cut in cuts for piece in cut):
        return "one digit a token"
    if all(len(cut) == 1 for cut in cuts):
        return "whole numbers"
    widest = max(len(piece) for cut in cuts for piece in cut)
    for way, groups in (("left", _from_left), ("right", _from_right)):
        if all(cut == groups("".join(cut), widest) for cut in cuts):
            return f"groups of {widest} from the {way}"
    return f"learned pieces of up to {widest} digits"


def _from_left(digits: str, width: int) -> tuple[str, ...]:
    return tuple(digits[start : start + width] for start in range(0, len(digits), width))


def _from_right(digits: str, width: int) -> tuple[str, ...]:
    head = len(digits) % width
    return (*([digits[:head]] if head else []), *_from_left(digits[head:], width))


def _default_numbers(seed: int) -> list[int]:
    draw = random.Random(seed)
    lengths = [draw.randint(*LONG_DIGITS) for _ in range(LONG)]
    return [*range(SHORT), *(draw.randrange(10 ** (length - 1), 10**length) for length in lengths)]


def _examples(
    differing: list[tuple[int, tuple[str, ...], tuple[str, ...]]],
) -> list[tuple[int, tuple[str, ...], tuple[str, ...]]]:
    # one of each length tells more than the first few, which are all short
    by_length: dict[int, tuple[int, tuple[str, ...], tuple[str, ...]]] = {}
    for row in differing:
        by_length.setdefault(len(str(row[0])), row)
    return [by_length[length] for length in sorted(by_length)][:EXAMPLES]
