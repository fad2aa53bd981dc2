"""Texts that draft heads are trained on, with what the target made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from quickmerge.datasets.text import TextWindows
from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.files import write_json
from quickmerge.speculative.gumiho.self_answers import Answered

__all__ = ["DraftTexts", "collate_texts", "keep_features"]

LIST = "features.json"
VALUES = "features.bf16"
"""Raw bfloat16, one row of H values for each token of each text in turn."""


class DraftTexts:
    """Texts as draft heads learn from them.

    An item is ``{"ids": (n,) long, "counts": (n,) bool}``, where ``counts[j]`` says whether the feature of token j is
    one that the heads shall guess: where it predicts a token of a plain text, or a token of an answer of the target.
    Once features were kept there is ``"features": (n, H)`` bfloat16 too.

    Args:
        windows: plain texts; None for none.
        answers: of the target.
        length: tokens of a text at most; an answer is cut there.
        most: take so many windows, drawn at random; None takes all.
        seed: of that draw.

    Raises:
        QuickmergeError: there is no text with a feature that counts.
    """

    def __init__(
        self,
        windows: TextWindows | None,
        answers: Sequence[Answered] = (),
        *,
        length: int = 256,
        most: int | None = None,
        seed: int = 0,
    ) -> None:
        length = whole_number("length", length, 3)
        self._ids: list[NDArray[np.int32]] = []
        self._first: list[int] = []  # feature that counts
        if windows is not None:
            order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
            for index in sorted(order[:most].tolist()):
                self._add(windows[index].numpy(), 1)
        self.plain = len(self._ids)
        for one in answers:
            self._add(np.array(one.prompt + one.answer)[:length], max(1, len(one.prompt) - 1))
        if not self._ids:
            raise QuickmergeError("there are no texts to train draft heads on, or prompts leave no room for answers")
        self._start = np.concatenate([[0], np.cumsum([len(ids) for ids in self._ids])])
        self._features: Tensor | None = None

    def _add(self, ids: NDArray[Any], first: int) -> None:
        if len(ids) - 1 > first:  # a feature behind the first one, and the token that it predicts
            self._ids.append(ids.astype(np.int32))
            self._first.append(first)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One text; see the class."""
        ids = self._ids[index]
        place = torch.arange(len(ids))
        counts = (place >= self._first[index]) & (place < len(ids) - 1)
        item = {"ids": torch.from_numpy(ids.astype(np.int64)), "counts": counts}
        if self._features is not None:
            item["features"] = self._features[self._start[index] : self._start[index + 1]]
        return item

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return int(self._start[-1])

    @property
    def largest(self) -> int:
        """The largest token id."""
        return int(max(ids.max() for ids in self._ids))

    def place(self, index: int) -> slice:
        """Where the features of a text stand among those of all."""
        return slice(int(self._start[index]), int(self._start[index + 1]))

    def keep(self, features: Tensor) -> None:
        """From now on give out these features ``(tokens, H)`` too."""
        if features.ndim != 2 or len(features) != self.tokens:
            raise ValueError(f"features must be ({self.tokens}, H) for these texts, got {tuple(features.shape)}")
        self._features = features

    def frequent(self, count: int) -> tuple[Tensor, float]:
        """The ``count`` tokens that are predicted most often, rising, and their share of all that is predicted."""
        seen = np.bincount(
            np.concatenate([ids[first + 1 :] for ids, first in zip(self._ids, self._first, strict=True)])
        )
        order = np.argsort(-seen, kind="stable")[:count]
        order = order[seen[order] > 0]
        return torch.from_numpy(np.sort(order)), float(seen[order].sum() / seen.sum())

    def describe(self, index: int) -> str:
        """What a text is called."""
        return f"text {index + 1}" if index < self.plain else f"answer {index + 1 - self.plain}"

    def fingerprint(self) -> str:
        """A sha256 over the texts, in hexadecimal."""
        digest = hashlib.sha256()
        for ids, first in zip(self._ids, self._first, strict=True):
            digest.update(f"{len(ids)} {first} ".encode() + ids.astype("<i4").tobytes())
        return digest.hexdigest()


def collate_texts(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of items, padded on the right with token 0, which does not count."""
    wide = max(len(item["ids"]) for item in items)
    out = {}
    for name in items[0]:
        like = items[0][name]
        out[name] = like.new_zeros(len(items), wide, *like.shape[1:])
        for row, item in zip(out[name], items, strict=True):
            row[: len(item[name])] = item[name]
    return out


@torch.no_grad()
def keep_features(
    model: PreTrainedModel,
    texts: DraftTexts,
    known: dict[str, Any],
    *,
    folder: Path | None = None,
    batch: int = 16,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Let the target read all texts once, and keep its last hidden states in bfloat16.

    Args:
        model: the target, in the type that it shall compute in.
        texts: they then give features out.
        known: what the features depend on beside the texts, such as the model's hash.
        folder: where to keep them, for other trainings too: ``tokens * H * 2`` bytes. A run that was killed goes on.
            None keeps them in memory.
        batch: texts read at once, of about the same length.
        advance: called with the number of texts that are read or were found.

    Raises:
        QuickmergeError: the folder holds features of other texts or of another model, or can't be written.
    """
    width = model.get_output_embeddings().weight.shape[1]
    head = {**known, "texts": texts.fingerprint(), "tokens": texts.tokens, "width": width, "batch": batch}
    values, done = _open(folder, head)
    order = sorted(range(len(texts)), key=lambda index: texts.place(index).start - texts.place(index).stop)
    if advance is not None:
        advance(done)
    for start in range(done, len(order), batch):
        rows = order[start : start + batch]
        ids = collate_texts([{"ids": texts[index]["ids"]} for index in rows])["ids"]
        # Padding is behind the texts, where a causal model does not see it.
        hidden = model.base_model(ids.to(model.device), use_cache=False).last_hidden_state.to("cpu", torch.bfloat16)
        for index, row in zip(rows, hidden, strict=True):
            place = texts.place(index)
            values[place] = row[: place.stop - place.start]
        if folder is not None:
            write_json(folder / LIST, {**head, "read": start + len(rows)})
        if advance is not None:
            advance(len(rows))
    texts.keep(values)


def _open(folder: Path | None, head: dict[str, Any]) -> tuple[Tensor, int]:
    """Room for the features, and how many texts have theirs already."""
    size = head["tokens"] * head["width"]
    if folder is None:
        return torch.empty(head["tokens"], head["width"], dtype=torch.bfloat16), 0
    done = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / LIST).exists():
            done = _read_list(folder / LIST, head)
        if not done or not (folder / VALUES).exists() or (folder / VALUES).stat().st_size != 2 * size:
            done = 0
            with (folder / VALUES).open("wb") as file:
                file.truncate(2 * size)
        values = torch.from_file(str(folder / VALUES), shared=True, size=size, dtype=torch.bfloat16)
    except (OSError, RuntimeError) as error:
        raise QuickmergeError(f"{folder} can't be written ({getattr(error, 'strerror', None) or error})") from error
    return values.view(head["tokens"], head["width"]), done


def _read_list(path: Path, head: dict[str, Any]) -> int:
    import json

    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise QuickmergeError(f"{path} must be JSON, got something else") from None
    for name, value in head.items():
        if not isinstance(known, dict) or known.get(name) != value:
            raise QuickmergeError(
                f"{path.parent} holds features of other texts or of another model ({name} differs): give another folder"
            )
    return int(known["read"])
