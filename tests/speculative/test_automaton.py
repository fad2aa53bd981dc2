"""The suffix automaton, against a search of every text at every place."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds

from quickmerge.speculative.automaton import SuffixAutomaton


def places(texts: list[list[int]], run: list[int]) -> int:
    return sum(text[i : i + len(run)] == run for text in texts for i in range(len(text) - len(run) + 1))


def walk(automaton: SuffixAutomaton, run: list[int]) -> int | None:
    state = 0
    for token in run:
        if token not in automaton.follows[state]:
            return None
        state = automaton.follows[state][token]
    return state


@given(words=st.integers(1, 4), depth=st.integers(1, 6), many=st.integers(1, 3), seed=seeds)
@prop(150)
def test_every_run_is_counted_while_texts_are_written_in_turns(words: int, depth: int, many: int, seed: int) -> None:
    rng = Random(seed)
    automaton = SuffixAutomaton(depth)
    texts: list[list[int]] = [[] for _ in range(many)]
    writers = [automaton.begin() for _ in texts]
    for _ in range(rng.randrange(1, 12)):
        turn = rng.randrange(many)
        more = [rng.randrange(words) for _ in range(rng.randrange(6))]
        texts[turn] += more
        writers[turn].write(more)
    assert len(automaton) == sum(map(len, texts))
    assert len(automaton.link) <= 2 * len(automaton) + 1
    for text in texts:
        for start in range(len(text)):
            for size in range(1, depth + 1):
                run = text[start : start + size]
                state = walk(automaton, run)
                assert state is not None
                assert automaton.count[state] == places(texts, run)
                nexts = {other[i + len(run)] for other in texts for i in range(len(other) - len(run))
                         if other[i : i + len(run)] == run}  # fmt: skip
                assert automaton.follows[state].keys() == nexts


@given(words=st.integers(1, 4), depth=st.integers(1, 8), seed=seeds)
@prop(100)
def test_ends_are_found_longest_first(words: int, depth: int, seed: int) -> None:
    rng = Random(seed)
    text = [rng.randrange(words) for _ in range(rng.randrange(30))]
    asked = [rng.randrange(words + 1) for _ in range(rng.randrange(1, 12))]
    automaton = SuffixAutomaton(depth)
    automaton.begin().write(text)
    found = automaton.find(asked)
    sizes = [size for _, size in found]
    assert sizes == sorted(set(sizes), reverse=True)
    known = [size for size in range(1, min(depth, len(asked)) + 1) if places([text], asked[-size:])]
    assert max(sizes, default=0) == max(known, default=0)
    for state, size in found:
        assert automaton.count[state] == places([text], asked[-size:])
    # of runs at the same places the longest stands for all
    assert {places([text], asked[-size:]) for size in known} == {automaton.count[state] for state, _ in found}


def test_a_long_repetition_is_written_fast_enough_to_be_of_use() -> None:
    automaton = SuffixAutomaton(16)
    automaton.begin().write([7] * 20_000)
    assert automaton.count[walk(automaton, [7] * 16) or 0] == 20_000 - 15
