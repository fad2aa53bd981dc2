"""What is counted."""

from __future__ import annotations

import pytest

from quickmerge.speculative import Stats


def test_tokens_a_pass_count_the_targets_own_and_not_the_prompts() -> None:
    # Two rows of 1 + 6 and 1 + 2 tokens; the first in 2 passes, the second in 2.
    stats = Stats(passes=2, tokens=10, rows=2)
    for offered, path, nodes in [(3, 3, 4), (2, 1, 5), (0, 0, 1), (1, 0, 2)]:
        stats.count(offered, path, nodes)
    assert stats.row_passes == 4
    assert stats.tokens_per_pass == 2
    assert stats.nodes == 12
    assert stats.offered == [3, 2, 1]
    assert stats.accepted == [2, 1, 1]
    assert stats.acceptance == [0.5, 0.25, 0.25]
    # Every token behind the prompt's is the target's own, or one that a walk came by.
    assert stats.tokens - stats.rows == stats.row_passes + sum(stats.accepted)


def test_sums() -> None:
    one = Stats(passes=1, row_passes=1, tokens=3, rows=1, nodes=4, offered=[1], accepted=[1], seconds=2.0)
    two = Stats(passes=2, row_passes=2, tokens=5, rows=1, nodes=9, offered=[2, 1, 1], lossless=False, seconds=1.0)
    both = one + two
    assert (both.passes, both.row_passes, both.tokens, both.rows, both.nodes) == (3, 3, 8, 2, 13)
    assert (both.offered, both.accepted) == ([3, 1, 1], [1])
    assert both.seconds == 3
    assert not both.lossless
    assert (one.offered, two.offered) == ([1], [2, 1, 1])


def test_nothing_done_is_nothing_to_divide_by() -> None:
    assert Stats().tokens_per_pass == 1
    assert Stats().acceptance == []


def test_the_summary_says_what_it_counts() -> None:
    stats = Stats(
        passes=4, row_passes=4, tokens=9, rows=1, nodes=16, accepted=[3, 1], seconds=2.0, draft_seconds=0.25,
        target_seconds=1.0, prompt_seconds=0.5,
    )  # fmt: skip
    text = stats.summary()
    for part in (
        "9 tokens in 4 passes",
        "2.00 tokens per forward pass and row (its own one included), 4.0 nodes read", "0.75, 0.25",
        "prompt 0.50, target 1.00, drafter 0.25, between them 0.25", "lossless",
    ):  # fmt: skip
        assert part in text
    assert stats.tokens_per_pass == pytest.approx(2)
