"""QuickMerge with a prior inside a language model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.attach import reduce
from quickmerge.merge.bench.cost import model_shape
from quickmerge.merge.prior import Prior, PriorConfig, QuickMergePrior
from quickmerge.models.identity import model_hash

SETTINGS = {"layers": 1, "window": 8, "pool": 1}


def prior_for(model, depths: tuple[int, ...] = (1,), trained: bool = True, saliency: bool = True) -> Prior:
    torch.manual_seed(1)
    trained_for = {"model": "tiny", "hash": model_hash(model), "layers": [1], "decay": 0.7, "reducer": SETTINGS}
    config = PriorConfig(features=32, width=16, heads=2, depths=depths, trained_for=trained_for, saliency=saliency)
    prior = Prior(config).eval()
    if trained:
        for parameter in prior.parameters():
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.5)
    return prior


def logits(model, reducer, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad(), reduce(model, reducer, 1, min_tokens=0):
        return model(ids, attention_mask=mask, logits_to_keep=1).logits[:, -1]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 64, (2, 60), generator=torch.Generator().manual_seed(0))


def test_an_untrained_prior_changes_not_one_bit(tiny_llama, ids) -> None:
    plain = qm.QuickMerge(keep=0.5, recency=0.85, spans="none", **SETTINGS)
    with_prior = QuickMergePrior.from_prior(prior_for(tiny_llama, trained=False), keep=0.5)
    assert torch.equal(logits(tiny_llama, plain, ids), logits(tiny_llama, with_prior, ids))


def test_a_trained_one_does_and_leaves_the_model_as_it_was(tiny_llama, ids) -> None:
    before = tiny_llama(ids).logits
    plain = qm.QuickMerge(keep=0.5, **SETTINGS)
    with_prior = QuickMergePrior.from_prior(prior_for(tiny_llama), keep=0.5)
    assert not torch.allclose(logits(tiny_llama, plain, ids), logits(tiny_llama, with_prior, ids))
    assert torch.equal(tiny_llama(ids).logits, before)


def test_keeping_everything_is_the_model_to_the_bit(tiny_llama, ids) -> None:
    whole = QuickMergePrior.from_prior(prior_for(tiny_llama), keep=1.0)
    with torch.no_grad():
        assert torch.equal(logits(tiny_llama, whole, ids), tiny_llama(ids, logits_to_keep=1).logits[:, -1])


def test_a_batch_is_its_rows_also_with_padding(tiny_llama, ids) -> None:
    reducer = QuickMergePrior.from_prior(prior_for(tiny_llama), keep=0.5)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    both = logits(tiny_llama, reducer, ids, mask)
    torch.testing.assert_close(both[:1], logits(tiny_llama, reducer, ids[:1, 9:]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1:], logits(tiny_llama, reducer, ids[1:]), atol=1e-5, rtol=1e-5)


def test_corrections_reach_the_blocks_they_were_made_for_through_later_merges() -> None:
    """What enters each block differs by exactly what `align` gave, merged along where a later merge came between."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    given: dict[int, Tensor] = {}

    class Adds(qm.QuickMerge):
        def align(self, view, plan):
            given.update({3: torch.randn(2, plan.slots, 32, generator=torch.Generator().manual_seed(5))})
            return given

    entered: list[Tensor] = []
    ids = torch.randint(3, 64, (2, 60), generator=torch.Generator().manual_seed(0))
    for kind in (qm.QuickMerge, Adds):
        with torch.no_grad(), reduce(model, kind(keep=0.5, **SETTINGS), [1, 3], min_tokens=0) as run:
            # Registered after the run's own hooks, so it sees what the block really gets.
            hook = model.model.layers[3].register_forward_pre_hook(
                lambda module, args, kwargs: entered.append((args[0] if args else kwargs["hidden_states"]).clone()),
                with_kwargs=True,
            )
            model(ids, use_cache=False, logits_to_keep=1)
            hook.remove()
    plain, corrected = entered
    assert run.plans[1].slots < run.plans[0].slots
    torch.testing.assert_close(corrected - plain, run.plans[1].merge(given[3]), atol=1e-6, rtol=1e-5)


def test_a_prior_for_another_model_layer_or_mode_is_refused(tiny_llama) -> None:
    reducer = QuickMergePrior.from_prior(prior_for(tiny_llama), keep=0.5)
    other = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    with pytest.raises(QuickmergeError, match=r"prior was trained for tiny .weights .*got a LlamaForCausalLM"):
        reduce(other, reducer, 1)
    with pytest.raises(QuickmergeError, match="mode must be prefix for slots that a prior corrects"):
        reduce(tiny_llama, reducer, 1, mode="block_causal")
    deeper = QuickMergePrior.from_prior(prior_for(tiny_llama), keep=0.5)
    deeper.prior.config.trained_for["layers"] = [3]
    with pytest.raises(QuickmergeError, match="layer must be 3 for this prior, which was trained there, got 1"):
        reduce(tiny_llama, deeper, 1)


def test_settings_labels_and_budgets(tiny_llama) -> None:
    prior = prior_for(tiny_llama)
    reducer = QuickMergePrior.from_prior(prior, keep=0.3)
    assert (reducer.window, reducer.pool, reducer.label) == (8, 1, "quickmerge+prior")
    # Where it says nothing of them, what priors are trained with, whatever the defaults of the plain method are.
    assert (reducer.recency, reducer.spans) == (0.85, "none")
    assert QuickMergePrior.from_prior(prior, recency=0.5).label == "quickmerge+prior:recency=0.5"
    assert replace(reducer, keep=0.7).prior is prior
    with pytest.raises(ValueError, match="prior must be a quickmerge Prior, got None"):
        QuickMergePrior(keep=0.5)


def test_its_operations_are_counted(tiny_llama) -> None:
    shape, tokens = model_shape(tiny_llama), [100.0, 40.0]
    plain = qm.QuickMerge(keep=0.4, **SETTINGS)
    with_prior = QuickMergePrior.from_prior(prior_for(tiny_llama), keep=0.4)
    more = shape.reducer_flops(with_prior, tokens) - shape.reducer_flops(plain, tokens)
    per_token = 32 * (16 + 4) + 64 * 33
    per_slot = 32 * 16 * 2 + 2 * 12 * 16**2
    assert more == 2 * (100 * per_token + 40 * per_slot) + 2 * 2 * 40**2 * 16


def test_one_prior_serves_models_in_two_types_at_once_and_moves_for_none(tiny_llama, ids) -> None:
    """A run takes what the method has learnt to its model's device; the method that it was given stays."""
    half = copy.deepcopy(tiny_llama).to(torch.bfloat16)
    prior = prior_for(tiny_llama)
    reducer = QuickMergePrior.from_prior(prior, keep=0.5)
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    alone = [logits(model, reducer, ids) for model in (tiny_llama, half)]
    with torch.no_grad(), reduce(tiny_llama, reducer, 1, min_tokens=0), reduce(half, reducer, 1, min_tokens=0):
        together = [model(ids, logits_to_keep=1).logits[:, -1] for model in (tiny_llama, half)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert reducer.on(torch.device("cpu")) is reducer
    there = reducer.on(torch.device("meta"))
    assert all(p.is_meta for p in there.prior.parameters()) and there == replace(reducer, prior=there.prior)
    after = prior.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())
