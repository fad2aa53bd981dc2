"""What sort of text a token is, so that quality can be told apart by it."""

from __future__ import annotations

import random
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.transplant.rules import at_least_float32
from quickmerge.transplant.tokens import Token, Vocabulary, match_special, read_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "KINDS",
    "DigitReport",
    "Kind",
    "Matching",
    "Segmenter",
    "Subword",
    "cut",
    "cut_number",
    "digit_report",
    "grouping",
    "kind_of",
    "match",
]


Kind = Literal["word start", "continuation", "digits", "non-Latin", "code/punctuation/space"]
KINDS: tuple[str, ...] = get_args(Kind)


def kind_of(data: bytes) -> Kind:
    """The kind of a token by its bytes.

    - `"digits"`: digits only, after spaces.
    - `"non-Latin"`: some letter of another script, or a part of a character of several bytes.
    - `"word start"`: one space and Latin letters; an apostrophe or a hyphen may be among them.
    - `"continuation"`: the same without the space. A word at the start of a line looks like that too.
    - `"code/punctuation/space"`: all else, words glued to punctuation among them.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "non-Latin"
    core = text.strip(" ")
    if core and all(character.isdecimal() for character in core):
        return "digits"
    letters = [character for character in core if unicodedata.category(character)[0] in "LM"]
    if any(not _is_latin(character) for character in letters):
        return "non-Latin"
    if letters and all(character in "'’-" or character in letters for character in core) and text in (core, " " + core):
        return "word start" if text.startswith(" ") else "continuation"
    return "code/punctuation/space"


def _is_latin(character: str) -> bool:
    # marks such as a combining accent belong to the letter before them
    return character.isascii() or unicodedata.name(character, "").startswith(("LATIN", "COMBINING"))


# Which tokens two vocabularies share: those that stand for the same bytes.


@dataclass(frozen=True)
class Matching:
    """What becomes of every token of the donor. Each donor id is in exactly one of `shared`, `special`, `unmapped`
    and `new`.

    Attributes:
        shared: ``(N, 2)``, donor id and base id by rising donor id. A base id may serve several donor ids.
        special: donor id, and the base ids that do its job; several mean the mean of their rows.
        unmapped: special tokens of the donor that nothing in the base corresponds to.
        new: donor ids whose rows have to be rebuilt, rising.
        kinds: the kind of text (`quickmerge.transplant.matching`) of each donor id in `shared` and `new`.
        aliases: donor ids in `shared` or `new` that the donor's tokenizer never gives, since another token stands
            for the same bytes, such as `<0x41>` beside "A". A copy of that token's row in the output layer halves
            the probability of the token that is really used: such rows should not compete.
    """

    shared: NDArray[np.int64]
    special: dict[int, tuple[int, ...]]
    unmapped: tuple[int, ...]
    new: NDArray[np.int64]
    kinds: dict[int, str]
    aliases: tuple[int, ...] = ()


def match(
    donor: Vocabulary,
    base: Vocabulary,
    special: Mapping[str, str] | None = None,
    *,
    base_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Matching:
    """Match the tokens of two vocabularies by the bytes that they stand for.

    Where several tokens stand for the same bytes they are put in the order in which a tokenizer takes them: added
    tokens, which are cut out first; text; what continues a word; single bytes, for which there must be no text; lower
    ids. The first of the donor matches the first of the base, the second the second, and so on, the last of the base
    serving all that are left. So a vocabulary matches itself one to one, and a byte that the donor does use matches
    the token that the base uses for it.

    Args:
        donor: the vocabulary that is wanted.
        base: the vocabulary of the model.
        special: as for `match_special`.
        base_tokenizer: cuts the texts of `special`.

    Raises:
        QuickmergeError: `special` can't be followed.
    """
    found, unmapped = match_special(donor, base, special, base_tokenizer=base_tokenizer)
    mine, theirs = _by_data(donor), _by_data(base)
    pairs: list[tuple[int, int]] = []
    aliases: list[int] = []
    for data, tokens in mine.items():
        known = theirs.get(data, [])
        for place, token in enumerate(tokens):
            if token.id in found:  # the user's map may name a plain token
                continue
            if place:
                aliases.append(token.id)
            if known:
                pairs.append((token.id, known[min(place, len(known) - 1)].id))
    pairs.sort()
    taken = {one for one, _ in pairs} | set(found) | set(unmapped)
    plain = [token for token in donor.tokens if not token.special and token.id not in found]
    return Matching(
        shared=np.array(pairs, dtype=np.int64).reshape(-1, 2),
        special=found,
        unmapped=unmapped,
        new=np.array([token.id for token in plain if token.id not in taken], dtype=np.int64),
        kinds={token.id: kind_of(token.data if token.data is not None else token.text.encode()) for token in plain},
        aliases=tuple(sorted(aliases)),
    )


def _by_data(vocabulary: Vocabulary) -> dict[bytes, list[Token]]:
    groups: dict[bytes, list[Token]] = defaultdict(list)
    for token in vocabulary.tokens:
        if token.data is not None:
            groups[token.data].append(token)
    for tokens in groups.values():
        tokens.sort(key=lambda token: (token.byte, not token.added, token.continuation, token.id))
    return groups


# How two tokenizers cut numbers: a difference that no choice of embeddings repairs.
#
# A model learns to calculate over the pieces that its tokenizer gives it. If the new tokenizer groups digits another
# way, the model meets pieces, or sequences of pieces, that it never learned to calculate with.


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


# New tokens from the base tokens that their text is cut into: needs no donor vectors.


CHUNK = 65536
"""Pieces whose rows are gathered at a time."""


@dataclass(frozen=True)
class Subword:
    """A weighted mean of the rows of the pieces.

    Which one suits which matrix follows from what a row does. An input row stands for what has been read once the token
    is complete: the last piece knows most of that. An output row competes for being next: where the model would have
    begun the same text in pieces, the first piece's logit is what it gave, so "first", or "decay" with weights in
    the ratio 1, 1/2, 1/4, ... from the first piece on. "mean" is for either.

    A new row that is like its pieces' has nearly their logits, and so takes probability away from them wherever the
    base would go on in pieces. Pulled towards the mean of all rows, ``m + share (row - m)``, it takes less.

    Args:
        weights: "first", "last", "mean" or "decay".
        share: how much is left of the difference from the mean of the matrix, above 0 and at most 1.

    Raises:
        QuickmergeError: for another word, or another share.
    """

    WEIGHTS: ClassVar[tuple[str, ...]] = ("first", "last", "mean", "decay")

    weights: str = "mean"
    share: float = 1.0

    def __post_init__(self) -> None:
        number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not number or not 0 < self.share <= 1:
            raise QuickmergeError(f"share must be a number above 0 and at most 1, got {self.share!r}")
        if self.weights not in self.WEIGHTS:
            hint = near_match(str(self.weights), self.WEIGHTS)
            raise QuickmergeError(f"weights must be one of {', '.join(self.WEIGHTS)}, got {self.weights!r}{hint}")

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"subword {self.weights}" + (f" {self.share:g}" if self.share < 1 else "")

    def rebuild(self, pieces: Sequence[Sequence[int]], matrix: Tensor) -> Tensor:
        """Rows of T tokens.

        Args:
            pieces: for each token the base tokens that its text is cut into; a token of none becomes the mean of the
                matrix.
            matrix: ``(V, db)``, all rows of the base.

        Returns:
            ``(T, db)`` in float32 at least.

        Raises:
            QuickmergeError: for a piece that is no row of the matrix.
        """
        matrix = at_least_float32(matrix)
        length = torch.tensor([len(p) for p in pieces], dtype=torch.long)
        flat = torch.tensor([i for p in pieces for i in p], dtype=torch.long)
        wrong = flat[(flat < 0) | (flat >= len(matrix))]
        if len(wrong):
            raise QuickmergeError(f"pieces must be of the matrix's {len(matrix)} rows, got {int(wrong[0])}")
        token = torch.repeat_interleave(torch.arange(len(length)), length)
        place = torch.arange(len(flat)) - (length.cumsum(0) - length)[token]
        weight = self._weigh(place, length[token]).to(matrix.dtype)
        whole = matrix.new_zeros(len(length)).index_add_(0, token, weight)
        out = matrix.new_zeros(len(length), matrix.shape[1])
        for which, index, share in zip(*(torch.split(x, CHUNK) for x in (token, flat, weight)), strict=True):
            out.index_add_(0, which, matrix[index] * (share / whole[which])[:, None])
        middle = matrix.mean(0)
        out[length == 0] = middle
        return out if self.share == 1 else middle + self.share * (out - middle)

    def _weigh(self, place: Tensor, length: Tensor) -> Tensor:
        if self.weights == "first":
            return (place == 0).double()
        if self.weights == "last":
            return (place == length - 1).double()
        return torch.full_like(place, 0.5 if self.weights == "decay" else 1.0, dtype=torch.double) ** place


def cut(data: bytes, ids: Mapping[bytes, int], *, whole: bool = True) -> tuple[int, ...]:
    """The fewest base tokens whose bytes make up ``data``; of equally few those with the longest first piece.

    For a token that the base has, ``whole=False`` finds the pieces it would have without it: what a rule that
    looks at pieces must be judged by.

    Args:
        data: the bytes of a token.
        ids: base tokens by their bytes.
        whole: whether ``data`` itself counts as a piece.

    Returns:
        Base ids; none if there is no way.
    """
    # From every place on: how many pieces it takes to the end, and where the first of them ends.
    best: list[tuple[int, int] | None] = [None] * len(data) + [(0, len(data))]
    for start in range(len(data) - 1, -1, -1):
        for end in range(len(data), start, -1):
            rest = best[end]
            if rest is None or data[start:end] not in ids or (not whole and end - start == len(data)):
                continue
            found = best[start]
            if found is None or rest[0] + 1 < found[0]:
                best[start] = (rest[0] + 1, end)
    out, start = [], 0
    while start < len(data):
        step = best[start]
        if step is None:
            return ()
        out.append(ids[data[start : step[1]]])
        start = step[1]
    return tuple(out)


# What the base's tokenizer makes of another vocabulary's tokens: the pieces that subword rules build rows from.


class Segmenter:
    """Cuts bytes into tokens of the base.

    Args:
        vocabulary: the base's.
        tokenizer: the base's. It is asked first, since its cuts are what the model was trained on. Where its tokens do
            not spell the bytes (half a character, a space that it adds or folds), as few tokens as can spell them do.
    """

    def __init__(self, vocabulary: Vocabulary, tokenizer: Any) -> None:
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.ids: dict[bytes, int] = {}
        for token in vocabulary.tokens:
            if token.data is not None:
                self.ids.setdefault(token.data, token.id)
        self.longest = max(map(len, self.ids), default=0)

    def cut(self, data: bytes) -> tuple[int, ...]:
        """The base ids that spell ``data``; empty where the base can't spell all of it."""
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return self.without_tokenizer(data)
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        if self._spell(ids) == data:
            return ids
        return self.without_tokenizer(data)

    def cut_all(self, tokens: Iterable[bytes]) -> list[tuple[int, ...]]:
        """``cut`` of each."""
        return [self.cut(data) for data in tokens]

    def without_tokenizer(self, data: bytes, *, whole: bool = True) -> tuple[int, ...]:
        """As few tokens as can spell ``data``; ``whole=False`` leaves out the one that spells all of it."""
        size = len(data)
        parts = {data[a:b] for a in range(size) for b in range(a + 1, min(size, a + self.longest) + 1)}
        return cut(data, {part: self.ids[part] for part in parts if part in self.ids}, whole=whole)

    def _spell(self, ids: tuple[int, ...]) -> bytes | None:
        known = self.vocabulary.by_id
        return self.vocabulary.spell(ids) if ids and all(id_ in known for id_ in ids) else None
