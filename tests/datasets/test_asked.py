"""Windows that ask: as long as the others, a question where the prompt ends, its answer where the target begins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import byte_level

from quickmerge.datasets import AskedWindows, TextWindows
from quickmerge.datasets.asked import ASKED
from quickmerge.errors import QuickmergeError

TEXT = "The river is wide here, and nobody came by until the evening went on as it had begun.\n" * 400
CONTEXT, TARGET = 1800, 60


def windows() -> TextWindows:
    return TextWindows(byte_level(), [TEXT], CONTEXT + TARGET)


@pytest.mark.parametrize("task", ASKED)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_the_answer_follows_the_question_and_is_known_from_the_context(task: str, seed: int) -> None:
    own, tokenizer = windows(), byte_level()
    asked = AskedWindows(own, tokenizer, context=CONTEXT, share=1.0, tasks=[task], seed=seed)
    window = asked[1]
    assert window.shape == own[1].shape and window.dtype == torch.long
    context, target = (tokenizer.decode(part) for part in (window[:CONTEXT], window[CONTEXT:]))
    # Behind the answer the text goes on, so what comes before that is the answer (and how a model begins it).
    answer = target[: target.index("The river")] if "The river" in target else target
    assert answer.strip().split()[-1] in context


def test_windows_depend_on_index_and_seed_alone_and_a_share_of_them_asks() -> None:
    own = windows()
    asked = AskedWindows(own, byte_level(), context=CONTEXT, share=0.5)
    again = AskedWindows(windows(), byte_level(), context=CONTEXT, share=0.5)
    kept = [torch.equal(asked[i], own[i]) for i in range(len(own))]
    assert any(kept) and not all(kept)
    assert all(torch.equal(asked[i], again[i]) for i in reversed(range(len(own))))
    assert torch.equal(asked[-1], asked[len(own) - 1])
    assert asked.fingerprint() == again.fingerprint()
    assert asked.fingerprint() != AskedWindows(own, byte_level(), context=CONTEXT, share=0.5, seed=1).fingerprint()
    none = AskedWindows(own, byte_level(), context=CONTEXT, share=0.0)
    assert all(torch.equal(none[i], own[i]) for i in range(len(own)))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"share": 1.5}, "share must be a number in .* got 1.5"),
        ({"tasks": ["needles"]}, "tasks must be of .*got 'needles'.*needle"),
        ({"context": CONTEXT + TARGET}, "context must be in 1..1859, got 1860"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict, word: str) -> None:
    with pytest.raises(QuickmergeError, match=word):
        AskedWindows(windows(), byte_level(), **{"context": CONTEXT, **settings})
