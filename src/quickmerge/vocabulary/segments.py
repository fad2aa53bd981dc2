"""What the base's tokenizer makes of another vocabulary's tokens: the pieces that subword rules build rows from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from quickmerge.vocabulary.pieces import cut

if TYPE_CHECKING:
    from quickmerge.vocabulary.tokens import Vocabulary

__all__ = ["Segmenter"]


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
