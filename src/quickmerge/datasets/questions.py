"""Questions about images, packed: several of one image stand behind the same image, none sees another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from quickmerge.datasets.images import ImageFolder
from quickmerge.datasets.labelled import PixelFormat
from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.models.chat import answer_ids, prompt_ids

if TYPE_CHECKING:
    from quickmerge.datasets.annotated import Annotated

__all__ = ["AskedImages", "AskedTokens", "Packed", "Row", "pack"]


@dataclass(frozen=True)
class AskedTokens:
    """A question and its answer as tokens: what the template writes behind the image, and the answer to its end."""

    asked: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """An image as the tower takes it, ``(3, H, W)``, the tokens up to the end of the image, and questions."""

    pixels: Tensor
    prefix: tuple[int, ...]
    questions: tuple[AskedTokens, ...]


@dataclass(frozen=True)
class Packed:
    """Images with questions as one batch.

    Args:
        pixels: ``(B, 3, H, W)``.
        ids: ``(B, N)`` tokens, padded on the right.
        group: ``(B, N)``, 0 for what all questions share, k >= 1 for the k-th question and its answer.
        valid: ``(B, N)``, False for padding.
        at: ``(A,)``, where the tokens stand that predict one of an answer, in ``(B * N)``.
        target: ``(A,)``, the tokens that they should predict.
        question: ``(A,)``, which question of the batch each belongs to, counted from 0.
    """

    pixels: Tensor
    ids: Tensor
    group: Tensor
    valid: Tensor
    at: Tensor
    target: Tensor
    question: Tensor

    def to(self, device: Any, **_: Any) -> Packed:
        """The batch on another device."""
        return Packed(*(getattr(self, field.name).to(device) for field in fields(self)))


def pack(rows: Sequence[Row], padding: int = 0) -> Packed:
    """One batch of some images with their questions; ``padding`` is the token that fills up."""
    tokens = [[*row.prefix, *(each for q in row.questions for each in (*q.asked, *q.answer))] for row in rows]
    shape = (len(rows), max(map(len, tokens)))
    ids, group = torch.full(shape, padding), torch.zeros(shape, dtype=torch.long)
    valid = torch.zeros(shape, dtype=torch.bool)
    at: list[int] = []
    target: list[int] = []
    number: list[int] = []
    count = 0
    for index, row in enumerate(rows):
        ids[index, : len(tokens[index])] = torch.tensor(tokens[index])
        valid[index, : len(tokens[index])] = True
        start = len(row.prefix)
        for k, question in enumerate(row.questions):
            first, end = start + len(question.asked), start + len(question.asked) + len(question.answer)
            group[index, start:end] = k + 1
            # the token before each one of the answer predicts it
            at += range(index * shape[1] + first - 1, index * shape[1] + end - 1)
            target += question.answer
            number += [count] * len(question.answer)
            start, count = end, count + 1
    return Packed(
        torch.stack([row.pixels for row in rows]), ids, group, valid, *map(torch.tensor, (at, target, number))
    )


class AskedImages(Dataset[Row]):
    """Annotated images, each with some of its questions, drawn anew each time from torch's global generator.

    Args:
        images: with questions; those without any are passed over.
        tokenizer: of a model that `new_vlm` made.
        form: what its tower wants to be shown.
        image_tokens: how many tokens stand for an image.
        image_token: their id.
        questions: how many at most of each image; None all of them, in their order.

    Raises:
        QuickmergeError: there is no image with a question, or, when one is asked for, an image can't be read.
    """

    def __init__(
        self,
        pictures: Sequence[Annotated],
        tokenizer: PreTrainedTokenizerBase,
        form: PixelFormat,
        *,
        image_tokens: int,
        image_token: int,
        questions: int | None = 10,
    ) -> None:
        if questions is not None:
            questions = whole_number("questions", questions)
        asked = [picture for picture in pictures if picture.questions]
        if not asked:
            raise QuickmergeError("images must hold at least one with a question, got none")
        self.pictures = asked
        self._images = ImageFolder([picture.path for picture in asked], (form.height, form.width))
        self._form, self._most = form, questions
        self._tokenizer, self._tokens, self._token = tokenizer, image_tokens, image_token

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Row:
        """One image with questions."""
        all_of_it = self.pictures[index].questions
        chosen = list(all_of_it)
        if self._most is not None:
            chosen = [all_of_it[k] for k in torch.randperm(len(all_of_it))[: self._most].tolist()]
        prefix: tuple[int, ...] = ()
        made: list[AskedTokens] = []
        for each in chosen:
            ids = prompt_ids(self._tokenizer, each.question, self._tokens)
            end = len(ids) - ids[::-1].index(self._token)
            prefix = tuple(ids[:end])
            made.append(AskedTokens(tuple(ids[end:]), tuple(answer_ids(self._tokenizer, each.answer))))
        return Row(self.pixels(index), prefix, tuple(made))

    def pixels(self, index: int) -> Tensor:
        """One image alone, ``(3, H, W)``, standardised."""
        return self._form.standardised(self._images[index])

    def describe(self, index: int) -> str:
        """What an image is called."""
        return self._images.describe(index)

    def fingerprint(self) -> str:
        """A sha256 over questions, answers, settings and a sample of the images, in hexadecimal."""
        texts = [[(each.question, each.answer) for each in picture.questions] for picture in self.pictures]
        known = f"{self._images.fingerprint()} {texts} {self._form} {self._most} {self._tokens}"
        return hashlib.sha256(known.encode()).hexdigest()
