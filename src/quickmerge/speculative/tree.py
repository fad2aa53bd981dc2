"""Draft trees: several guesses of how a text goes on, flattened so that one pass of the target reads them all."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quickmerge.errors import whole_number
from quickmerge.models.moved import onto

__all__ = ["Packed", "Ranked", "Tree", "best_first", "expected_accepted", "masks_by_window", "pack", "tree_mask"]


Children = tuple[Sequence[int], Sequence[float]]

Ranked = Callable[[tuple[int, ...]], Children]
"""The children of a node, most probable first: tokens, and their probabilities given the node.

A node is named by the ranks on the way to it: ``()`` is the root, ``(2, 0)`` the best child of the root's third best.
"""


@dataclass(frozen=True)
class Tree:
    """The draft of one row, T nodes of which node 0, the root, is the last token of the text.

    Lists of Python numbers rather than tensors, since the walk looks at one node after the other.

    Attributes:
        tokens: T token ids.
        parent: T indices of parents, each smaller than its child's; 0 for the root.
        prob: T path probabilities: how probable the drafter holds it that the walk comes by. 1 for the root, and no
            node is more probable than its parent.
        extra: pairs ``(a, b)`` with which node a also sees node b, and the walk may go on from a to b. That is no text
            that the target would have read, so what comes out is no longer what the target alone would write. Empty
            in every lossless draft.
        depth: T steps from the root (derived).

    Raises:
        ValueError: if lengths differ, a parent does not stand before its child, a node is more probable than its
            parent, or a pair names a node that is not there.
    """

    tokens: list[int]
    parent: list[int]
    prob: list[float]
    extra: tuple[tuple[int, int], ...] = ()
    depth: list[int] = field(init=False)

    def __post_init__(self) -> None:
        nodes, parent, prob = len(self.tokens), self.parent, self.prob
        if not nodes == len(parent) == len(prob) or nodes == 0:
            raise ValueError(
                f"tokens, parent and prob must be equally many, at least 1, got {nodes}, {len(parent)} and {len(prob)}"
            )
        if parent[0] != 0:
            raise ValueError(f"parent[0] must be 0, the root itself, got {parent[0]}")
        depth = [0] * nodes
        for node in range(1, nodes):
            above = parent[node]
            if not 0 <= above < node:
                raise ValueError(f"parent[{node}] must be a node before it, got {above}")
            if not prob[node] <= prob[above]:
                raise ValueError(f"prob[{node}] must be at most {prob[above]}, its parent's, got {prob[node]}")
            depth[node] = depth[above] + 1
        for pair in self.extra:
            if not all(0 <= node < nodes for node in pair):
                raise ValueError(f"extra must name nodes below {nodes}, got {pair}")
        object.__setattr__(self, "depth", depth)

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int], prob: Sequence[float] | None = None) -> Tree:
        """One guess: ``tokens`` from the root on, each the only child of the one before."""
        nodes = len(tokens)
        return cls(list(tokens), [max(0, i - 1) for i in range(nodes)], list(prob) if prob else [1.0] * nodes)

    def children(self) -> list[dict[int, int]]:
        """For each node, where the walk goes on with which token; of two equal siblings to the earlier one."""
        out: list[dict[int, int]] = [{} for _ in self.tokens]
        for node in range(1, len(self.tokens)):
            out[self.parent[node]].setdefault(self.tokens[node], node)
        for a, b in self.extra:
            out[a].setdefault(self.tokens[b], b)
        return out

    def came_true(self, follows: Sequence[int]) -> Iterator[bool]:
        """Of each token behind the root whether it was drafted there; up to the first that was not, or had no draft."""
        children, node = self.children(), 0
        for token in follows:
            if not children[node]:
                return
            yield token in children[node]
            if token not in children[node]:
                return
            node = children[node][token]

    def best(self, nodes: int) -> Tree:
        """The ``nodes`` most probable nodes, ties to the earlier one, in the order in which they stand; connected."""
        if nodes >= len(self):
            return self
        order = sorted(range(len(self)), key=lambda node: (-self.prob[node], node))
        return self._only(sorted(order[: max(1, nodes)]))

    def cut(self, depth: int) -> Tree:
        """The nodes at most ``depth`` steps from the root."""
        if max(self.depth) <= depth:
            return self
        return self._only([node for node in range(len(self)) if self.depth[node] <= depth])

    def _only(self, keep: list[int]) -> Tree:
        new = {node: i for i, node in enumerate(keep)}
        return Tree(
            [self.tokens[node] for node in keep],
            [new[self.parent[node]] for node in keep],
            [self.prob[node] for node in keep],
            tuple((new[a], new[b]) for a, b in self.extra if a in new and b in new),
        )


def best_first(root: int, ranked: Ranked, nodes: int) -> Tree:
    """The connected tree of at most ``nodes`` nodes with the largest sum of path probabilities, exactly.

    That sum, without the root's 1, is how many drafted tokens are accepted on average if the probabilities are true.
    A child is never more probable than its parent, so taking the best node in sight again and again is optimal; in
    sight are the next sibling and the first child of what was taken, so with N nodes there are at most N + 1 of them.
    Nodes come out in falling order: the first M of them are the best tree of M nodes.

    It is the same for heads that draft one after the other, whose probabilities depend on the whole path, and for
    parallel heads, whose i-th gives all nodes of depth i the same (arXiv 2503.10135 prunes level by level instead).

    Args:
        root: the last token of the text.
        ranked: the children of a node, in falling order; empty where the drafter has nothing to say.
        nodes: how many there may be, the root included.

    Raises:
        ValueError: if ``nodes`` is not a whole number of at least 1, or children are not in falling order.
    """
    nodes = whole_number("nodes", nodes)
    tokens, parent, prob = [root], [0], [1.0]
    queue: list[tuple[float, int, int, tuple[int, ...], Children, int]] = []
    count = itertools.count()

    def push(above: int, path: tuple[int, ...], children: Children, rank: int) -> None:
        ids, chances = children
        if rank >= len(ids) or not chances[rank] > 0:
            return
        if rank and chances[rank] > chances[rank - 1]:
            raise ValueError(f"ranked must give children in falling order, got {chances[rank - 1]}, {chances[rank]}")
        # The count lets ties go to what was pushed first, and keeps the heap from comparing what follows it.
        heapq.heappush(queue, (-prob[above] * min(1.0, chances[rank]), next(count), above, path, children, rank))

    if nodes > 1:
        push(0, (), ranked(()), 0)
    while queue:
        minus, _, above, path, children, rank = heapq.heappop(queue)
        tokens.append(int(children[0][rank]))
        parent.append(above)
        prob.append(-minus)
        if len(tokens) == nodes:
            break
        push(above, path, children, rank + 1)
        here = (*path, rank)
        push(len(tokens) - 1, here, ranked(here), 0)
    return Tree(tokens, parent, prob)


@dataclass(frozen=True)
class Packed:
    """The trees of a batch, padded to the widest of T nodes.

    ``tokens``, ``parent`` and ``depth (B, T)`` long, ``valid (B, T)`` bool; ``see (B, T, T)`` bool, which nodes each
    node sees: itself and those on the way from the root to it. Padding nodes see themselves. ``rows`` are the tokens
    of each tree, on the host.
    """

    tokens: Tensor
    parent: Tensor
    depth: Tensor
    valid: Tensor
    see: Tensor
    rows: tuple[list[int], ...] = ()


def pack(trees: Sequence[Tree], device: torch.device | str = "cpu", width: int = 0) -> Packed:
    """Lay the trees of a batch side by side, padded to the widest, or to ``width`` nodes if that is more.

    Padding nodes hold token 0 in the root's place, and no node sees them.
    """
    rows, wide = len(trees), max(width, *(len(tree) for tree in trees))
    grid = np.zeros((3, rows, wide), dtype=np.int64)
    valid = np.zeros((rows, wide), dtype=bool)
    see = np.zeros((rows, wide, wide), dtype=bool)
    see[:, range(wide), range(wide)] = True
    for row, tree in enumerate(trees):
        size = len(tree)
        grid[:, row, :size] = tree.tokens, tree.parent, tree.depth
        valid[row, :size] = True
        mine = see[row]
        for node in range(1, size):
            mine[node, :node] = mine[tree.parent[node], :node]
        for a, b in tree.extra:
            mine[a, b] = True
    device = torch.device(device)
    tokens, parent, depth = onto(torch.from_numpy(grid), device)
    return Packed(
        tokens, parent, depth, onto(torch.from_numpy(valid), device), onto(torch.from_numpy(see), device),
        tuple(tree.tokens for tree in trees),
    )  # fmt: skip


# What the nodes of a tree see: the text before them, and their own ancestors.


def tree_mask(
    valid: Tensor, place: Tensor, length: Tensor, packed: Packed, dtype: torch.dtype, window: int | None = None
) -> Tensor:
    """An additive mask ``(B, 1, T, n + T)`` over n cache columns and the T nodes that are read behind them.

    Node i sees a column that holds a token of its row's text, and itself and its ancestors among the nodes. With a
    sliding window it sees only what is less than ``window`` tokens before it, where a node's place in the text is the
    root's plus its depth. Hidden places get the most negative number rather than minus infinity, with which a row
    that sees nothing would not be a number.

    Args:
        valid: ``(B, n)`` bool, which columns hold a token of the text.
        place: ``(B, n)`` long, which token of the text that is; anything where it is none.
        length: ``(B,)`` long, the place of the root.
        packed: the trees.
        dtype: of the queries.
        window: in tokens; None for full attention.
    """
    before = valid[:, None].expand(-1, packed.tokens.shape[1], -1)
    see = torch.cat([before, packed.see], -1)
    if window is not None:
        own = length[:, None] + packed.depth
        near = own[:, :, None] - torch.cat([place, own], 1)[:, None] < window
        see = see & near
    return torch.zeros((), dtype=dtype, device=see.device).where(see, torch.finfo(dtype).min)[:, None]


def masks_by_window(
    windows: dict[str, int | None],
    valid: Tensor,
    place: Tensor,
    length: Tensor,
    packed: Packed,
    dtype: torch.dtype,
    longest: int,
) -> Tensor | dict[str, Tensor]:
    """One mask where all blocks see equally far, else one for each type of block, as transformers takes them.

    Args:
        windows: the sliding window of every type of block, None for full attention.
        valid, place, length, packed, dtype: see `tree_mask`.
        longest: tokens of the longest row and its tree; a window of at least so many hides nothing.
    """
    made: dict[int | None, Tensor] = {}
    for window in windows.values():
        some = None if window is None or window >= longest else window
        if some not in made:
            made[some] = tree_mask(valid, place, length, packed, dtype, some)
    if len(made) == 1:
        return next(iter(made.values()))
    return {kind: made[None if w is None or w >= longest else w] for kind, w in windows.items()}


# How many drafted tokens are accepted, by how probable each is to be.


def expected_accepted(p: Sequence[float]) -> float:
    """``E[L] = sum_i prod_{j <= i} p_j``: how many of a chain of drafted tokens are accepted on average.

    The target's own token comes on top. If ``p`` does not rise, moving acceptance from later to earlier tokens does
    not lower E[L] (arXiv 2503.10135, theorem 3.1): with the sum of ``p`` kept, it is better spent early. If ``p``
    rises somewhere that may be wrong: (.9, .1, .9) gives 1.071, (.95, .05, .9) only 1.04.

    Args:
        p: for each drafted token the probability that it is accepted, given that those before it are.

    Raises:
        ValueError: if one is no probability.
    """
    total, path = 0.0, 1.0
    for i, chance in enumerate(p):
        if not 0 <= chance <= 1:
            raise ValueError(f"p[{i}] must be a probability, 0 to 1, got {chance!r}")
        path *= chance
        total += path
    return total
