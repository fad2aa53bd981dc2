"""Which leaves of a tree go on with which borrowed nodes, as published."""

from __future__ import annotations

from quickmerge.speculative import Tree
from quickmerge.speculative.gumiho.draft import full_tree


def test_short_leaves_go_on_with_the_most_shared_node() -> None:
    #      0
    #    1   2   3
    #   4 5  6
    #   7    8 9
    tree = Tree(list(range(10)), [0, 0, 0, 0, 1, 1, 2, 4, 6, 6], [1.0] * 10)
    # of depth 2 node 6 is on two paths, of depth 3 every node is on one
    assert full_tree(tree).extra == ((3, 6), (5, 7))
    assert (full_tree(tree).tokens, full_tree(tree).parent) == (tree.tokens, tree.parent)


def test_where_all_paths_are_equally_long_nothing_is_borrowed() -> None:
    assert full_tree(Tree.chain([1, 2, 3])).extra == ()
    assert full_tree(Tree([1, 2, 3], [0, 0, 0], [1.0, 0.5, 0.5])).extra == ()
    assert full_tree(Tree([1], [0], [1.0])).extra == ()
