"""What a recipe may hold, when two are the same, and how it is written down for people."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from decoding_samples import tiny
from gumiho_samples import heads
from recipe_samples import RECIPES

import quickmerge as qm
from quickmerge.errors import QuickmergeError


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_equal_where_all_their_settings_are(name: str) -> None:
    one, other = RECIPES[name](), RECIPES[name]()
    assert one == other and hash(one) == hash(other) and repr(one) == repr(other)
    assert [each for each in RECIPES if RECIPES[each]() == one] == [name]


@pytest.mark.parametrize("name", RECIPES)
def test_the_repr_makes_it_again(name: str) -> None:
    made = RECIPES[name]()
    names = "Merge Recipe QuickMerge BlockCausal SCOPE Count ToMe Removal Multipole PromptLookup Speculation SnapKV"
    assert eval(repr(made), {each: getattr(qm, each) for each in names.split()}) == made


def test_a_recipe_does_not_change() -> None:
    recipe = qm.Recipe(merge=qm.QuickMerge())
    with pytest.raises(FrozenInstanceError):
        recipe.merge = None  # type: ignore[misc]
    assert recipe != "a recipe"


def test_what_is_given_alone_has_the_defaults_of_its_host() -> None:
    recipe = qm.Recipe(merge=qm.QuickMerge(0.5), decoding=qm.PromptLookup(ngram=2))
    assert recipe == qm.Recipe(qm.Merge(qm.QuickMerge(0.5)), decoding=qm.Speculation(qm.PromptLookup(ngram=2)))


def test_labels_name_every_ingredient() -> None:
    assert qm.Recipe().label == "nothing"
    recipe = RECIPES["all"]()
    assert recipe.label == (
        "quickmerge keep 0.4 + visual scope keep 0.4 + tower tome keep 0.4 + multipole:budget=64 + PromptLookup()"
    )
    assert RECIPES["speculation"]().label == "PromptLookup(ngram=2), nodes 8, tree 4"


def test_weights_count_for_being_equal() -> None:
    model = tiny()
    one, same, other = (qm.Recipe(decoding=heads(model, seed=seed)) for seed in (0, 0, 1))
    assert one == same and hash(one) == hash(same) and repr(one) == "Recipe(decoding=Gumiho())"
    assert one != other
    with torch.no_grad():
        next(same.speculation.drafter.network.parameters()).add_(1)  # type: ignore[union-attr]
    assert one != same


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"merge": 0.4}, r"merge must be a reducer such as QuickMerge\(keep=0.4\), or Merge\(reducer, ...\), got 0.4"),
    ({"merge": qm.SCOPE()}, "merge must be a reducer for the prompt of a language model.*got scope"),
    ({"visual": qm.Truncate()}, "visual must be a reducer for the visual tokens.*got truncate"),
    ({"tower": qm.Merge(qm.ToMe(), mode=qm.Prefix())}, "mode is for the text and must be left out of tower"),
    ({"attention": "multipole"}, r"attention must be a Multipole such as Multipole\(budget=512\), or None, got 'mu"),
    ({"decoding": "lookup"}, r"decoding must be a Drafter such as PromptLookup\(\)"),
    ({"decoding": qm.SpeculativeDecoding(qm.PromptLookup())}, "got a SpeculativeDecoding: give its drafter"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_may_not_stand_there_is_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(qm.QuickmergeError, match=message):
        qm.Recipe(**given)


SPECULATIONS: list[tuple[dict[str, Any], str]] = [
    ({"drafter": "lookup"}, "drafter must be a quickmerge Drafter"),
    ({"nodes": 0}, "nodes must be a whole number of at least 1"),
    ({"tree": 0}, "tree must be a whole number of at least 1"),
    ({"tree": "Auto"}, r"tree must be 'auto' or a whole number of at least 1, got 'Auto' \(did you mean 'auto'\?\)"),
]


@pytest.mark.parametrize(("given", "message"), SPECULATIONS)
def test_a_wrong_setting_of_speculation_is_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qm.Speculation(**{"drafter": qm.PromptLookup(), **given})


def test_a_reducer_may_say_what_the_cache_keeps() -> None:
    model = tiny()
    with qm.apply(model, qm.Recipe(merge=qm.Merge(qm.QuickMerge(0.5, cache=0.3), [1]))) as run:
        assert list(run.parts) == ["merge+cache"]
    with pytest.raises(QuickmergeError, match=r"cache must be said once, of merge or beside it, got 0\.3 and"):
        qm.Recipe(merge=qm.QuickMerge(0.5, cache=0.3), cache=0.4)
