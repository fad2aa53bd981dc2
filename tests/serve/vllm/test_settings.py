"""What an engine is asked for and told of us, as far as that needs no engine."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.recipe import Recipe
from quickmerge.serve.vllm import ARCHITECTURES, LOOKUP, TESTED, check_version
from quickmerge.serve.vllm.settings import recipe_of, visual_of


def config(**recipe: Any) -> Any:
    return SimpleNamespace(quickmerge=Recipe(**recipe).as_dict())


def test_a_recipe_is_a_dict_or_a_folder(tmp_path: Any) -> None:
    recipe = Recipe(visual=qm.SCOPE(keep=0.25))
    recipe.save_pretrained(tmp_path / "recipe")
    assert recipe_of(SimpleNamespace(quickmerge=recipe.as_dict())) == recipe
    assert recipe_of(SimpleNamespace(quickmerge={"visual": {"type": "SCOPE", "keep": 0.25}})) == recipe
    assert recipe_of(SimpleNamespace(quickmerge=str(tmp_path / "recipe"))) == recipe
    for wrong in (None, 3, "", []):
        with pytest.raises(QuickmergeError, match="hf_overrides must hold 'quickmerge'"):
            recipe_of(SimpleNamespace(quickmerge=wrong))
    with pytest.raises(QuickmergeError, match="must be of a known type, got 'Scope'"):
        recipe_of(SimpleNamespace(quickmerge={"visual": {"type": "Scope"}}))


@pytest.mark.parametrize(
    ("recipe", "positions", "message"),
    [
        ({"visual": qm.TrimTokenator(keep=0.3)}, "kept", "visual must choose by the image alone in vLLM"),
        ({"visual": qm.ToMe(keep=0.3)}, "kept", "give tome with proportional=False"),
        ({"visual": qm.QuickMergeVision(keep=qm.Entropy())}, "kept", "keep must be a share or a Count in vLLM"),
        ({"visual": qm.Merge(qm.SCOPE(keep=0.3), layer=2)}, "kept", "layer must be 0"),
        ({"visual": qm.SCOPE(keep=0.3)}, "consecutive", "positions must be 'consecutive'"),
        ({"visual": qm.Merge(qm.SCOPE(keep=0.3), positions="consecutive")}, "kept", "positions must be 'kept'"),
        ({"visual": qm.SCOPE(keep=0.3), "attention": qm.Multipole()}, "kept", "attention must be left out"),
        ({"merge": qm.QuickMerge()}, "kept", "merge must be left out"),
        ({"decoding": qm.PromptLookup()}, "kept", "must hold visual"),
    ],
)
def test_what_an_engine_can_not_do_is_refused_by_name(recipe: Any, positions: str, message: str) -> None:
    with pytest.raises(QuickmergeError, match=message):
        visual_of(config(**recipe), positions)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_a_missing_vllm_names_the_extra() -> None:
    with pytest.raises(QuickmergeError, match=r"pip install quickmerge\[vllm\]"):
        check_version()


def test_another_version_names_the_tested_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from quickmerge.serve.vllm import plugin

    monkeypatch.setattr(plugin, "need", lambda *names: None)
    monkeypatch.setattr(plugin, "version", lambda name: "0.33.1")
    with pytest.raises(QuickmergeError, match=r"vllm must be of version 0.32.\*.*got 0.33.1"):
        check_version()
    monkeypatch.setattr(plugin, "version", lambda name: f"{TESTED[0]}.7")
    check_version()


@pytest.mark.vllm
def test_vllm_finds_us_and_knows_our_models() -> None:
    from importlib.metadata import entry_points

    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    found = {each.name: each.value for each in entry_points(group="vllm.general_plugins")}
    assert found.get("quickmerge") == "quickmerge.serve.vllm:register"
    load_general_plugins()
    assert set(ARCHITECTURES) <= set(ModelRegistry.get_supported_archs())


def test_what_vllm_is_told_of_is_there() -> None:
    for where in [*ARCHITECTURES.values(), LOOKUP.replace(".LookupProposer", ":LookupProposer")]:
        assert importlib.util.find_spec(where.partition(":")[0]) is not None


def test_importing_the_door_imports_no_vllm() -> None:
    assert "quickmerge.serve.vllm" in sys.modules
    if importlib.util.find_spec("vllm") is None:
        assert "vllm" not in sys.modules
