"""Full Tree Attention as published: leaves of short paths see, and go on with, tokens of longer ones. It is lossy."""

from __future__ import annotations

from dataclasses import replace

from quickmerge.decoding.tree import Tree

__all__ = ["full_tree"]


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
