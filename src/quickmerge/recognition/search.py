"""Best-first search: the most probable labels, exactly.

A label becomes less probable with every token. So the labels are leaves of a tree in which no child is more probable
than its parent, and a label that is closed beats whatever is still open and less probable. One-shot sampling follows a
single path from each first token: labels that begin alike compete there, and here they do not.
"""

from __future__ import annotations

import heapq
import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeWarning, whole_number
from quickmerge.recognition.branches import Tree
from quickmerge.recognition.guess import Guess, check_share, ranked
from quickmerge.recognition.network import Network, Prefix

__all__ = ["best_first", "best_sequences"]

AHEAD = 32
"""How many of a node's children are put in order at first; few are ever asked for."""


@dataclass
class _Node:
    """A token that has been read: its path in the tree, and its children in falling order."""

    ids: tuple[int, ...]
    columns: tuple[int, ...]
    log_p: float
    row: Tensor  # (V,) log-probabilities of its children
    values: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def child(self, rank: int) -> tuple[float, int] | None:
        """Log-probability and token of the child of this rank, None where there is no more."""
        if rank >= len(self.values) < len(self.row):
            top = self.row.topk(min(len(self.row), AHEAD if rank < AHEAD else len(self.row)))
            self.values, self.tokens = top.values.tolist(), top.indices.tolist()
        if rank >= len(self.values) or self.values[rank] == -math.inf:
            return None
        return self.log_p + self.values[rank], self.tokens[rank]


@dataclass
class _Search:
    """The search for one image: children that wait, the best in front, and labels that are closed.

    A node whose children wait has only the best of them in the queue; the next one follows when that is taken out.
    """

    root: _Node
    k: int
    sep: int
    floor: float
    text: list[str] = field(default_factory=list)
    done: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    queue: list[tuple[float, int, int, _Node, int]] = field(default_factory=list)
    added: int = 0

    def push(self, node: _Node, rank: int) -> None:
        found = node.child(rank)
        if found is not None and found[0] >= self.floor:
            self.added += 1
            heapq.heappush(self.queue, (-found[0], self.added, rank, node, found[1]))

    def pop(self) -> tuple[float, _Node, int] | None:
        """Close labels until the best that waits is an open one, and take that out; None if nothing can be better."""
        while self.queue and not self.settled():
            minus, _, rank, node, token = heapq.heappop(self.queue)
            self.push(node, rank + 1)
            if token != self.sep:
                return -minus, node, token
            self.done.append((-minus, node.ids))
        return None

    def settled(self) -> bool:
        """Whether the k best labels are known as far as the queue goes."""
        return len(self.done) >= self.k and heapq.nlargest(self.k, self.done)[-1][0] >= -self.queue[0][0]


def best_first(
    recognizer: Network,
    prefix: Prefix,
    k: int,
    *,
    width: int = 8,
    max_tokens: int = 20,
    minimum: float = 0.0,
    most: int = 1000,
) -> list[list[Guess]]:
    """The k most probable labels of each image, exactly.

    Labels are found as sequences of tokens. Where two of the k best are the same text, it counts once with the sum,
    and there are fewer than k. A recognizer that is sure of nothing, such as an untrained one, would have nearly every
    sequence read: after ``most`` nodes the search is given up, with a warning, and what it has found is returned.

    Args:
        recognizer: what reads.
        prefix: of B images.
        k: how many labels.
        width: how many open nodes of an image are read at once. More take fewer steps and read more for nothing.
        max_tokens: of a label, without the separator.
        minimum: the least probability; a higher one makes the search shorter.
        most: how many nodes of an image are read at most.

    Raises:
        ValueError: naming the setting that is out of range.
    """
    rows = best_sequences(recognizer, prefix, k, width=width, max_tokens=max_tokens, minimum=minimum, most=most)
    return [ranked([(recognizer.labels.text(ids), p) for p, ids in row], k, minimum) for row in rows]


@torch.no_grad()
def best_sequences(
    recognizer: Network,
    prefix: Prefix,
    k: int,
    *,
    width: int = 8,
    max_tokens: int = 20,
    minimum: float = 0.0,
    most: int = 1000,
) -> list[list[tuple[float, tuple[int, ...]]]]:
    """The k most probable token sequences of labels, with their log-probabilities; arguments as for `best_first`."""
    k, width = whole_number("k", k), whole_number("width", width)
    max_tokens, most = whole_number("max_tokens", max_tokens), whole_number("most", most)
    check_share("minimum", minimum)
    floor = math.log(minimum) if minimum else -math.inf
    tree, sep = Tree(recognizer, prefix), recognizer.labels.sep
    start = tree.first.log_softmax(-1).masked_fill(~recognizer.starts, -torch.inf).cpu()
    searches = [_Search(_Node((), (), 0.0, row), k, sep, floor) for row in start]
    for search in searches:
        search.push(search.root, 0)
    taken = 0
    while taken < most:
        opened = [_take(search, min(width, most - taken)) for search in searches]
        if not any(opened):
            break
        taken += max(len(each) for each in opened)
        _expand(recognizer, tree, searches, opened, max_tokens)
    if any(search.queue and not search.settled() for search in searches):
        warnings.warn(
            f"best_first gave up after {most} nodes: its labels are the best of those found, and there may be better "
            "ones; raise minimum or most",
            QuickmergeWarning,
            stacklevel=3,
        )
    return [heapq.nlargest(k, search.done) for search in searches]


def _take(search: _Search, width: int) -> list[tuple[float, _Node, int]]:
    out: list[tuple[float, _Node, int]] = []
    while len(out) < width and (found := search.pop()) is not None:
        out.append(found)
    return out


def _expand(
    recognizer: Network,
    tree: Tree,
    searches: list[_Search],
    opened: list[list[tuple[float, _Node, int]]],
    max_tokens: int,
) -> None:
    """Read the open nodes of every image at once, and queue the best child of each."""
    wide, device = max(len(each) for each in opened), recognizer.device
    long = max((len(node.columns) for each in opened for _, node, _ in each), default=0)
    ids = torch.zeros(len(opened), wide, dtype=torch.long)
    depth, real = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    path = torch.full((*ids.shape, long), -1)
    for at, each in enumerate(opened):
        for i, (_, node, token) in enumerate(each):
            ids[at, i], depth[at, i], real[at, i] = token, len(node.ids), True
            path[at, i, : len(node.columns)] = torch.tensor(node.columns, dtype=torch.long)
    base = len(tree)
    logits = tree.grow(*(x.to(device) for x in (ids, depth, path, real)))
    rows = logits.log_softmax(-1).index_fill(-1, recognizer.labels.special.to(device), -torch.inf).cpu()
    number = 0
    for search, each in zip(searches, opened, strict=True):
        for i, (log_p, node, token) in enumerate(each):
            row, number = rows[number], number + 1
            if len(node.ids) + 1 == max_tokens:  # nothing but the end is allowed
                row = torch.full_like(row, -torch.inf).index_copy(
                    0, torch.tensor([search.sep]), row[search.sep : search.sep + 1]
                )
            search.push(_Node((*node.ids, token), (*node.columns, base + i), log_p, row), 0)
