"""Speculation by chains: models that can't take a token back write what they would write alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from decoding_samples import Scripted, endless, prompts
from hypothesis import given
from hypothesis import strategies as st
from lm_decoding import doubled
from lm_zoo import build
from strategies import prop, seeds
from torch import Tensor

import quickmerge as qm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.models.compat import cache_argument, fresh_cache, returned_cache
from quickmerge.speculative import PromptLookup, SpeculativeDecoding, Tree
from quickmerge.speculative.chains import Chains, put_back, save
from quickmerge.speculative.target import Columns
from quickmerge.speculative.tree import pack

HYBRIDS = ("qwen3_next", "lfm2", "mamba2", "bloom")
"""Linear attention and full attention; convolutions; state spaces alone; attention that takes no mask of a tree."""


@cache
def hybrid(family: str) -> Any:
    return doubled(build(family, num_hidden_layers=2) if family == "bloom" else build(family))


class Straight(Scripted):
    """Drafts what the target will write, as far as it may."""

    def _tree(self, row: int, last: int, nodes: int) -> Tree:
        return Tree.chain([last, *self.script[row][self.length[row] + 1 :][: nodes - 1]])


def whole(cache: Any) -> list[Tensor]:
    """Every tensor that a cache holds."""
    return [x.clone() for layer in cache.layers for x in _tensors(vars(layer))]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for each in value.values() for x in _tensors(each)] if isinstance(value, dict) else []


@pytest.mark.parametrize("family", HYBRIDS)
def test_what_was_saved_is_put_back(family: str) -> None:
    model, cache = hybrid(family), fresh_cache(hybrid(family))
    ids = prompts([9])["input_ids"]
    with torch.no_grad():
        model(ids, **cache_argument(model, cache))
        before, saved = whole(cache), save(cache)
        model(ids[:, :3], **cache_argument(model, cache))
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, whole(cache), strict=True))
        put_back(cache, saved)
    for a, b in zip(before, whole(cache), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", HYBRIDS)
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=3), seed=seeds, right=st.sampled_from([0.0, 0.6, 1.0]))
@prop(3)
def test_drafts_change_no_text(family: str, lengths: list[int], seed: int, right: float) -> None:
    model, inputs = hybrid(family), prompts(lengths, seed)
    wanted = endless(model, inputs, 13)
    decoding = SpeculativeDecoding(Scripted(wanted, right, seed), tree=5)
    assert torch.equal(endless(model, inputs, 13, custom_generate=decoding), wanted)
    assert decoding.stats.chains and "one path of each draft was read" in decoding.stats.summary()
    assert decoding.stats.lossless


def test_right_drafts_save_passes_and_wrong_ones_cost_few() -> None:
    model, inputs = hybrid("qwen3_next"), prompts([7])
    wanted = endless(model, inputs, 25)
    right = SpeculativeDecoding(Straight(wanted), tree=4)
    assert torch.equal(endless(model, inputs, 25, custom_generate=right), wanted)
    assert right.stats.passes == 6  # 24 tokens behind the first, four in each pass
    wrong = SpeculativeDecoding(Scripted(wanted, 0.0), tree=4)
    endless(model, inputs, 25, custom_generate=wrong)
    assert wrong.stats.passes <= 24  # never more than without drafts


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2"])
def test_a_seed_gives_the_same_text_whatever_is_drafted(family: str) -> None:
    model, inputs = hybrid(family), prompts([8, 5])
    texts = []
    for drafter, tree in ((PromptLookup(), 1), (PromptLookup(), 6), (Scripted(torch.zeros(2, 40).long(), 0.5), 4)):
        torch.manual_seed(3)
        if isinstance(drafter, Scripted):
            drafter = Scripted(texts[0], 0.8, binding=False)
        decoding = SpeculativeDecoding(drafter, tree=tree)
        texts.append(endless(model, inputs, 15, custom_generate=decoding, do_sample=True, temperature=0.7))
    assert torch.equal(texts[1], texts[0]) and torch.equal(texts[2], texts[0])


def test_rows_that_end_early_leave_the_cache_as_it_would_be() -> None:
    model, inputs = hybrid("qwen3_next"), prompts([8, 5, 6])
    free = endless(model, inputs, 14)
    ends = int(free[1, inputs["input_ids"].shape[1] + 3])  # a token that some row writes early ends its text
    told = {"do_sample": False, "max_new_tokens": 14, "eos_token_id": ends, "pad_token_id": 0}
    told["return_dict_in_generate"] = True
    wanted = model.generate(**inputs, **told)
    found = model.generate(**inputs, **told, custom_generate=SpeculativeDecoding(Scripted(free, 0.8, binding=False)))
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(whole(returned_cache(found)), whole(returned_cache(wanted)), strict=True):
        scale = float(b.abs().max()) if b.is_floating_point() else 0.0  # states are computed in float32
        assert torch.allclose(a, b, rtol=0, atol=2e-5 * scale)
    text = torch.cat([wanted.sequences, wanted.sequences[:, :2]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, text.shape[1] - inputs["input_ids"].shape[1]).long()], 1)
    again = [
        endless(
            model, {"input_ids": text, "attention_mask": mask}, 5, **cache_argument(model, returned_cache(out)), **own
        )
        for out, own in ((wanted, {}), (found, {"custom_generate": SpeculativeDecoding(PromptLookup(), tree=4)}))
    ]
    assert torch.equal(again[0], again[1])


def test_the_best_path_of_a_tree_is_read() -> None:
    model = hybrid("qwen3_next")
    columns = Columns(
        torch.ones(1, 0, dtype=torch.bool),
        torch.zeros(1, 0).long(),
        torch.zeros(1).long(),
        torch.zeros(1).long(),
        False,
    )
    chains = Chains(model, fresh_cache(model), columns)
    tree = Tree([4, 5, 6, 7, 8], [0, 0, 0, 1, 2], [1.0, 0.4, 0.5, 0.4, 0.3], extra=((1, 4),))
    path = chains.narrowed(tree)
    assert (path.tokens, path.parent, path.prob, path.extra) == ([4, 6, 8], [0, 0, 1], [1.0, 0.5, 0.3], ())


def test_several_rows_read_in_step_whatever_they_accept() -> None:
    model, inputs = hybrid("lfm2"), prompts([6, 6])
    ids, cache = inputs["input_ids"], fresh_cache(model)
    text = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(torch.cat([ids, text], 1), use_cache=False).logits[:, 6:]
        model(ids, **cache_argument(model, cache))
        place = torch.arange(6).expand(2, -1)
        chains = Chains(model, cache, Columns(place >= 0, place, torch.full((2,), 6), torch.zeros(2).long(), False))
        done = [0, 0]
        for right in ((1, 4), (3, 1), (2, 2), (4, 4), (1, 1)):
            drafts = []
            for row, n in enumerate(right):
                drafted = text[row, done[row] : done[row] + 4].tolist()
                drafts.append(Tree.chain([(t + (i >= n)) % 97 for i, t in enumerate(drafted)] or [3]))
            logits = chains.read(pack(drafts))[0]
            for row, n in enumerate(right):
                n = min(n, 12 - done[row])
                assert torch.allclose(logits[row, :n], wanted[row, done[row] : done[row] + n], atol=1e-8)
            chains.commit([list(range(min(n, 12 - done[row]) or 1)) for row, n in enumerate(right)])
            done = [min(12, have + n) for have, n in zip(done, right, strict=True)]


def test_inside_multipole_attention_it_writes_what_that_writes() -> None:
    model, inputs = hybrid("qwen3_next"), prompts([26, 19])
    with qm.multipole(model, budget=6, sink=2, interval=4, block=16, ratio=1 / 4, queries=8) as run:
        wanted = endless(model, inputs, 14)
        found = endless(model, inputs, 14, custom_generate=SpeculativeDecoding(Scripted(wanted, 0.8), tree=6))
        assert run.summary().clusters > 0
    assert torch.equal(found, wanted)


def test_what_can_not_be_is_told() -> None:
    model, inputs = hybrid("qwen3_next"), prompts([24])
    with (
        qm.reduce(model, qm.QuickMerge(keep=0.5), 2, min_tokens=0),
        pytest.raises(UnsupportedModelError, match=r"can't speculate while .* is attached: .* 'linear_attention'"),
    ):
        endless(model, inputs, 3, custom_generate=SpeculativeDecoding(PromptLookup(), tree=4))
    lonely = hybrid("mamba2")
    filled = fresh_cache(lonely)
    with torch.no_grad():
        lonely(inputs["input_ids"], **cache_argument(lonely, filled))
    with pytest.raises(QuickmergeError, match="must tell how many tokens it holds, or be empty"):
        endless(
            lonely,
            inputs,
            3,
            custom_generate=SpeculativeDecoding(PromptLookup(), tree=4),
            **cache_argument(lonely, filled),
        )
