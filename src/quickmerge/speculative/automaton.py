"""Every run of tokens of some texts, how often it is there and what follows it: a suffix automaton that grows online.

A suffix tree of the reversed text, in other words: states are the tree's nodes, ``link`` leads to a node's parent. Runs
that end at the same places of all texts share a state, so n tokens have at most 2 n of them, and a token takes a few
steps to add, at most ``depth``.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["SuffixAutomaton"]

ROOT = 0
"""The state of the empty run."""


class SuffixAutomaton:
    """Counts of all runs of up to ``depth`` tokens in texts that are written to it token by token, several at once.

    Args:
        depth: longer runs are there too, but are not counted.

    Attributes:
        follows: for each state the tokens that come behind it somewhere, and the states that they lead to.
        link: for each state that of its longest run without the first tokens that is at more places; -1 for `ROOT`.
        length: tokens of each state's longest run.
        count: at how many places each state's runs are, exact for those of which one has at most ``depth`` tokens.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.follows: list[dict[int, int]] = [{}]
        self.link: list[int] = [-1]
        self.length: list[int] = [0]
        self.count: list[int] = [0]

    def __len__(self) -> int:
        """Tokens of all texts."""
        return self.count[ROOT]

    def begin(self) -> Writer:
        """A new text, empty at first."""
        return Writer(self)

    def find(self, text: Sequence[int]) -> list[tuple[int, int]]:
        """The states of all ends of ``text`` that are somewhere, the longest first: ``(state, tokens)``.

        Of runs that are at the same places one stands for all, the longest. The empty run is left out. What is longer
        than ``depth`` is not looked for.
        """
        state, size = ROOT, 0
        for token in text[-self.depth :]:
            while state != ROOT and token not in self.follows[state]:
                state = self.link[state]
                size = self.length[state]
            if token in self.follows[state]:
                state, size = self.follows[state][token], size + 1
        found = []
        while state != ROOT:
            found.append((state, size))
            state = self.link[state]
            size = self.length[state]
        return found

    def _add(self, last: int, token: int) -> int:
        """The state of a text that ended in state ``last``, with one token more."""
        follows, link, length = self.follows, self.link, self.length
        there = follows[last].get(token)
        if there is not None:  # another text has had it
            return there if length[there] == length[last] + 1 else self._split(last, token, there)
        new = self._new(length[last] + 1, {}, 0)
        at = last
        while at != -1 and token not in follows[at]:
            follows[at][token] = new
            at = link[at]
        if at == -1:
            link[new] = ROOT
        else:
            there = follows[at][token]
            link[new] = there if length[there] == length[at] + 1 else self._split(at, token, there)
        return new

    def _split(self, at: int, token: int, there: int) -> int:
        """Give the shorter runs of ``there``, which are at one place more from now on, a state of their own."""
        follows, link = self.follows, self.link
        shorter = self._new(self.length[at] + 1, dict(follows[there]), self.count[there])
        link[shorter] = link[there]
        link[there] = shorter
        while at != -1 and follows[at].get(token) == there:
            follows[at][token] = shorter
            at = link[at]
        return shorter

    def _new(self, length: int, follows: dict[int, int], count: int) -> int:
        self.follows.append(follows)
        self.link.append(-1)
        self.length.append(length)
        self.count.append(count)
        return len(self.link) - 1


class Writer:
    """One text of an automaton, and where it ends."""

    def __init__(self, automaton: SuffixAutomaton) -> None:
        self._home = automaton
        self._last = ROOT  # the state of the whole text
        self._near = ROOT  # that of its last `depth` tokens
        self._size = 0  # how many of those there are

    def write(self, tokens: Sequence[int]) -> None:
        """Add tokens at the end."""
        home = self._home
        follows, link, length, count = home.follows, home.link, home.length, home.count
        for token in tokens:
            # another text may have split the state since
            near, size = self._shortened(self._near, self._size), self._size
            self._last = home._add(self._last, token)
            self._size = min(size + 1, home.depth)
            # Adding may have split it once more; its run is in the shorter half.
            near = self._shortened(near, size)
            self._near = self._shortened(follows[near][token], self._size)
            at = self._near
            while at != -1:
                count[at] += 1
                at = link[at]
        assert length[self._near] >= self._size

    def _shortened(self, state: int, size: int) -> int:
        """The state, at or above this one, to which its end of ``size`` tokens belongs."""
        link, length = self._home.link, self._home.length
        while state != ROOT and length[link[state]] >= size:
            state = link[state]
        return state
