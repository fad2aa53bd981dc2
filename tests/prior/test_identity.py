"""A model's hash: the weights and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from quickmerge.errors import QuickmergeError
from quickmerge.prior.identity import check_model, model_hash


def test_same_weights_same_hash(tiny_llama) -> None:
    found = model_hash(tiny_llama)
    assert model_hash(tiny_llama) == found == model_hash(copy.deepcopy(tiny_llama))
    assert model_hash(copy.deepcopy(tiny_llama).to(torch.bfloat16)) == found


def test_a_training_step_changes_it(tiny_llama) -> None:
    found = model_hash(tiny_llama)
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    assert model_hash(tiny_llama) != found


def test_another_model_is_refused_with_both_names(tiny_llama) -> None:
    found = model_hash(tiny_llama)
    check_model(tiny_llama, {"hash": found, "model": "tiny"}, "prior")
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(2)
    with pytest.raises(QuickmergeError, match=f"prior was trained for tiny .weights {found[:12]}., got a LlamaFor"):
        check_model(tiny_llama, {"hash": found, "model": "tiny"}, "prior")


def test_a_fused_optimizer_changes_it_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    before = model_hash(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert model_hash(model) != before
