"""Deciding for each kind of token: never more expensive than the best rule alone, and the planted answer is found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quickmerge.transplant.choose_by_text import ENOUGH, FALLBACK, candidate_rules, deal, decide, spread
from quickmerge.transplant.matching import KINDS, Subword
from quickmerge.transplant.quality import Texts
from quickmerge.transplant.rules import Mean, Omp, Zero

NAMES = ("vectors", FALLBACK, "mean")


class Costs:
    """What a text costs if every kind adds bits of its own: ``table[passage, kind, candidate]``."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.asked = 0

    def __call__(self, choice: dict[str, str]) -> list[Texts]:
        self.asked += 1
        picked = [[KINDS.index(kind), NAMES.index(name)] for kind, name in choice.items()]
        bits = sum(self.table[:, kind, name] for kind, name in picked)
        return [Texts(100, 30, float(one), 10, 40, 5.0) for one in bits]


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), passages=st.integers(1, 9), seen=st.sets(st.sampled_from(KINDS)))
def test_never_dearer_than_the_best_rule_for_all(seed: int, passages: int, seen: set[str]) -> None:
    costs = Costs(np.random.default_rng(seed).uniform(1, 100, (passages, len(KINDS), len(NAMES))))
    counts = {kind: ENOUGH if kind in seen else ENOUGH - 1 for kind in KINDS}
    told: list[tuple[int, int]] = []
    found = decide(
        NAMES, KINDS, costs, fallback=dict.fromkeys(KINDS, FALLBACK), new_tokens=counts,
        progress=lambda *at: told.append(at),
    )  # fmt: skip
    alone = costs.table.sum((0, 1))
    first = NAMES[int(alone.argmin())]
    best = costs.table.sum(0).argmin(1)
    assert all(found.chosen[kind] == NAMES[best[KINDS.index(kind)]] for kind in seen)  # kinds add up: each has its best
    unseen = {kind: found.chosen[kind] for kind in KINDS if kind not in seen}
    assert unseen in (dict.fromkeys(unseen, first), dict.fromkeys(unseen, FALLBACK))
    assert (
        found.bits == pytest.approx(sum(one.bits for one in costs(dict(found.chosen))))
        and found.bytes == 100 * passages
    )
    if len(seen) == len(KINDS):
        assert found.bits <= alone.min() + 1e-9
    assert told[-1][0] == told[-1][1] and len(found.tried) == costs.asked - 1
    assert [one["candidate"] for one in found.tried[: len(NAMES)]] == list(NAMES)


def test_what_the_text_lacks_gets_its_fallback_unless_that_is_dearer_beyond_noise() -> None:
    fallback = dict.fromkeys(KINDS, FALLBACK) | {"digits": "vectors"}
    for more, taken in ((0.1, True), (5.0, False)):
        table = np.ones((8, len(KINDS), len(NAMES))) * 10
        table[:, :, 1:] += more  # both others
        table[:, :, 1] += 0.3 * np.array([1, -1] * 4)[:, None]
        found = decide(NAMES, KINDS, Costs(table), fallback=fallback, new_tokens={})
        assert (dict(found.chosen) == fallback) is taken
        assert taken or set(found.chosen.values()) == {"vectors"}
        assert found.as_dict()["tried"][-1]["kept"] is taken


def test_the_best_rule_that_looks_at_vectors_competes() -> None:
    ranking = [Subword("first"), Mean(), Omp(4), Omp(8), Zero()]
    assert candidate_rules(ranking)["vectors"] == Omp(4) and "vectors" not in candidate_rules([Mean(), Subword()])
    names = [rule.name for rule in candidate_rules(ranking).values()]
    assert names == [
        "omp k=4 unit", "subword mean 0.75", "subword mean 0.9", "subword mean 0.5", "subword mean",
        "subword decay 0.75", "mean",
    ]  # fmt: skip


@given(st.lists(st.text(max_size=300), max_size=5), st.integers(1, 90))
def test_dealing_loses_nothing(texts: list[str], size: int) -> None:
    one, other = deal(texts, size)
    assert abs(len(one) - len(other)) <= 1
    merged = [part for pair in zip(one, [*other, ""], strict=False) for part in pair]
    assert "".join(merged) == "".join(texts)
    assert all(0 < len(part) <= size + size // 2 for part in (*one, *other))
    assert bool(other) or sum(map(len, texts)) < 2


@given(st.lists(st.text(alphabet="ab \n\u4e2d", max_size=400), max_size=6), st.integers(8, 60))
def test_passages_are_spread_and_few(texts: list[str], size: int) -> None:
    found = spread(texts, most=4 * size, size=size)
    assert len(found) <= 4 and all(part.strip() for part in found)
    assert all(any(part in text for text in texts) for part in found)
    assert bool(found) or not any(text.strip() for text in texts)
