"""Two drafters as one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding_samples import greedy, prompts, tiny

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.speculative import BestOf, Drafter, Tree
from quickmerge.speculative.cli import drafter_name, load_drafter
from quickmerge.speculative.gumiho import Gumiho


class Says(Drafter):
    """Drafts the same chain with the same probability, and notes what it is told."""

    def __init__(self, chain: list[int], chance: float) -> None:
        self.chain, self.chance = chain, chance
        self.asked, self.told = 0, 0

    def begin(self, model: Any, ids: Any, valid: Any, features: Any, positions: Any) -> None:
        self.asked = self.told = 0

    def draft(self, last: torch.Tensor, nodes: int) -> list[Tree]:
        self.asked += 1
        prob = [self.chance**i for i in range(len(self.chain) + 1)]
        return [Tree.chain([token, *self.chain], prob) for token in last.tolist()]

    def accept(self, tokens: Any, features: Any) -> None:
        self.told += 1

    def rows(self, index: Any) -> None:
        pass


def begun(first: Drafter, other: Drafter) -> BestOf:
    both = BestOf(first, other)
    ids = torch.tensor([[1, 2]])
    both.begin(tiny(), ids, ids > 0, None, ids)
    return both


def test_the_draft_with_the_larger_expectation_is_read() -> None:
    sure, unsure = Says([5, 6], 0.9), Says([7], 0.2)
    for both in (begun(sure, unsure), begun(unsure, sure)):
        (tree,) = both.draft(torch.tensor([3]), 8)
        assert tree.tokens == [3, 5, 6]


def test_the_other_is_not_asked_where_the_first_gives_enough_and_again_after_a_while() -> None:
    first, other = Says([5, 6, 7], 0.9), Says([8], 0.5)
    both = begun(first, other)
    both.draft(torch.tensor([3]), 8)
    both.accept([torch.tensor([3])], None)
    for _ in range(60):
        (tree,) = both.draft(torch.tensor([3]), 8)
        assert tree.tokens[0] == 3
        both.accept([torch.tensor([3, 5, 6, 7])], None)
    assert first.asked == 61 and first.told == other.told == 61
    assert 2 <= other.asked <= 5


def test_who_is_wrong_again_and_again_is_believed_no_longer() -> None:
    boasts, works = Says([5, 6, 7], 0.9), Says([8], 0.6)
    both = begun(boasts, works)
    served = []
    for _ in range(40):
        (tree,) = both.draft(torch.tensor([3]), 8)
        served.append(tree.tokens[1])
        both.accept([torch.tensor([3, 8]) if tree.tokens[1] == 8 else torch.tensor([3])], None)
    assert served[0] == 5 and served[-10:] == [8] * 10


@pytest.mark.parametrize("rows", [[9], [6, 11]])
def test_the_text_is_the_model_s_own_with_heads(rows: list[int]) -> None:
    model = tiny()
    torch.manual_seed(0)
    both = BestOf(qm.SuffixDecoding(), Gumiho.new(model, serial_layers=1, heads=2, mlp_depth=2))
    assert both.needs_features
    inputs = prompts(rows)
    wanted = greedy(model, inputs, 30)
    for tree in (6, "auto"):
        decoding = qm.SpeculativeDecoding(both, tree=tree)
        assert torch.equal(greedy(model, inputs, 30, custom_generate=decoding), wanted)
    recipe = qm.Recipe(decoding=both)
    with qm.apply(model, recipe):
        assert torch.equal(greedy(model, inputs, 30), wanted)


def test_a_recipe_holds_both_and_is_read_back(tmp_path: Path) -> None:
    model = tiny()
    torch.manual_seed(0)
    both = BestOf(qm.SuffixDecoding(depth=9), Gumiho.new(model, serial_layers=1, heads=2, mlp_depth=2))
    recipe = qm.Recipe(decoding=both)
    recipe.save_pretrained(tmp_path)
    assert (tmp_path / "decoding-other-network" / "model.safetensors").exists()
    assert qm.Recipe.from_pretrained(tmp_path) == recipe
    assert recipe.label == "BestOf(first=SuffixDecoding(depth=9), other=Gumiho())"


def test_copies_draft_with_copies() -> None:
    both = BestOf(qm.SuffixDecoding(), qm.PromptLookup())
    other = copy.copy(both)
    assert other.first is not both.first and other.other is not both.other


def test_what_is_no_drafter_is_told() -> None:
    lookup = qm.PromptLookup()
    with pytest.raises(QuickmergeError, match=r"other must be a quickmerge Drafter such as PromptLookup\(\), got 5"):
        BestOf(lookup, 5)  # type: ignore[arg-type]
    with pytest.raises(QuickmergeError, match="other must be another drafter than first"):
        BestOf(lookup, lookup)


def test_the_command_line_joins_two_by_a_plus_sign() -> None:
    both = load_drafter("suffix:depth=32:factor=1.5+smollm2-135m:beam=4")
    assert isinstance(both, BestOf) and isinstance(both.first, qm.SuffixDecoding) and isinstance(both.other, Gumiho)
    assert (both.first.depth, both.first.factor, both.other.beam) == (32, 1.5, 4)
    assert drafter_name("lookup:ngram=2+smollm2-135m") == "lookup:ngram=2+smollm2-135m"
    with pytest.raises(QuickmergeError, match="--drafter suffix takes the settings depth, factor, memory, got 'deep'"):
        load_drafter("suffix:deep=3")
    with pytest.raises(QuickmergeError, match="--drafter must be lookup, suffix, smollm2-135m"):
        load_drafter("suffix+nowhere")


@pytest.mark.parametrize("drafter", ["suffix", "suffix+heads"])
def test_inside_merging_and_multipole_the_text_is_what_it_is_without_drafts(drafter: str) -> None:
    model = tiny()
    torch.manual_seed(0)
    drafts: Drafter = qm.SuffixDecoding()
    if drafter != "suffix":
        drafts = BestOf(drafts, Gumiho.new(model, serial_layers=1, heads=2, mlp_depth=2))
    inputs = prompts([24, 17])
    for more in ({"merge": qm.QuickMerge(keep=0.5)}, {"attention": qm.Multipole(budget=8)}):
        with qm.apply(model, qm.Recipe(**more)):
            wanted = greedy(model, inputs, 20)
        with qm.apply(model, qm.Recipe(**more, decoding=drafts)):
            assert torch.equal(greedy(model, inputs, 20), wanted)
