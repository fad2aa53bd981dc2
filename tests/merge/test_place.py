"""A reducer at one place of a model, and which settings may stand there."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

import quickmerge as qm
from quickmerge.merge.place import as_merge

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"reducer": "quickmerge"}, "reducer must be a quickmerge reducer"),
    ({"layer": "4"}, "layer must be a block of at least 0"),
    ({"layer": -1}, "layer must be a block of at least 0"),
    ({"layer": [2, -1]}, "layer must be a block of at least 0"),
    ({"layer": []}, "layer must be a block of at least 0"),
    ({"layer": True}, "layer must be a block of at least 0"),
    ({"mode": "prefix"}, r"mode must be Prefix\(...\), BlockCausal\(...\) or None, got 'prefix'"),
    ({"positions": "keep"}, r"positions must be one of kept, consecutive, got 'keep' \(did you mean 'kept'\?\)"),
    ({"unmerge": 1}, "unmerge must be True or False, got 1"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_a_wrong_setting_is_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(qm.QuickmergeError, match=message):
        qm.Merge(**{"reducer": qm.QuickMerge(), **settings})


def test_blocks_are_compared_by_value() -> None:
    one = qm.Merge(qm.QuickMerge(), list(np.array([2, 3])))
    assert one == qm.Merge(qm.QuickMerge(), (2, 3)) != qm.Merge(qm.QuickMerge(), 2)
    assert {one: 1}[qm.Merge(qm.QuickMerge(), [2, 3])] == 1
    with pytest.raises(FrozenInstanceError):
        one.layer = 2  # type: ignore[misc]


def test_the_label_says_what_is_not_the_default() -> None:
    assert qm.Merge(qm.QuickMerge(0.4)).label == "quickmerge keep 0.4"
    told = qm.Merge(qm.QuickMerge(qm.Count(64), pool=3), (2, 3), qm.Prefix(min_tokens=0))
    assert told.label.startswith("quickmerge:pool=3 keep Count(tokens=64), layer 2,3, mode Prefix(")


AT: list[tuple[qm.Merge, str, str | None]] = [
    (qm.Merge(qm.QuickMerge(), mode=qm.Prefix()), "text", None),
    (qm.Merge(qm.QuickMerge(), qm.Schedule((2, 3))), "text", None),
    (qm.Merge(qm.QuickMerge(), 2, qm.BlockCausal()), "text", None),
    (qm.Merge(qm.SCOPE(), positions="consecutive"), "visual", None),
    (qm.Merge(qm.ToMe(), qm.Removal(3), unmerge=True), "tower", None),
    (qm.Merge(qm.SCOPE()), "text", "a reducer for the prompt of a language model, such as QuickMerge.*got scope"),
    (qm.Merge(qm.Truncate()), "visual", "got truncate"),
    (qm.Merge(qm.Truncate()), "tower", "got truncate"),
    (qm.Merge(qm.ToMe(), mode=qm.Prefix()), "visual", "mode is for the text"),
    (qm.Merge(qm.ToMe(), mode=qm.Prefix()), "tower", "mode is for the text"),
    (qm.Merge(qm.ToMe(), positions="consecutive"), "text", "positions is for visual tokens"),
    (qm.Merge(qm.ToMe(), positions="consecutive"), "tower", "positions is for visual tokens"),
    (qm.Merge(qm.ToMe(), unmerge=True), "text", "unmerge is for vision transformers"),
    (qm.Merge(qm.ToMe(), unmerge=True), "visual", "unmerge is for vision transformers"),
    (qm.Merge(qm.ToMe(), qm.Removal(3)), "text", "a list of blocks or a Schedule in place, got a Removal"),
    (qm.Merge(qm.ToMe(), qm.Removal(3)), "visual", "layer must be a block or a list of them in place, got a Removal"),
    (qm.Merge(qm.ToMe(), qm.Schedule((2,))), "tower", "a list of blocks or a Removal in place, got a Schedule"),
    (qm.Merge(qm.ToMe(), qm.Schedule((2,))), "visual", "got a Schedule"),
    (qm.Merge(qm.QuickMerge(), (2, 3), qm.BlockCausal()), "text", "one block in place in block_causal mode"),
]


@pytest.mark.parametrize(("merge", "place", "message"), AT)
def test_a_setting_may_stand_where_its_host_reads_it(merge: qm.Merge, place: Any, message: str | None) -> None:
    if message is None:
        merge.check(place)
        return
    with pytest.raises(qm.QuickmergeError, match=message):
        merge.check(place, "place")


def test_a_reducer_alone_has_the_defaults_of_its_host() -> None:
    assert as_merge(qm.QuickMerge(0.5), "merge") == qm.Merge(qm.QuickMerge(0.5))
    assert as_merge(qm.Merge(qm.QuickMerge(), 2), "merge").layer == 2
    with pytest.raises(qm.QuickmergeError, match=r"visual must be a reducer such as .*got 0.4"):
        as_merge(0.4, "visual")  # type: ignore[arg-type]
