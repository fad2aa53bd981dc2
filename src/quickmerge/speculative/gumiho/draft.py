"""Full Tree Attention as published: leaves of short paths see, and go on with, tokens of longer ones. It is lossy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quickmerge.models.moved import onto
from quickmerge.speculative.gumiho.network import Ends, GumihoNetwork, RowCache
from quickmerge.speculative.tree import Ranked, Tree

__all__ = ["Level", "Start", "full_tree", "levels", "ranked"]


def full_tree(tree: Tree) -> Tree:
    """Let each leaf that is not among the deepest go on with the node of the next depth that most paths share.

    The paper's reason (arXiv 2503.10135) is that parallel heads draft each depth on its own, so that the
    tokens of one path may follow another. But a node's keys, values and features in the target are those of its own
    ancestors, and a leaf that sees the borrowed node sees a token behind it: what the target then says is not what it
    would say of the text. So accepted tokens may differ from the target's own.
    """
    size, deepest = len(tree), max(tree.depth)
    leaves = [1] * size
    for node in range(1, size):
        leaves[tree.parent[node]] = 0
    is_leaf = [bool(one) for one in leaves]
    for node in range(size - 1, 0, -1):
        leaves[tree.parent[node]] += leaves[node]
    shared: dict[int, int] = {}  # depth -> the node of it that most paths share, the first of several
    for node in range(size):
        depth = tree.depth[node]
        if depth not in shared or leaves[node] > leaves[shared[depth]]:
            shared[depth] = node
    pairs = [
        (node, shared[tree.depth[node] + 1]) for node in range(size) if is_leaf[node] and tree.depth[node] < deepest
    ]
    return replace(tree, extra=tuple(pairs))


# From the heads' distributions to a draft tree.


Path = tuple[int, ...]
Children = tuple[Sequence[int], Sequence[float]]
NOTHING: Children = ((), ())


@dataclass(frozen=True)
class Start:
    """Where the text of B rows ends.

    Attributes:
        guess: ``(B, H)`` the serial head's guess of the feature that predicts the next token; unused without one.
        before: ``(B, H)`` the last but one fused pair.
        pair: ``(B, H)`` the last fused pair.
    """

    guess: Tensor
    before: Tensor
    pair: Tensor


@dataclass(frozen=True)
class Level:
    """What the heads say behind some nodes of equal depth.

    Attributes:
        chosen: ``(B, K)`` which nodes: parent times n plus rank, where parent counts the nodes of the level above and
            n is the number of its children there. The root is 0.
        tokens: ``(B, K, D, n)`` the n likeliest tokens at each of the next D depths behind a node, in falling order.
        prob: ``(B, K, D, n)`` their probabilities. D is 1 behind the serial head, and M behind the parallel heads,
            which say the same behind every node below.
    """

    chosen: Tensor
    tokens: Tensor
    prob: Tensor


def levels(
    network: GumihoNetwork, ends: Ends, cache: RowCache, start: Start, beam: int, most: int, depth: int
) -> list[Level]:
    """Ask the heads about the root, then about the ``beam`` likeliest nodes of each depth that the serial head drafts.

    A node of the serial head sees the text and its own ancestors, no sibling. A parallel head reads the pairs of a
    node and of its parent.

    Args:
        network: the heads.
        ends: of their target.
        cache: of the rows' texts. Its scratch columns are written to.
        start: where the texts end.
        beam: nodes of a depth that are asked about.
        most: children of a node that are wanted.
        depth: how deep the tree may become.
    """
    serial = network.config.serial
    batch, device = len(start.pair), start.pair.device
    chosen = torch.zeros(batch, 1, dtype=torch.long, device=device)
    pair, before, state = start.pair[:, None], start.before[:, None], start.guess[:, None]
    path = torch.ones(batch, 1, device=device)
    text = onto(torch.tensor(cache.length), device)[:, None]
    free, columns = max(cache.length, default=0), chosen[..., :0]  # columns of each node's ancestors and of itself
    out: list[Level] = []
    for level in range(min(serial + (network.config.heads > 0), depth)):
        if level:
            chosen, above, path, tokens = _best(out[-1], path, beam)
            guess, before = _of(state, above), _of(pair, above)
            pair = network.fuse(ends.embed(tokens), guess)
        if level == serial:
            guesses = network.guess(before.flatten(0, 1), pair.flatten(0, 1))[: depth - serial]
            ahead = guesses.transpose(0, 1).reshape(*pair.shape[:2], depth - serial, -1)
        elif level:
            own = torch.arange(free, free + pair.shape[1], device=device).expand(batch, -1)
            columns = torch.cat([_of(columns, above), own[..., None]], -1)
            free += pair.shape[1]
            see = (torch.arange(free, device=device) < text)[:, None].repeat(1, pair.shape[1], 1)
            see.scatter_(-1, columns, True)
            cache.aim(own, free, free - pair.shape[1])
            state = network.serial(pair, (text + level - 1).expand_as(own), see[:, None], cache)
        out.append(_level(ends, chosen, ahead if level == serial else state[:, :, None], most))
    return out


def _best(level: Level, path: Tensor, beam: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The likeliest children of a serial level: which, their parents, their path probabilities, their tokens."""
    prob = path[..., None] * level.prob[:, :, 0]
    value, chosen = prob.flatten(1).topk(min(beam, prob[0].numel()))
    tokens = level.tokens[:, :, 0].flatten(1).gather(1, chosen)
    return chosen, chosen // level.prob.shape[-1], value, tokens


def _level(ends: Ends, chosen: Tensor, guesses: Tensor, most: int) -> Level:
    """``guesses (B, K, D, H)`` of features as the ``most`` likeliest tokens."""
    prob = ends.logits(guesses).softmax(-1)
    top = prob.topk(min(most, prob.shape[-1]))
    return Level(chosen, ends.tokens(top.indices), top.values)


def _of(x: Tensor, index: Tensor) -> Tensor:
    """Entries ``index (B, K)`` of ``x (B, N, F)``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


@dataclass
class _Row:
    """One row's distributions by the ranks on the way to a node."""

    serial: int
    borrow: bool
    behind: dict[Path, list[Children]] = field(default_factory=dict)
    likeliest: list[Path] = field(default_factory=list)  # of the nodes of each depth that were asked about

    def __call__(self, path: Path) -> Children:
        level = min(len(path), self.serial)
        while path[:level] not in self.behind:  # the root is always there
            level -= 1
        known, below = self.behind[path[:level]], len(path) - level
        if below < len(known):
            return known[below]
        # The node, or one above it, was not asked about, or the heads reach no further.
        if not self.borrow or level >= len(self.likeliest) - 1 or below == 0:
            return NOTHING
        return self((*self.likeliest[level + 1], *path[level + 1 :]))


def ranked(found: Sequence[Level], serial: int, *, borrow: bool = False) -> list[Ranked]:
    """For each row the children of nodes, as `quickmerge.speculative.best_first` asks for them.

    Args:
        found: see `levels`.
        serial: tokens that the serial head drafts.
        borrow: let a node that the heads were not asked about have the children of the likeliest node of its depth
            that they were. This is the idea of Full Tree Attention, paths of parallel heads going on from one
            another's tokens, with nodes of their own for the borrowed tokens, so that it stays exact.
    """
    # All at once: whole numbers of this size are exact in float64, and so are probabilities.
    parts = [x for level in found for x in (level.chosen, level.tokens, level.prob)]
    flat = torch.split(torch.cat([x.reshape(-1).double() for x in parts]).cpu(), [x.numel() for x in parts])
    each = iter(part.view(x.shape).to(x.dtype).tolist() for part, x in zip(flat, parts, strict=True))
    told = [(next(each), next(each), next(each)) for _ in found]
    rows: list[Ranked] = []
    for row in range(len(found[0].chosen)):
        made, paths = _Row(serial, borrow), [()]
        for depth, (chosen, tokens, prob) in enumerate(told):
            if depth:
                wide = len(told[depth - 1][1][row][0][0])
                paths = [(*paths[node // wide], node % wide) for node in chosen[row]]
            made.likeliest.append(paths[0])
            for path, ids, chances in zip(paths, tokens[row], prob[row], strict=True):
                made.behind[path] = list(zip(ids, chances, strict=True))
        rows.append(made)
    return rows
