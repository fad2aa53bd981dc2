"""The learned budget in block-causal mode: exact, causal, and a fixed share on average."""

from __future__ import annotations

import pytest
import torch
from caches import past
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.attach import reduce
from quickmerge.merge.prior import Prior, PriorConfig
from quickmerge.merge.prior.budget import Surprise, calibrate_surprise
from quickmerge.merge.tokens import Evidence, TokenView

CHUNK, WINDOW = 16, 8


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=97, num_key_value_heads=2, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def prior(model: LlamaForCausalLM) -> Prior:
    torch.manual_seed(1)
    built = Prior(PriorConfig(features=32, width=16, heads=2, trained_for={"layers": [1]})).eval()
    for parameter in built.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.5)
    found: list[Tensor] = []
    hook = model.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        for seed in range(4):
            model(text(8 * CHUNK, seed))
    hook.remove()
    calibrate_surprise(built, found, chunk=CHUNK, group=4)
    return built


def text(length: int, seed: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def attach(model, prior: Prior, gamma: float = 1.5):
    reducer = qm.QuickMerge(keep=Surprise(prior, keep=0.4, gamma=gamma), layers=1, pool=1, merge=0)
    return reduce(model, reducer, mode="block_causal", sinks=1, chunk=CHUNK, window=WINDOW)


@given(seed=seeds, cut=st.integers(20, 90))
@prop(6)
def test_nothing_that_comes_later_changes_a_logit(model, prior, seed: int, cut: int) -> None:
    one = text(100, seed)
    two = torch.cat([one[:, :cut], text(100 - cut, seed + 1)], 1)
    with torch.no_grad():
        with attach(model, prior):
            first = model(one).logits
        with attach(model, prior):
            second = model(two).logits
    assert torch.equal(first[:, :cut], second[:, :cut])


def test_no_gradient_comes_from_later_tokens(model, prior) -> None:
    embedded = model.get_input_embeddings()(text(90, 0)).detach().requires_grad_()
    with attach(model, prior):
        logits = model(inputs_embeds=embedded).logits
    (grad,) = torch.autograd.grad(logits[:, :60].square().sum(), embedded)
    assert bool((grad[:, 60:] == 0).all()) and bool((grad[:, :60] != 0).any())


@given(seed=seeds, steps=st.lists(st.integers(1, 40), min_size=1, max_size=5))
@prop(6)
def test_fed_in_pieces_it_is_the_same(model, prior, seed: int, steps: list[int]) -> None:
    ids = text(100, seed, batch=2)
    with torch.no_grad():
        with attach(model, prior):
            whole = model(ids).logits
        cache, parts, done = DynamicCache(config=model.config), [], 0
        with attach(model, prior):
            for step in [*steps, 100]:
                piece = ids[:, done : done + step]
                if piece.shape[1]:
                    parts.append(model(piece, **past(cache), use_cache=True).logits)
                    done += piece.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=1e-9)


def test_surprising_chunks_are_followed_by_finer_ones(model, prior) -> None:
    """The count after each chunk is the formula's, with the surprise that the budget itself measured."""
    budget = Surprise(prior, keep=0.4, gamma=1.5)
    view = TokenView(hidden=torch.zeros(3, 100, 32), evidence=Evidence(surprise=torch.tensor([-1.0, 0.0, 1.0])))
    z = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    want = (40 * (1.5 * z - 1.125).exp().clamp(0.25, 4)).clamp_max(100).round().long()
    assert torch.equal(budget.count(view, None), want)
    assert int(budget.count(TokenView(hidden=torch.zeros(1, 100, 32)), None)) == 40


def test_without_gamma_it_is_a_fixed_share(model, prior) -> None:
    ids = text(100, 3)
    fixed = qm.QuickMerge(keep=0.4, layers=1, pool=1, merge=0)
    with torch.no_grad():
        with reduce(model, fixed, 1, mode="block_causal", sinks=1, chunk=CHUNK, window=WINDOW):
            plain = model(ids).logits
        with attach(model, prior, gamma=0.0):
            assert torch.equal(model(ids).logits, plain)
        with attach(model, prior, gamma=1.5):
            assert not torch.equal(model(ids).logits, plain)


def test_the_mean_share_stays(model, prior) -> None:
    """For normal surprise the mean of the factor is one, whatever gamma."""
    z = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    view = TokenView(hidden=torch.zeros(20_000, 50, 1), evidence=Evidence(surprise=z))
    kept = Surprise(prior, keep=0.3, gamma=0.5, low=0.01, high=100).count(view, None).double().mean() / 50
    assert abs(float(kept) - 0.3) < 0.005


def test_beams_move_what_was_read(model, prior) -> None:
    with attach(model, prior):
        out = model.generate(text(60, 0), num_beams=3, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert out.shape[0] == 1 and out.shape[1] > 60


def test_settings_are_checked(model, prior) -> None:
    bare = Prior(PriorConfig(features=32, width=16, heads=2, trained_for={"layers": [1]}))
    with pytest.raises(QuickmergeError, match="prior must know its usual surprise"):
        Surprise(bare)
    with pytest.raises(ValueError, match=r"keep must be a number in \(0, 1\], got 0"):
        Surprise(prior, keep=0)
    with pytest.raises(ValueError, match="gamma must be a finite number, got inf"):
        Surprise(prior, gamma=float("inf"))
    with pytest.raises(ValueError, match="low and high"):
        Surprise(prior, low=2.0)
    with pytest.raises(QuickmergeError, match="at least two chunks of 16 tokens, got 0"):
        calibrate_surprise(bare, [], chunk=16)
    reducer = qm.QuickMerge(keep=Surprise(prior, keep=0.4), layers=1)
    with pytest.raises(ValueError, match="keep must be a budget for whole prompts in prefix mode"):
        reduce(model, reducer, 1)
    with pytest.raises(QuickmergeError, match="layer must be 1 for a budget that reads in front of that block, got 0"):
        reduce(model, reducer, 0, mode="block_causal")


def test_a_budget_is_taken_to_a_device_and_stays_where_it_was(prior) -> None:
    budget = Surprise(prior, keep=0.4)
    reducer = qm.QuickMerge(keep=budget, layers=1)
    assert reducer.on(torch.device("cpu")) is reducer and budget.on(torch.device("cpu")) is budget
    there = reducer.on(torch.device("meta"))
    assert all(p.is_meta for p in there.keep.prior.parameters())
    assert reducer.keep is budget and not any(p.is_meta for p in prior.parameters())
