"""Labels as the tokens that follow the prompt, and back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, check_string
from quickmerge.models.tokenizers import from_byte_level

__all__ = ["LabelCodec", "Packed"]

PROBES = ("cat", "red car", "traffic lights")
"""Labels behind which the separator has to be one and the same token."""
BYTE_LEVEL = "Ġ"
MARKERS = (BYTE_LEVEL, "▁")
"""How pieces that begin a word are marked: by byte-level tokenizers, and by those of SentencePiece."""
CONTINUES = "##"
"""How WordPiece marks pieces that go on with a word."""


@dataclass(frozen=True)
class Packed:
    """The labels of a batch of images, one behind the other.

    Args:
        ids: ``(B, N)`` long, each label closed by the separator; padding, on the right, holds the separator too.
        group: ``(B, N)`` long, k >= 1 for the tokens of the k-th label with its separator, 0 for padding.
        valid: ``(B, N)`` bool, False for padding.
        first: ``(B, N)`` bool, the first token of each label.
        count: ``(B,)`` long, labels of each image.
    """

    ids: Tensor
    group: Tensor
    valid: Tensor
    first: Tensor
    count: Tensor

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        return Packed(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    @property
    def closing(self) -> Tensor:
        """``(B, N)`` bool, the separator that closes each label."""
        following = torch.cat([self.group[:, 1:], torch.zeros_like(self.group[:, :1])], 1)
        return self.valid & (self.group != following)


class LabelCodec:
    """What a tokenizer makes of the prompt, the separator, and labels that stand behind the prompt.

    Args:
        tokenizer: of the language model.
        prompt: the text between the image and the labels.
        separator: what closes a label.

    Raises:
        QuickmergeError: the prompt is empty, or the separator is not one token of its own behind a label.
    """

    def __init__(self, tokenizer: Any, prompt: str, separator: str) -> None:
        check_string("prompt", prompt)
        check_string("separator", separator)
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.separator = separator
        self.prompt_ids: list[int] = self._tokens(prompt)
        if not self.prompt_ids:
            raise QuickmergeError(f"prompt must hold at least one token, got {prompt!r}")
        self.start_ids: list[int] = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        self._known: dict[str, tuple[int, ...]] = {}
        self.sep = self._find_separator()

    # Labels to tokens -------------------------------------------------------------------------------------------

    def encode(self, labels: Sequence[Sequence[str]]) -> Packed:
        """Pack the labels of each image in their order.

        White space around and inside a label is made one space; case is kept. A label that is there twice counts
        once.

        Raises:
            QuickmergeError: there is no image, an image has no label, or a label is empty or holds the separator.
        """
        if not len(labels):
            raise QuickmergeError("labels must hold a list for at least one image, got none")
        rows = []
        for index, names in enumerate(labels):
            if isinstance(names, str):
                raise QuickmergeError(f"labels must hold a list of labels for each image, got the text {names!r}")
            if not len(names):
                raise QuickmergeError(f"labels must name at least one label for each image, got none for image {index}")
            rows.append([self.ids(name) for name in dict.fromkeys(self.normal(name) for name in names)])
        width = max(sum(len(label) + 1 for label in row) for row in rows)
        ids = torch.full((len(rows), width), self.sep)
        group = torch.zeros_like(ids)
        first = torch.zeros_like(ids, dtype=torch.bool)
        for at, row in enumerate(rows):
            end = 0
            for number, label in enumerate(row, 1):
                begin, end = end, end + len(label) + 1
                ids[at, begin : end - 1] = torch.tensor(label)
                group[at, begin:end] = number
                first[at, begin] = True
        return Packed(ids, group, group > 0, first, torch.tensor([len(row) for row in rows]))

    def ids(self, label: str) -> tuple[int, ...]:
        """The tokens of one label behind the prompt, without the separator.

        Raises:
            QuickmergeError: the label is empty or holds the separator.
        """
        name = self.normal(label)
        if name not in self._known:
            check_string("a label", label)
            if not name:
                raise QuickmergeError(f"labels must not be empty, got {label!r}")
            found = tuple(self._behind(" " + name))
            if self.sep in found or not found:
                raise QuickmergeError(
                    f"a label must not hold the separator {self.separator!r}, which closes labels, got {label!r}"
                )
            self._known[name] = found
        return self._known[name]

    @staticmethod
    def normal(label: str) -> str:
        """A label with one space wherever it has white space, and none around it.

        Raises:
            QuickmergeError: it is no text.
        """
        if not isinstance(label, str):
            raise QuickmergeError(f"a label must be a text, got a {type(label).__name__}")
        return " ".join(label.split())

    # Tokens to labels -------------------------------------------------------------------------------------------

    def text(self, ids: Sequence[int]) -> str:
        """The label that tokens stand for, separators left out."""
        kept = [int(i) for i in ids if int(i) != self.sep]
        return self.normal(str(self.tokenizer.decode(kept, skip_special_tokens=True)))

    @cached_property
    def special(self) -> Tensor:
        """``(S,)`` long: tokens that are no text and stand in no label."""
        return torch.tensor(sorted({int(i) for i in self.tokenizer.all_special_ids}), dtype=torch.long)

    def starts(self, vocabulary: int) -> Tensor:
        """``(vocabulary,)`` bool: tokens that can begin a label.

        Those are pieces that begin a word, and whose first character is a letter or a digit of any script: no
        separator, no special token, no continuation of a word, and none of the rows that a model has beyond its
        tokenizer. Of a piece that ends within its first character the bytes are judged: one that some letter or digit
        begins with can begin a label. White space alone is one where the tokenizer cuts it from some letter or digit.
        """
        pieces = self.tokenizer.convert_ids_to_tokens(list(range(min(vocabulary, len(self.tokenizer)))))
        sample = self.tokenizer.convert_ids_to_tokens(self.ids(PROBES[0])[:1])[0]
        marker = next((each for each in MARKERS if sample.startswith(each)), "")
        found = torch.zeros(vocabulary, dtype=torch.bool)
        for index, piece in enumerate(pieces):
            if piece is None or not piece.startswith(marker) or piece.startswith(CONTINUES):
                continue
            rest = piece[len(marker) :]
            data = from_byte_level(rest) if marker == BYTE_LEVEL else None
            found[index] = rest[:1].isalnum() if data is None else _begins_word(data)
        alone = self.tokenizer.convert_tokens_to_ids(marker) if marker else None
        # Some tokenizers cut a digit from the space before it, and most do so with letters of scripts that they have
        # hardly seen. What is no letter or digit of theirs may follow too: it is a rare thing to say.
        for character in ("7", *_letters_of_all_scripts()):
            first = self._tokens(f"{self.prompt} {character}")[len(self.prompt_ids) :][:1]
            if character == "7" or first == [alone]:
                found[first] = True
            if character != "7" and first == [alone]:
                break
        found[self.special[self.special < vocabulary]] = False
        found[self.sep] = False
        return found

    # Inside -----------------------------------------------------------------------------------------------------

    def _tokens(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _behind(self, text: str) -> list[int]:
        """The tokens of a text that stands behind the prompt: some tokenizers begin a text with a space of theirs."""
        found = self._tokens(self.prompt + text)
        if found[: len(self.prompt_ids)] != self.prompt_ids:
            raise QuickmergeError(
                f"prompt must keep its tokens when labels follow, but {self.prompt + text!r} is cut across its end: "
                f"{self.prompt!r} should end in a whole word"
            )
        return found[len(self.prompt_ids) :]

    def _find_separator(self) -> int:
        closers = set()
        for probe in PROBES:
            label, closed = self._behind(" " + probe), self._behind(" " + probe + self.separator)
            closers.add(tuple(closed[len(label) :]) if closed[: len(label)] == label else ())
        found = closers.pop() if len(closers) == 1 else ()
        if len(found) != 1 or found[0] in self._behind(" " + PROBES[0]) or found[0] == self.tokenizer.unk_token_id:
            raise QuickmergeError(
                f"separator must be one token of its own behind a label, which {self.separator!r} is not for this "
                f"tokenizer ({type(self.tokenizer).__name__}): give another, such as a comma or a semicolon"
            )
        return found[0]


def _begins_word(data: bytes) -> bool:
    """Whether a text that begins with these bytes can begin with a letter or a digit."""
    for length in range(1, 5):
        try:
            return data[:length].decode().isalnum()
        except UnicodeDecodeError:
            continue
    return data in _beginnings()


@cache
def _beginnings() -> frozenset[bytes]:
    """The first bytes of every letter and digit in UTF-8, one to three of them, without the last."""
    found: set[bytes] = set()
    for code in range(0x80, sys.maxunicode + 1):
        character = chr(code)
        if character.isalnum():
            data = character.encode()
            found.update(data[:length] for length in range(1, len(data)))
    return frozenset(found)


@cache
def _letters_of_all_scripts() -> tuple[str, ...]:
    """A letter for each two bytes that letters begin with in UTF-8, so that each script has some of its own."""
    found: dict[bytes, str] = {}
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if character.isalpha():
            found.setdefault(character.encode()[:2], character)
    return tuple(found.values())
