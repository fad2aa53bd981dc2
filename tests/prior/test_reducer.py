"""QuickMerge with a prior inside a language model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.evaluation.cost import model_shape
from quickmerge.hosts import reduce
from quickmerge.prior import Prior, PriorConfig, QuickMergePrior, model_hash

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
    with torch.no_grad(), reduce(model, reducer, 1):
        return model(ids, attention_mask=mask, logits_to_keep=1).logits[:, -1]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 64, (2, 60), generator=torch.Generator().manual_seed(0))


def test_an_untrained_prior_changes_not_one_bit(tiny_llama, ids) -> None:
    plain = qm.QuickMerge(keep=0.5, **SETTINGS)
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


def test_corrections_reach_the_blocks_they_were_made_for(tiny_llama, ids) -> None:
    entered: dict[int, list[Tensor]] = {}

    def watch(run_with) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}

        def note(index):
            return lambda module, args, kwargs: found.update(
                {index: (args[0] if args else kwargs["hidden_states"]).clone()}
            )

        hooks = []
        with torch.no_grad(), reduce(tiny_llama, run_with, 1):
            # Registered after the run's own hooks, so that they see what the block really gets.
            for index, block in enumerate(tiny_llama.model.layers):
                hooks.append(block.register_forward_pre_hook(note(index), with_kwargs=True))
            tiny_llama(ids, use_cache=False, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        return found

    prior = prior_for(tiny_llama, saliency=False)
    plain = watch(qm.QuickMerge(keep=0.5, **SETTINGS))
    corrected = watch(QuickMergePrior.from_prior(prior, keep=0.5))
    assert torch.equal(plain[0], corrected[0]) and not torch.equal(plain[1], corrected[1])
    del entered


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
