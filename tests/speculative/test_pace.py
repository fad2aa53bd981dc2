"""When to draft at all."""

from __future__ import annotations

from quickmerge.speculative.cost import FIRST, LONGEST, Cost, Pace

FLAT = Cost((1, 8), (1.0, 1.0))
STEEP = Cost((1, 8), (1.0, 4.5))  # a node takes half a second


def run(pace: Pace, steps: int, **seen) -> list[bool]:
    """Whether each step drafts, if what it sees is always the same."""
    out = []
    for _ in range(steps):
        out.append(pace.drafts())
        if out[-1]:
            pace.saw(**seen)
    return out


def test_what_pays_is_always_drafted() -> None:
    assert all(run(Pace(FLAT), 100, rows=1, nodes=8, foreseen=0.5, accepted=0, draft_seconds=0.11)[:3])
    assert all(run(Pace(FLAT), 100, rows=1, nodes=8, foreseen=0.5, accepted=1, draft_seconds=0.4))


def test_what_does_not_pay_is_tried_less_and_less() -> None:
    steps = run(Pace(STEEP), 400, rows=1, nodes=4, foreseen=0.8, accepted=1, draft_seconds=0.2)
    gaps = [len(gap) for gap in "".join("d" if step else " " for step in steps).split("d") if gap]
    assert steps[:2] == [True, True] and not any(steps[2 : 2 + FIRST])
    assert gaps[:5] == [8, 16, 32, 64, LONGEST]


def test_a_drafter_that_promises_too_much_is_found_out() -> None:
    honest = run(Pace(FLAT), 60, rows=1, nodes=8, foreseen=0.9, accepted=1, draft_seconds=0.5)
    liar = run(Pace(FLAT), 60, rows=1, nodes=8, foreseen=0.9, accepted=0, draft_seconds=0.5)
    assert all(honest) and not all(liar)


def test_it_is_drafted_again_when_it_pays() -> None:
    pace = Pace(STEEP)
    run(pace, 2 + FIRST, rows=1, nodes=4, foreseen=0.1, accepted=0, draft_seconds=0.2)
    steps = run(pace, 400, rows=1, nodes=2, foreseen=1.0, accepted=1, draft_seconds=0.15)
    assert all(steps[-100:])


def test_a_cheap_draft_is_never_left_out() -> None:
    assert all(run(Pace(STEEP), 50, rows=1, nodes=4, foreseen=0.1, accepted=0, draft_seconds=0.05))


def test_rows_share_a_pass() -> None:
    """Four rows of two nodes are eight tokens: here they take 4.5 s for at most 8, and plainly 2.5 s for 4."""
    seen = {"rows": 4, "nodes": 2, "foreseen": 2.8, "accepted": 3, "draft_seconds": 0.3}
    assert not all(run(Pace(STEEP), 20, **seen))
    assert all(run(Pace(FLAT), 20, **seen))
