"""The proposer on the rows of a batch, as vLLM calls it: no engine is needed for that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.recipe import Recipe
from quickmerge.serve.vllm import lookup


def proposer(monkeypatch: pytest.MonkeyPatch, length: int = 4, longest: int = 32, **recipe: Any) -> Any:
    monkeypatch.setattr(lookup, "check_version", lambda: None)
    config = SimpleNamespace(**({"quickmerge": Recipe(**recipe).as_dict()} if recipe else {}))
    return lookup.LookupProposer(SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=length),
        model_config=SimpleNamespace(max_model_len=longest, hf_config=config),
    ))  # fmt: skip


def propose(made: Any, texts: list[list[int]], written: list[list[int]] | None = None) -> list[list[int]]:
    ids = np.zeros((len(texts), 32), dtype=np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    given = [[text[-1]] for text in texts] if written is None else written
    found: list[list[int]] = made.propose(given, np.array([len(t) for t in texts]), ids, slot_mappings=None)
    return found


def test_drafts_are_what_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = proposer(monkeypatch)
    texts = [[5, 6, 7, 8, 9, 10, 6, 7], [1, 2, 3], [4, 4, 4]]
    assert propose(made, texts) == [[8, 9, 10, 6], [], [4]]
    # the text goes on, and another stands in its row
    assert propose(made, [[*texts[0], 8, 9], [6, 7, 1, 6]]) == [[10, 6, 7, 8], [7, 1, 6]]


def test_a_prompt_that_is_being_read_and_a_full_text_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made = proposer(monkeypatch, longest=9)
    text = [5, 6, 7, 8, 5, 6, 7]
    assert propose(made, [text, text], [[], [7]]) == [[], [8, 5]]
    assert propose(proposer(monkeypatch, longest=7), [text]) == [[]]


def test_the_recipe_says_how_long_a_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proposer(monkeypatch).ngram == 3
    assert proposer(monkeypatch, decoding=qm.PromptLookup(ngram=7)).ngram == 7
    assert proposer(monkeypatch, visual=qm.SCOPE(keep=0.5)).ngram == 3
    from quickmerge.data import shipped_gumiho

    folder = shipped_gumiho("smollm2-135m")
    assert folder is not None
    with pytest.raises(QuickmergeError, match="decoding must be PromptLookup"):
        proposer(monkeypatch, decoding=qm.Gumiho.from_pretrained(folder))
