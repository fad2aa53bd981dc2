"""Reading many continuations of one prefix: each token once, behind a cache that all of them share.

The newest tokens of all branches are fed as one sequence. A mask lets each see the prefix and its own branch, which
is the mask of training again; nothing is copied, and a branch that is done costs nothing more.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.recognition.guess import Guess, check_share, ranked
from quickmerge.recognition.language import fork, read
from quickmerge.recognition.network import Network, Prefix
from quickmerge.training.packing import packed_mask, packed_positions

__all__ = ["LAYOUTS", "Branches", "Tree", "branches", "choose", "closed_set", "one_shot"]


class Tree:
    """A prefix that has been read, and the tokens read behind it.

    Args:
        recognizer: what reads.
        prefix: of B images.
    """

    def __init__(self, recognizer: Network, prefix: Prefix) -> None:
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


# One-shot sampling: every label's first token from one distribution, then all labels completed side by side.


@dataclass(frozen=True)
class Branches:
    """What one-shot sampling has completed.

    Args:
        ids: ``(B, k, T)`` tokens, the separator from a branch's end on.
        log_p: ``(B, k)`` log-probability of all its tokens, with the separator where it is finished.
        finished: ``(B, k)`` bool: closed by the separator. The others ran into the limit, fell below the minimum, or
            had no token to begin with (log-probability -inf); they are no labels.
    """

    ids: Tensor
    log_p: Tensor
    finished: Tensor


def one_shot(
    recognizer: Network,
    prefix: Prefix,
    k: int,
    *,
    layout: str = "tree",
    max_tokens: int = 20,
    minimum: float = 0.0,
) -> list[list[Guess]]:
    """The k most probable first tokens, each completed greedily to a label (arXiv 2312.02142, section 3.4).

    A label's score is its probability with the closing separator. The same text from different tokens counts once,
    with the sum. Branches that are not closed within the limit are left out; `branches` shows them.

    Args:
        recognizer: what reads.
        prefix: of B images.
        k: how many branches, and at most how many labels.
        layout: ``"tree"`` feeds all branches as one sequence, ``"batch"`` as rows of a batch with copies of the cache,
            ``"uncached"`` reads everything anew in every step, as the public code does. The results are the same.
        max_tokens: of a label, without the separator.
        minimum: the least probability; branches that fall below it end at once.

    Raises:
        ValueError: naming the setting that is out of range.
    """
    found = branches(recognizer, prefix, k, layout=layout, max_tokens=max_tokens, minimum=minimum)
    out = []
    for ids, log_p, finished in zip(found.ids.tolist(), found.log_p.tolist(), found.finished.tolist(), strict=True):
        named = [(recognizer.labels.text(i), p) for i, p, f in zip(ids, log_p, finished, strict=True) if f]
        out.append(ranked(named, k, minimum))
    return out


@torch.no_grad()
def branches(
    recognizer: Network,
    prefix: Prefix,
    k: int,
    *,
    layout: str = "tree",
    max_tokens: int = 20,
    minimum: float = 0.0,
) -> Branches:
    """One-shot sampling before labels are made of its tokens; arguments as for `one_shot`."""
    k = whole_number("k", k)
    max_tokens = whole_number("max_tokens", max_tokens)
    check_share("minimum", minimum)
    if layout not in LAYOUTS:
        raise ValueError(
            f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}{near_match(str(layout), LAYOUTS)}"
        )
    steps = LAYOUTS[layout](recognizer, prefix)
    sep, floor = recognizer.labels.sep, math.log(minimum) if minimum else -math.inf
    start = steps.first.log_softmax(-1).masked_fill(~recognizer.starts, -torch.inf)
    log_p, token = start.topk(min(k, start.shape[1]))
    alive = log_p.isfinite() & (log_p >= floor)
    finished = torch.zeros_like(alive)
    ids = token[..., None]
    for _ in range(max_tokens):
        if not bool(alive.any()):
            break
        step_log_p, step_token = _best(steps.follow(ids, alive), recognizer.labels.special)
        log_p = log_p.masked_scatter(alive, log_p[alive] + step_log_p)
        token = torch.full_like(token, sep).masked_scatter(alive, step_token)
        ids = torch.cat([ids, token[..., None]], -1)
        finished = finished | (alive & (token == sep))
        alive = alive & (token != sep) & (log_p >= floor)
    return Branches(ids, log_p, finished)


def _best(logits: Tensor, special: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable token that can stand in a label, of ``(R, V)``, and its log-probability among all tokens."""
    total = logits.logsumexp(-1)
    best = logits.index_fill(-1, special.to(logits.device), -torch.inf).max(-1)
    return best.values - total, best.indices


class _Steps(ABC):
    """Reads a prefix, and then again and again the newest token of every branch that goes on."""

    first: Tensor
    """``(B, V)`` logits behind the prefix."""

    def __init__(self, recognizer: Network, prefix: Prefix) -> None:
        self.recognizer = recognizer
        self.prefix = prefix

    @abstractmethod
    def follow(self, ids: Tensor, alive: Tensor) -> Tensor:
        """Logits ``(R, V)`` of what follows the branches of ``ids (B, k, T)`` that are alive, in reading order."""


class _InTree(_Steps):
    """All branches in one row."""

    def __init__(self, recognizer: Network, prefix: Prefix) -> None:
        super().__init__(recognizer, prefix)
        self.tree = Tree(recognizer, prefix)
        self.first = self.tree.first
        self.columns: Tensor | None = None

    def follow(self, ids: Tensor, alive: Tensor) -> Tensor:
        columns = ids[..., :0] if self.columns is None else self.columns
        wide = int(alive.sum(-1).max())
        # living branches first, in their order
        order = alive.long().argsort(dim=-1, descending=True, stable=True)[:, :wide]
        real = alive.gather(1, order)
        path = columns.gather(1, order[..., None].expand(-1, -1, columns.shape[-1]))
        new = len(self.tree) + torch.arange(wide, device=ids.device).expand_as(order)
        own = torch.full_like(alive, -1, dtype=torch.long).scatter(1, order, torch.where(real, new, -1))
        self.columns = torch.cat([columns, own[..., None]], -1)
        depth = torch.full_like(order, ids.shape[-1] - 1)
        return self.tree.grow(ids[..., -1].gather(1, order), depth, path, real)


class _InBatch(_Steps):
    """Every living branch in a row of its own, with its own copy of the prefix's cache."""

    def __init__(self, recognizer: Network, prefix: Prefix) -> None:
        super().__init__(recognizer, prefix)
        self.tree = Tree(recognizer, prefix)
        self.first = self.tree.first
        self.cache = self.tree.cache
        self.rows: Tensor | None = None  # the branch that each row of the cache belongs to

    def follow(self, ids: Tensor, alive: Tensor) -> Tensor:
        flat = alive.flatten().nonzero()[:, 0]
        image = flat // alive.shape[1]
        keep = image if self.rows is None else (self.rows[:, None] == flat).long().argmax(0)
        self.cache.batch_select_indices(keep)
        self.rows = flat
        valid, length, depth = self.prefix.valid[image], self.prefix.length[image], ids.shape[-1]
        see = torch.cat([valid, valid.new_ones(len(flat), depth)], 1)[:, None, None]
        behind = length[:, None] + torch.arange(depth, device=ids.device)
        language = self.recognizer.language
        embeds = language.get_input_embeddings()(ids.flatten(0, 1)[flat, -1:]).to(self.prefix.embeds.dtype)
        position = torch.cat([self.tree.position[image], behind], 1)
        logits = read(language, embeds, see, position[:, -1:], cache=self.cache, key_position=position)
        return logits[:, 0]


class _Uncached(_Steps):
    """Prefix and branches read anew in every step, finished ones too."""

    def __init__(self, recognizer: Network, prefix: Prefix) -> None:
        super().__init__(recognizer, prefix)
        self.first = self._read(torch.zeros(len(prefix.embeds), 1, 0, dtype=torch.long, device=prefix.embeds.device))

    def follow(self, ids: Tensor, alive: Tensor) -> Tensor:
        return self._read(ids)[alive.flatten()]

    def _read(self, ids: Tensor) -> Tensor:
        prefix, k = self.prefix, ids.shape[1]
        behind = self.recognizer.language.get_input_embeddings()(ids.flatten(0, 1)).to(prefix.embeds.dtype)
        embeds, valid, image = (x.repeat_interleave(k, 0) for x in (prefix.embeds, prefix.valid, prefix.image))
        more = valid.new_ones(behind.shape[:2])
        valid, image = torch.cat([valid, more], 1), torch.cat([image, ~more], 1)
        group = torch.zeros_like(valid, dtype=torch.long)
        see = packed_mask(group, image, valid, bidirectional=self.recognizer.config.bidirectional)
        last = torch.zeros_like(valid)
        last[:, -1] = True
        whole = torch.cat([embeds, behind], 1)
        return read(self.recognizer.language, whole, see, packed_positions(group, valid), rows=last)


LAYOUTS: dict[str, type[_Steps]] = {"tree": _InTree, "batch": _InBatch, "uncached": _Uncached}


# Choosing among given labels: each label's exact probability, all of them packed behind one prefix.


@torch.no_grad()
def closed_set(recognizer: Network, prefix: Prefix, labels: Sequence[str], *, chunk: int = 256) -> Tensor:
    """``log P(label | image)`` of every label with its closing separator: ``(B, n)``.

    Args:
        recognizer: what reads.
        prefix: of B images.
        labels: n labels.
        chunk: how many tokens of labels are read at once. Fewer take less memory.

    Raises:
        ValueError: for a chunk that is no whole number of at least 1.
        QuickmergeError: there is no label, or one that can't be used.
    """
    chunk = whole_number("chunk", chunk)
    if isinstance(labels, str) or not labels:
        raise QuickmergeError(f"labels must hold at least one label, got {labels!r}")
    codec, tree = recognizer.labels, Tree(recognizer, prefix)
    tokens = [(*codec.ids(label), codec.sep) for label in labels]
    start = tree.first.log_softmax(-1)
    device = start.device
    out = start[:, torch.tensor([each[0] for each in tokens], device=device)]
    for part in _parts(tokens, chunk):
        group = torch.tensor([k for k, each in enumerate(part) for _ in tokens[each]], device=device)[None]
        ids = torch.tensor([i for each in part for i in tokens[each]], device=device)[None]
        # every row but those of separators predicts the next token of its label
        inside = torch.cat([group[:, 1:] == group[:, :-1], group[:, :1] != group[:, :1]], 1)
        logits = tree.fork().pack(ids, group + 1, inside.expand(len(start), -1))
        logits = logits.view(len(start), -1, logits.shape[-1])
        target, label = ids[:, 1:][inside[:, :-1]], group[inside]
        log_p = logits.gather(-1, target.expand(len(start), -1)[..., None])[..., 0] - logits.logsumexp(-1)
        out = out.index_add(1, torch.tensor(part, device=device)[label], log_p)
    return out


def choose(
    recognizer: Network, prefix: Prefix, labels: Sequence[str], top: int | None = None, minimum: float = 0.0
) -> list[list[Guess]]:
    """The most probable of given labels, with their exact probabilities; a label that is there twice counts once.

    Raises:
        ValueError, QuickmergeError: as `closed_set`.
    """
    check_share("minimum", minimum)
    names = list(dict.fromkeys(recognizer.labels.normal(label) for label in labels))
    rows = closed_set(recognizer, prefix, names).tolist()
    return [ranked(zip(names, row, strict=True), top, minimum) for row in rows]


def _parts(tokens: list[tuple[int, ...]], chunk: int) -> Iterator[list[int]]:
    """Labels by number, as many at once as ``chunk`` tokens hold, but one at least."""
    part: list[int] = []
    size = 0
    for index, each in enumerate(tokens):
        if part and size + len(each) > chunk:
            yield part
            part, size = [], 0
        part.append(index)
        size += len(each)
    yield part
