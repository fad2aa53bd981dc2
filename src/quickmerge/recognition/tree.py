"""Reading many continuations of one prefix: each token once, behind a cache that all of them share.

The newest tokens of all branches are fed as one sequence. A mask lets each see the prefix and its own branch, which
is the mask of training again; nothing is copied, and a branch that is done costs nothing more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from quickmerge.recognition.language import fork, read
from quickmerge.recognition.model import Prefix, Recognizer
from quickmerge.tokens.packing import packed_mask, packed_positions

__all__ = ["Tree"]


class Tree:
    """A prefix that has been read, and the tokens read behind it.

    Args:
        recognizer: what reads.
        prefix: of B images.
    """

    def __init__(self, recognizer: Recognizer, prefix: Prefix) -> None:
        self.recognizer = recognizer
        self.prefix = prefix
        self.cache = DynamicCache()
        group = torch.zeros_like(prefix.valid, dtype=torch.long)
        see = packed_mask(group, prefix.image, prefix.valid, bidirectional=recognizer.config.bidirectional)
        self.position = packed_positions(group, prefix.valid)
        last = torch.zeros_like(prefix.valid)
        last[:, -1] = True
        self.first = read(recognizer.language, prefix.embeds, see, self.position, rows=last, cache=self.cache)
        """``(B, V)`` logits of the first token behind the prefix."""

    def __len__(self) -> int:
        """Tokens of every row in the cache: the column that the next token gets."""
        return self.position.shape[1]

    def fork(self) -> Tree:
        """A tree that grows by itself from what has been read so far."""
        other = Tree.__new__(Tree)
        other.__dict__ = {**self.__dict__, "cache": fork(self.cache)}
        return other

    def grow(self, ids: Tensor, depth: Tensor, path: Tensor, real: Tensor) -> Tensor:
        """Read one more token for each of W branches.

        Args:
            ids: ``(B, W)`` tokens; they get the columns from ``len(tree)`` on.
            depth: ``(B, W)`` tokens between the prefix and each.
            path: ``(B, W, T)`` columns of the tokens between, -1 where there are fewer than T.
            real: ``(B, W)`` bool, False for padding.

        Returns:
            ``(R, V)`` logits of what follows each real token, in reading order.
        """
        columns, wide = len(self), ids.shape[1]
        see = torch.zeros(*ids.shape, columns + wide + 1, dtype=torch.bool, device=ids.device)
        see[..., : self.prefix.valid.shape[1]] = self.prefix.valid[:, None]
        # a column more, cut off again, takes the -1
        see.scatter_(2, torch.where(path < 0, columns + wide, path), True)
        see = see[..., :-1]
        itself = torch.arange(wide, device=ids.device)
        see[:, itself, columns + itself] = True
        return self._read(ids, see[:, None], self.prefix.length[:, None] + depth, real)

    def pack(self, ids: Tensor, group: Tensor, rows: Tensor) -> Tensor:
        """Read whole items ``ids (1, N)`` of ``group (1, N)`` at once behind every image.

        Returns:
            ``(R, V)`` logits of the rows ``(B, N)`` that are asked for.
        """
        count = len(self.prefix.valid)
        own = packed_mask(group, torch.zeros_like(group, dtype=torch.bool))
        before = self.prefix.valid[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        see = torch.cat([before, own.expand(count, -1, -1, -1)], -1)
        position = packed_positions(group) + self.prefix.length[:, None]
        return self._read(ids.expand(count, -1), see, position, rows)

    def _read(self, ids: Tensor, see: Tensor, position: Tensor, rows: Tensor) -> Tensor:
        language = self.recognizer.language
        self.position = torch.cat([self.position, position], 1)
        embeds = language.get_input_embeddings()(ids).to(self.prefix.embeds.dtype)
        return read(language, embeds, see, position, rows=rows, cache=self.cache, key_position=self.position)
