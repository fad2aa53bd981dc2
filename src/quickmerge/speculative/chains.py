"""Speculation in models that can't take a token back: what they keep is saved at the root and put back.

A tree is read by a mask and by moving columns of keys and values. A recurrent or convolution state has no columns: it
has read what it has read, in a row. So a model with such blocks, or one that heeds no mask of its own, reads one path
of each tree, as it reads text. What its cache holds is saved in front of the pass. If every drafted token was right the
cache stays as it is; if not, it is put back, and the tokens that were right are read again in front of the next draft.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.columns import room, widest
from quickmerge.models.compat import DynamicLayer, cache_argument
from quickmerge.models.moved import onto
from quickmerge.speculative.target import Columns, last_hidden
from quickmerge.speculative.tree import Packed, Tree

__all__ = ["Chains", "put_back", "save"]

CATCH_UP = 8
"""Tokens that every row has to be behind with before they are read for good: until then they are read again with every
draft, which is cheap while they are few."""

LAG = 16
"""Tokens by which a row may be in front of the slowest one of its batch and still be drafted for."""

REPLACED = ("keys", "values")
"""What a layer of attention never writes into, but has a new tensor for at every update."""


def save(cache: Cache) -> list[dict[str, Any]]:
    """What every layer of a cache holds, to be given to `put_back`.

    Keys and values of attention are held by reference, states are copied.
    """
    return [{name: _held(layer, name, value) for name, value in vars(layer).items()} for layer in cache.layers]


def _held(layer: Any, name: str, value: Any) -> Any:
    # Layers of ours that move their columns write behind what they hold, and nowhere else.
    by_reference = getattr(layer, "movable", False) or (isinstance(layer, DynamicLayer) and name in REPLACED)
    return value if by_reference else _copied(value)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


def put_back(cache: Cache, saved: Sequence[dict[str, Any]]) -> None:
    """Make a cache hold again what it held when it was saved. ``saved`` is used up."""
    del cache.layers[len(saved) :]
    for layer, held in zip(cache.layers, saved, strict=True):
        vars(layer).clear()
        vars(layer).update(held)


class Chains:
    """A model, and the cache of a batch that it reads in step: the same columns in every row.

    Where the cache was put back, the tokens that were right are read again, in front of the root, with the next draft.
    So that these don't become ever more, those that every row has are read for good now and then: in a pass of their
    own, or, where all rows have equally many, with their next roots and without a draft, which gives a token, too.

    Args:
        model: one that `quickmerge.speculative.proof.check_target` lets pass.
        cache: filled, as ``generate`` fills it.
        columns: what it holds.
        features: whether passes also give the last hidden states.
        why: the trait for which it reads no trees.

    Attributes:
        passes: of the model.
        widest: the most nodes of a tree; None for any number.
        saves: whether the cache is saved even in front of a pass that can't go wrong, which may then be taken back.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Cache, columns: Columns, features: bool = False, why: str = "chains"
    ) -> None:
        self.model, self.cache, self.columns, self.features, self.why = model, cache, columns, features, why
        self.passes = 0
        self.saves = False
        self.widest = widest(cache)
        self._behind: list[list[int]] = [[] for _ in columns.valid]
        self._resting: dict[int, int] = {}
        self._lines: list[list[int]] = []
        self._saved: list[dict[str, Any]] | None = None

    def narrowed(self, tree: Tree) -> Tree:
        """The most probable path of a tree."""
        best: dict[int, int] = {}
        for node in range(1, len(tree)):
            above = tree.parent[node]
            if above not in best or tree.prob[node] > tree.prob[best[above]]:
                best[above] = node
        path = [0]
        while path[-1] in best:
            path.append(best[path[-1]])
        return Tree.chain([tree.tokens[node] for node in path], [tree.prob[node] for node in path])

    def room(self) -> list[int] | None:
        """For each row how deep a tree may be; None for any depth."""
        counts = [len(row) for i, row in enumerate(self._behind) if i not in self._resting] or [0]
        least, rows = min(counts), len(self._behind)
        if least >= CATCH_UP and least == max(counts):
            return [0] * rows  # the pass that catches up gives a token, too
        told, most = room(self.cache), self.widest
        if told is None and most is None and max(counts) - least <= LAG:
            return None
        out = []
        for i, row in enumerate(self._behind):
            depth = 1 << 30 if told is None else told[i]
            depth = depth if most is None else min(depth, most - 1)
            over = len(row) - least
            out.append(0 if over > LAG else max(0, depth - over))
        return out

    def read(self, packed: Packed) -> tuple[Tensor, Tensor | None]:
        """Read a path of the text of each row behind what the cache holds.

        Returns:
            ``(B, T, V)`` logits, and the last hidden states ``(B, T, H)`` behind the final norm if wanted.
        """
        drafts = list(packed.rows)
        live = [i for i in range(len(drafts)) if i not in self._resting]
        behind = [len(self._behind[i]) for i in live]
        longest = max(len(self._behind[i]) + len(drafts[i]) for i in live)
        if min(behind) and (longest > self._limit() or (min(behind) >= CATCH_UP and min(behind) < max(behind))):
            self._catch_up(min(behind))
        lines = {i: self._behind[i] + drafts[i] for i in live}
        wide = max(map(len, lines.values()))
        # Where everything that is read is known to be text there is nothing to put back.
        certain = all(len(lines[i]) == wide and len(drafts[i]) == 1 for i in live)
        self._saved = None if certain and not self.saves else save(self.cache)
        self._lines = [
            lines[i] + [0] * (wide - len(lines[i])) if i in lines else self._first(i, wide) for i in range(len(drafts))
        ]
        logits, features = self._forward(self._lines)
        at = onto(torch.tensor([len(row) for row in self._behind]), logits.device)
        step = torch.arange(packed.tokens.shape[1], device=logits.device)
        index = (at[:, None] + step).clamp_max(wide - 1)[..., None]
        logits = logits.gather(1, index.expand(-1, -1, logits.shape[-1]))
        if features is not None:
            features = features.gather(1, index.expand(-1, -1, features.shape[-1]))
        return logits, features

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes on these paths, for each row from the root on."""
        wide = len(self._lines[0])
        right = [
            wide if i in self._resting else len(self._behind[i]) + len(path) if path else 0
            for i, path in enumerate(paths)
        ]
        if min(right) == wide:
            self._moved(wide)
            self._behind = [row[wide:] for row in self._behind]
            return
        if self._saved is not None:
            put_back(self.cache, self._saved)
        self._saved = None
        for i, (line, n) in enumerate(zip(self._lines, right, strict=True)):
            if n and i not in self._resting:
                self._behind[i] = line[:n]

    def rest(self, row: int, last: int, pad: int) -> None:
        """A row that is done stays in the cache: behind its ``last`` token it gets ``pad``, as in ``generate``."""
        self._behind[row].append(last)
        self._resting[row] = pad

    def finish(self, sequences: Tensor) -> None:
        """Read what the cache still lacks of the tokens ``(B, L)``, all but the last ones."""
        missing = sequences[:, self.columns.width : -1]
        step = self._limit()
        self._behind = [[] for _ in sequences]
        while missing.shape[1]:
            self._forward(missing[:, :step].tolist())
            self._moved(min(step, missing.shape[1]))
            missing, step = missing[:, step:], self._limit()

    def select(self, index: Tensor) -> None:
        """Go on with the rows ``index (R,)`` alone."""
        columns, keep, index = self.columns, index.tolist(), onto(index, self.columns.valid.device)
        self.cache.reorder_cache(index)
        self.columns = replace(
            columns,
            valid=columns.valid[index],
            place=columns.place[index],
            length=columns.length[index],
            offset=columns.offset[..., index],
        )
        self._behind = [self._behind[i] for i in keep]
        self._resting = {now: self._resting[i] for now, i in enumerate(keep) if i in self._resting}

    # ------------------------------------------------------------------------------------------------------------

    def _limit(self) -> int:
        """The most columns that one pass may read now."""
        told, most = room(self.cache), self.widest or 1 << 30
        return most if told is None else min(most, 1 + min(told))

    def _catch_up(self, count: int) -> None:
        """Read ``count`` tokens that every row has."""
        while count:
            step = min(count, self._limit())
            self._forward([self._first(i, step) for i in range(len(self._behind))])
            self._moved(step)
            self._behind = [row[step:] for row in self._behind]
            count -= step

    def _first(self, row: int, count: int) -> list[int]:
        """The next ``count`` tokens of a row: those it is behind with, and what stands behind a row that is done."""
        own = self._behind[row][:count]
        return own + [self._resting.get(row, 0)] * (count - len(own))

    def _moved(self, by: int) -> None:
        """The cache holds so many more columns, all of them text."""
        columns, device = self.columns, self.columns.valid.device
        rows = len(columns.valid)
        place = (columns.width + torch.arange(by, device=device)).expand(rows, -1)
        self.columns = replace(
            columns,
            valid=torch.cat([columns.valid, torch.ones(rows, by, dtype=torch.bool, device=device)], 1),
            place=torch.cat([columns.place, place], 1),
            length=columns.length + by,
        )

    def _forward(self, lines: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """One pass, given what ``generate`` gives a model behind its prompt."""
        columns = self.columns
        ids = onto(torch.tensor(lines, dtype=torch.long), columns.valid.device)
        mask = torch.cat([columns.valid.long(), torch.ones_like(ids)], 1)
        given = behind(self.model, mask, (columns.length + columns.offset)[..., None], ids.shape[1])
        with last_hidden(self.model, self.features) as found:
            out = self.model(
                input_ids=ids, **given, **cache_argument(self.model, self.cache), use_cache=True, return_dict=True
            )
        self.passes += 1
        return out.logits, found[0] if self.features else None


def behind(model: PreTrainedModel, mask: Tensor, first: Tensor, count: int) -> dict[str, Tensor]:
    """The mask ``(B, n)``, and the positions of ``count`` tokens from ``first (B, 1)`` on where a model takes any."""
    taken = inspect.signature(model.forward).parameters
    if "attention_mask" not in taken:
        raise UnsupportedModelError(f"{type(model).__name__} takes no attention_mask, which padding needs")
    given = {"attention_mask": mask}
    if "position_ids" in taken:
        given["position_ids"] = first + torch.arange(count, device=mask.device)
    return given
