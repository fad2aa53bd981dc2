"""A model's hash: the weights, all of them, and nothing else."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds

from quickmerge.errors import QuickmergeError
from quickmerge.models import identity
from quickmerge.models.identity import check_model, hash_like, model_hash


def test_same_weights_same_hash(tiny_llama) -> None:
    found = model_hash(tiny_llama)
    assert model_hash(tiny_llama) == found == model_hash(copy.deepcopy(tiny_llama))
    assert model_hash(copy.deepcopy(tiny_llama).to(torch.bfloat16)) == found
    assert found.startswith("2:") and len(found) == 66


def test_a_training_step_changes_it(tiny_llama) -> None:
    found = model_hash(tiny_llama)
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    assert model_hash(tiny_llama) != found


def network(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Embedding(700, 3), torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))


@prop(60)
@given(st.data(), seeds, st.sampled_from((torch.float32, torch.bfloat16, torch.float64)))
def test_any_one_value_counts_also_in_a_model_that_was_hashed_before(
    data: st.DataObject, seed: int, dtype: torch.dtype
) -> None:
    """Changed behind the version counter, as a fused optimizer does, in one place of one parameter."""
    model = network().to(dtype)
    before = model_hash(model)
    parameter = data.draw(st.sampled_from(list(model.parameters())))
    place = int(torch.randint(parameter.numel(), (1,), generator=generator(seed)))
    version = parameter._version
    parameter.data.view(-1)[place] += 1
    assert parameter._version == version and model_hash(model) != before
    parameter.data.view(-1)[place] -= 1
    assert model_hash(model) == model_hash(copy.deepcopy(model))


def test_names_and_shapes_count() -> None:
    one, two = torch.nn.Linear(2, 6, bias=False), torch.nn.Linear(6, 2, bias=False)
    other = torch.nn.Module()
    other.register_parameter("scale", torch.nn.Parameter(torch.ones(6, 2)))
    with torch.no_grad():
        one.weight.fill_(1), two.weight.fill_(1)
    assert len({model_hash(one), model_hash(two), model_hash(other)}) == 3


@prop(20)
@given(st.integers(1, 40), seeds)
def test_the_rule_written_out(piece: int, seed: int) -> None:
    """However the values are cut into pieces, also where parameters begin in the middle of a piece of memory."""
    model, digest = network(seed), hashlib.sha256()
    flat = torch.randn(19, generator=generator(seed))
    model.register_parameter("odd", torch.nn.Parameter(flat[3:18].view(5, 3).T))
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        values = parameter.detach().contiguous().to(torch.bfloat16).view(torch.int16)
        digest.update(hashlib.sha256(values.numpy().tobytes()).digest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "PIECE", piece)
        assert model_hash(model) == f"2:{digest.hexdigest()}"


def test_a_model_that_did_not_change_is_hashed_once(monkeypatch) -> None:
    model, asked = network(), []
    plain = identity._digest
    monkeypatch.setattr(identity, "_digest", lambda values: asked.append(1) or plain(values))
    assert model_hash(model) == model_hash(model)
    assert len(asked) == len(list(model.parameters()))


def test_hashes_of_the_first_rule_are_still_checked_by_it() -> None:
    """As they stand in files that were trained before: 256 values at equal distances."""
    model, digest = network(), hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 256)][:256].to(torch.bfloat16)
        digest.update(some.view(torch.int16).numpy().tobytes())
    old = digest.hexdigest()
    assert hash_like(model, old) == old and hash_like(model, model_hash(model)) == model_hash(model) != old
    check_model(model, {"hash": old}, "prior")
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(QuickmergeError, match=f"weights {old[:12]}.*other weights"):
        check_model(model, {"hash": old}, "prior")


def test_a_hash_of_a_later_rule_is_told() -> None:
    with pytest.raises(QuickmergeError, match="rule 1 or 2, got '3:abc': it was made by a newer version"):
        hash_like(network(), "3:abc")


def test_a_model_without_values_is_told() -> None:
    with pytest.raises(
        QuickmergeError, match=r"must hold its weights to be told from others, got 0\.weight on the meta"
    ):
        model_hash(network().to("meta"))


def test_another_model_is_refused_with_both_names(tiny_llama) -> None:
    found = model_hash(tiny_llama)
    check_model(tiny_llama, {"hash": found, "model": "tiny"}, "prior")
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(2)
    with pytest.raises(QuickmergeError, match=f"prior was trained for tiny .weights {found[:12]}., got a LlamaFor"):
        check_model(tiny_llama, {"hash": found, "model": "tiny"}, "prior")
    with pytest.raises(QuickmergeError, match=r"prior was trained for another model .weights None"):
        check_model(tiny_llama, {}, "prior")


def test_a_fused_optimizer_changes_it_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    before = model_hash(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert model_hash(model) != before
