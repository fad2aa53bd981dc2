"""Models of every kind are asked at the same places, and their rows say what was measured."""

from __future__ import annotations

import pytest
import torch
from calm_bench_samples import WORDS, texts, tiny_calm, tiny_discrete, words

from quickmerge.calm.brier import brier_score
from quickmerge.calm.evaluate import brier_text, compare, is_calm, text_terms
from quickmerge.errors import QuickmergeError


def test_places_begin_chunks_of_every_size() -> None:
    text = brier_text(words(), texts(3, 100), [1, 2, 3, 4], length=48, context=10, limit=1000)
    assert text.step == 12 and (text.places[:, 1] % 12 == 0).all() and text.places[:, 1].min() == 12
    assert text.windows.shape == (6, 48), "two windows a document; what is left of it is too short"
    assert text.places[:, 1].max() == 36 and len(text.places) == 6 * 3
    assert text.unit == "windows" and (text.groups == text.places[:, 0]).all()
    many = brier_text(words(), texts(12, 60), [4], length=32, context=4, limit=1000)
    assert many.unit == "documents" and len(many.groups.unique()) == 12
    ids = torch.tensor(words()(texts(1, 100)[0])["input_ids"])
    assert torch.equal(text.windows[1], ids[48:96])


def test_a_limit_draws_places_by_its_seed() -> None:
    given = {"length": 48, "context": 4, "limit": 9}
    first, again, other = (brier_text(words(), texts(), [4], **given, seed=s).places for s in (1, 1, 2))
    assert len(first) == 9 and torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(place) for place in first.tolist()}) == 9


def test_a_short_window_is_filled_behind_what_is_asked() -> None:
    text = brier_text(words(), texts(1, 30), [4], length=64, context=4, limit=100)
    assert text.windows.shape == (1, 64) and text.places[:, 1].max() == 24
    model = tiny_discrete()
    other = text.windows.clone()
    other[:, 30:] = WORDS - 1
    changed = type(text)(other, text.places, text.groups, text.unit, text.step)
    assert torch.allclose(text_terms(model, text), text_terms(model, changed), atol=1e-6)


@pytest.mark.parametrize("model", [tiny_calm(4), tiny_calm(2), tiny_calm(1), tiny_calm(3), tiny_discrete()])
def test_terms_of_a_model_are_those_of_its_seed(model) -> None:
    text = brier_text(words(), texts(2, 60), [1, 2, 3, 4], length=48, context=12, limit=5)
    done: list[int] = []
    first = text_terms(model, text, samples=4, paths=2, seed=1, advance=done.append)
    assert first.shape == (5, 4) and sum(done) == 5 and torch.isfinite(first).all()
    assert torch.equal(first, text_terms(model, text, samples=4, paths=2, seed=1))
    assert not torch.equal(first, text_terms(model, text, samples=4, paths=2, seed=2))


def test_a_window_s_terms_do_not_hang_on_other_windows() -> None:
    text = brier_text(words(), texts(2, 60), [4], length=48, context=12, limit=100)
    last = text.places[:, 0] == text.places[-1, 0]
    alone = type(text)(text.windows, text.places[last], text.groups[last], text.unit, text.step)
    model = tiny_calm(4)
    assert torch.equal(text_terms(model, text, samples=3)[last], text_terms(model, alone, samples=3))


def test_branches_with_a_cache_read_what_texts_read_whole() -> None:
    """A CALM's states behind a place and a chunk of its own, from a cache of the whole text, are the text's own."""
    from quickmerge.calm.rollout import branch_cache, branch_mask

    model = tiny_calm(2)
    window = torch.randint(1, WORDS, (1, 12), generator=torch.Generator().manual_seed(3))
    own = torch.randint(1, WORDS, (3, 4), generator=torch.Generator().manual_seed(4))
    places = torch.tensor([1, 3, 5])
    with torch.no_grad():
        _, cache = model.hidden(window, use_cache=True)
        cache = branch_cache(cache, 3)
        for depth in (1, 2):
            mask = branch_mask(places, 6, depth).repeat_interleave(2, 1)
            chunk = own[:, 2 * depth - 2 : 2 * depth]
            states, cache = model.hidden(chunk, attention_mask=mask, cache=cache, use_cache=True)
            for row, place in enumerate(places.tolist()):
                whole = torch.cat([window[:, : 2 * place], own[row : row + 1, : 2 * depth]], 1)
                torch.testing.assert_close(states[row, -1], model.hidden(whole)[0][0, -1], atol=1e-5, rtol=1e-4)


def test_rows_set_models_beside_one_of_them() -> None:
    text = brier_text(words(), texts(2, 60), [4], length=48, context=12, limit=100)
    random = torch.Generator().manual_seed(0)
    terms = {name: 0.2 + 0.1 * torch.rand(len(text.places), 4, generator=random) for name in ("a", "b")}
    rows = compare(terms, text, resamples=200)
    score = brier_score(terms["a"], text.groups, resamples=200)
    assert rows[0]["brier_lm"] == score.value and rows[0]["brier_lm_low"] == score.low and "gap" not in rows[0]
    assert rows[1]["against"] == "a" and rows[1]["gap_low"] <= rows[1]["gap"] <= rows[1]["gap_high"]
    assert rows[1]["gap"] == pytest.approx(rows[1]["brier_lm"] - rows[0]["brier_lm"])
    assert compare(terms, text, against="b", resamples=10)[0]["against"] == "b" and rows[0]["unit"] == "windows"


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(QuickmergeError, match="texts must hold a document of at least 36 tokens"):
        brier_text(words(), texts(2, 20), [4])
    with pytest.raises(ValueError, match="patch must be a whole number"):
        brier_text(words(), texts(), [0])
    text = brier_text(words(), texts(2, 60), [4], length=48, context=12, limit=3)
    with pytest.raises(QuickmergeError, match="model must be in eval mode"):
        text_terms(tiny_discrete().train(), text)
    with pytest.raises(QuickmergeError, match="places must be multiples of 3"):
        text_terms(tiny_calm(3), text)
    assert is_calm(tiny_calm()) and not is_calm(tiny_discrete())
