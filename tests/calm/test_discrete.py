"""The terms of an ordinary language model against all texts of a tiny vocabulary."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from quickmerge.calm.brier import GRAMS
from quickmerge.calm.rollout import discrete_terms
from quickmerge.errors import QuickmergeError

WORDS = 4
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"vocab_size": WORDS, "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.5}


def language_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=WORDS,
            bos_token_id=0,
            eos_token_id=0,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            initializer_range=0.2,
        )
        return GPT2LMHeadModel(config).eval()
    if kind == "sliding":
        return MistralForCausalLM(MistralConfig(**SIZE, **LLAMA, sliding_window=3)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZE, **LLAMA)).eval()


@torch.no_grad()
def enumerated(model: torch.nn.Module, prefix: torch.Tensor, target: list[int]) -> list[float]:
    """Every text of four tokens behind the prefix, and its probability by the product of conditional ones."""
    texts = torch.tensor(list(itertools.product(range(WORDS), repeat=GRAMS)))
    rows = torch.cat([prefix.expand(len(texts), -1), texts], 1)
    log = model(input_ids=rows).logits.double().log_softmax(-1)[:, len(prefix) - 1 : -1]
    mass = log.gather(-1, texts[..., None])[..., 0].sum(-1).exp()
    assert float(mass.sum()) == pytest.approx(1)
    out = []
    for n in range(1, GRAMS + 1):
        shape = (WORDS**n, -1)
        marginal = mass.view(shape).sum(1)
        at = sum(token * WORDS ** (n - 1 - i) for i, token in enumerate(target[:n]))
        out.append(2 * float(marginal[at]) - float((marginal**2).sum()))
    return out


@pytest.mark.parametrize("kind", ["llama", "gpt2", "sliding"])
def test_terms_are_unbiased_and_brier_1_is_exact(kind: str) -> None:
    """A sliding window can't be gone back in: its texts are read again, and give the same."""
    model = language_model(kind)
    window = torch.randint(0, WORDS, (14,), generator=torch.Generator().manual_seed(1))
    places = torch.tensor([1, 4, 7, 10])
    exact = torch.tensor([enumerated(model, window[:p], window[p : p + 4].tolist()) for p in places.tolist()])
    many = 150
    generator = torch.Generator().manual_seed(2)
    drawn = torch.stack([discrete_terms(model, window, places, paths=2, generator=generator) for _ in range(many)])
    torch.testing.assert_close(drawn[:, :, 0], exact[:, 0].double().expand(many, -1), atol=1e-6, rtol=0)
    error = drawn.std(0)[:, 1:] / many**0.5
    assert (error > 0).all() and ((drawn.mean(0) - exact)[:, 1:].abs() < 5 * error + 1e-6).all()


def test_more_paths_lower_the_variance_and_pieces_change_nothing() -> None:
    model = language_model("llama")
    window, places = torch.randint(0, WORDS, (14,)), torch.tensor([3, 6])

    def spread(paths: int) -> float:
        generator = torch.Generator().manual_seed(0)
        terms = [discrete_terms(model, window, places, paths=paths, generator=generator)[:, 3] for _ in range(60)]
        return float(torch.stack(terms).var(0).mean())

    assert spread(16) < 0.3 * spread(1)
    whole, pieces = (
        discrete_terms(model, window, places, paths=1, generator=torch.Generator().manual_seed(5), at_once=n)
        for n in (2, 1)
    )
    torch.testing.assert_close(whole[:, 0], pieces[:, 0])


def test_the_text_of_the_caller_s_cache_is_left_alone_and_gradients_are_not_kept() -> None:
    terms = discrete_terms(language_model("llama"), torch.randint(0, WORDS, (9,)), torch.tensor([5]))
    assert terms.shape == (1, 4) and terms.dtype == torch.float64 and not terms.requires_grad


@pytest.mark.parametrize("places", [[], [0], [7], [-1]])
def test_places_without_a_past_or_a_future_are_refused(places: list[int]) -> None:
    with pytest.raises(QuickmergeError, match="places must be from 1 to 6 in a window of 10 tokens"):
        discrete_terms(
            language_model("llama"), torch.zeros(10, dtype=torch.long), torch.tensor(places, dtype=torch.long)
        )
