"""FLOPs for a token equal those that torch counts while a model writes and learns."""

from __future__ import annotations

import pytest
import torch
from caches import held, past
from calm_bench_samples import WORDS, tiny_calm, tiny_discrete
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from quickmerge.calm.cost import autoencoder_training_cost, matrix_weights, training_cost, writing_cost
from quickmerge.errors import UnsupportedModelError


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("patch", "draws"), [(1, 1), (2, 1), (4, 1), (4, 20)])
def test_writing_a_token_with_a_calm(patch: int, draws: int) -> None:
    """One step behind five chunks, attention by plain matrix products, so that the counter sees it."""
    model = tiny_calm(patch)
    model.backbone.set_attn_implementation("eager")
    ids = torch.randint(1, WORDS, (1, 6 * patch))

    def step() -> None:
        states, _ = model.hidden(ids[:, -patch:], torch.ones_like(ids), cache, use_cache=True)
        model.sample_chunks(states[:, -1], draws)

    with torch.no_grad():
        _, cache = model.hidden(ids[:, :-patch], use_cache=True)
        wanted = flops(step) / patch
    cost = writing_cost(model, 5 * patch, draws)
    assert cost.total == pytest.approx(wanted, rel=1e-9)
    # by hand: 4 n H d in each of two layers, and the head once for each draw
    assert cost.attention * patch == 2 * 4 * 6 * 16
    c, latent = model.config.hidden_size, model.config.latent
    noise = model.head.noise
    once = c * c + c * c * len(model.head.blocks)  # the context's own maps
    each = noise * c + len(model.head.blocks) * 5 * c * c + c * c + c * latent
    d, i, v = 12, 16, WORDS + 1
    decoder = latent * d + 3 * d * i + d * patch * d + patch * (3 * d * i + d * v)
    assert cost.output * patch == 2 * once + draws * 2 * (each + decoder)


def test_writing_a_token_with_an_ordinary_model() -> None:
    model = tiny_discrete(attn_implementation="eager")
    ids = torch.randint(1, WORDS, (1, 6))
    with torch.no_grad():
        cache = held(model(ids[:, :-1], use_cache=True))
        wanted = flops(lambda: model(ids[:, -1:], **past(cache)))
    cost = writing_cost(model, 5)
    assert cost.total == pytest.approx(wanted, rel=1e-9)
    assert cost.output == 2 * 16 * (WORDS + 1) and writing_cost(model, 5, draws=9) == cost


def test_a_gpt_s_matrices_count_too() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=25, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, attn_implementation="eager"
        )
    ).eval()
    with torch.no_grad():
        wanted = flops(lambda: model(torch.zeros(1, 1, dtype=torch.long)))
    assert writing_cost(model, 0).total == wanted


def test_learning_from_a_token() -> None:
    """Forward and backward of a text of eight chunks, all of whose positions attend to all as plain products do."""
    model = tiny_calm(4)
    cost = training_cost(model, 32)
    assert cost.reading == 3 * 2 * (matrix_weights(model.backbone) + matrix_weights(model.embedding)) / 4
    assert cost.attention == 3 * 2 * 4 * 4.5 * 16 / 4
    states, targets = torch.zeros(1, 16, requires_grad=True), torch.zeros(5, 1, 6)
    forward = flops(lambda: model.head.loss(states, targets, many_targets=True))
    assert cost.output * 4 == 3 * forward
    assert cost.frozen * 4 == flops(lambda: model.autoencoder.encode(torch.zeros(1, 4, dtype=torch.long)))
    more = training_cost(tiny_calm(4, samples=6), 32)
    assert 1.5 * cost.output < more.output < 2.1 * cost.output, "twice the draws"

    ordinary = tiny_discrete(attn_implementation="eager").train()
    ids = torch.randint(1, WORDS, (1, 32))
    seen = flops(lambda: ordinary(ids).logits.sum().backward()) / 32
    mine = training_cost(ordinary, 32)
    # plain products attend to 32 entries where causal attention needs 16.5 on average
    full = mine.reading + mine.output + mine.attention * 32 / 16.5
    assert full == pytest.approx(seen, rel=0.02), "the counter leaves out the first layer's gradient of its input"


def test_an_autoencoder_learns_from_a_token() -> None:
    model = tiny_calm(4).autoencoder
    wanted = flops(lambda: model.encode(torch.zeros(1, 4, dtype=torch.long))) + flops(
        lambda: model.decode(torch.zeros(1, 6))
    )
    assert autoencoder_training_cost(model) == 3 * wanted / 4


def test_what_can_t_be_counted_is_told() -> None:
    config = MixtralConfig(
        vocab_size=25, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="FLOPs can be counted of linear layers only"):
        writing_cost(MixtralForCausalLM(config), 4)
    with pytest.raises(ValueError, match="context must be a number of at least 0"):
        writing_cost(tiny_calm(), -1)
    with pytest.raises(ValueError, match="length must be a whole number"):
        training_cost(tiny_calm(), 0)
    assert matrix_weights(nn.Sequential(nn.Linear(2, 3), nn.Embedding(9, 9))) == 6
