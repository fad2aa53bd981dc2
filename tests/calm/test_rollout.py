"""Terms from draws of chunks against all texts of a tiny vocabulary, and with a real CALM."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from caches import held, past
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from quickmerge.calm.brier import GRAMS
from quickmerge.calm.rollout import calm_terms
from quickmerge.errors import QuickmergeError

SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


class Chunks:
    """A model with a CALM's interface whose probabilities are known: a language model whose words are chunks."""

    def __init__(self, patch: int, tokens: int, sliding: bool = False) -> None:
        torch.manual_seed(0)
        self.config, self.device, self.tokens = SimpleNamespace(patch=patch), torch.device("cpu"), tokens
        sizes = {"vocab_size": tokens**patch, "num_key_value_heads": 1, "initializer_range": 0.4, **SIZE}
        self.place = tokens ** torch.arange(patch - 1, -1, -1)
        if sliding:
            self.model = MistralForCausalLM(MistralConfig(sliding_window=3, **sizes)).eval()
        else:
            self.model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=32, **sizes)).eval()

    def hidden(
        self, ids: Tensor, attention_mask: Tensor | None = None, cache=None, use_cache: bool = False
    ) -> tuple[Tensor, object]:
        codes = self.codes(ids.unflatten(1, (-1, self.config.patch)))
        there = torch.ones_like(codes) if attention_mask is None else attention_mask[:, :: self.config.patch]
        out = self.model.model(
            input_ids=codes, attention_mask=there, position_ids=(there.cumsum(1) - 1)[:, -codes.shape[1] :],
            **past(cache), use_cache=use_cache,
        )  # fmt: skip
        return out.last_hidden_state, held(out)

    def sample_chunks(self, hidden: Tensor, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        mass = self.mass(hidden)
        return self.chunks(torch.multinomial(mass, count, replacement=True, generator=generator).T)

    def mass(self, hidden: Tensor) -> Tensor:
        """Probability of each chunk."""
        return self.model.lm_head(hidden).double().softmax(-1)

    def codes(self, chunks: Tensor) -> Tensor:
        return (chunks * self.place).sum(-1)

    def chunks(self, codes: Tensor) -> Tensor:
        return codes[..., None] // self.place % self.tokens

    @torch.no_grad()
    def enumerated(self, prefix: Tensor, target: Tensor) -> list[float]:
        """The scores of the next 1 to 4 tokens, from the probability of every text of whole chunks."""
        need = -(-GRAMS // self.config.patch)
        texts = self.chunks(torch.tensor(list(itertools.product(range(self.tokens**self.config.patch), repeat=need))))
        mass = torch.ones(len(texts), dtype=torch.float64)
        for chunk in range(need):
            rows = torch.cat([prefix.expand(len(texts), -1), texts[:, :chunk].flatten(1)], 1)
            following = self.mass(self.hidden(rows)[0][:, -1])
            mass = mass * following.gather(1, self.codes(texts[:, chunk])[:, None])[:, 0]
        assert float(mass.sum()) == pytest.approx(1)
        out, flat = [], texts.flatten(1)
        for n in range(1, GRAMS + 1):
            marginal: dict[tuple[int, ...], float] = {}
            for text, m in zip(flat[:, :n].tolist(), mass.tolist(), strict=True):
                marginal[tuple(text)] = marginal.get(tuple(text), 0.0) + m
            out.append(2 * marginal[tuple(target[:n].tolist())] - sum(m * m for m in marginal.values()))
        return out


@pytest.mark.parametrize(("patch", "tokens", "paths"), [(1, 3, 2), (2, 2, 1), (3, 2, 1), (4, 2, 1), (5, 2, 1)])
def test_terms_are_unbiased_for_any_chunk_size(patch: int, tokens: int, paths: int) -> None:
    model, many = Chunks(patch, tokens), 150
    window = torch.randint(0, tokens, (8 * patch + patch - 1,), generator=torch.Generator().manual_seed(1))
    places = torch.tensor([1, 3]) * patch
    exact = torch.tensor([model.enumerated(window[:p], window[p : p + GRAMS]) for p in places.tolist()])
    draw = torch.Generator().manual_seed(2)
    drawn = torch.stack(
        [calm_terms(model, window, places, samples=6, paths=paths, generator=draw, at_once=3) for _ in range(many)]
    )
    error = drawn.std(0) / many**0.5
    assert (error > 0).all() and ((drawn.mean(0) - exact).abs() < 5 * error).all()


def test_a_backbone_that_forgets_is_refused_where_chunks_are_short() -> None:
    window, places = torch.zeros(24, dtype=torch.long), torch.tensor([8])
    with pytest.raises(QuickmergeError, match="chunks of 2 tokens are too short for BrierLM with this backbone"):
        calm_terms(Chunks(2, 2, sliding=True), window, places)
    assert calm_terms(Chunks(4, 2, sliding=True), window, places).shape == (1, 4)


@pytest.mark.parametrize(
    ("places", "settings", "words"),
    [
        ([3], {}, "places must be multiples of 2 from 2 to 8 in a window of 12 tokens"),
        ([0], {}, "multiples of 2"),
        ([10], {}, "multiples of 2"),
        ([], {}, "multiples of 2"),
        ([4], {"samples": 1}, "samples must be a whole number of at least 2"),
        ([4], {"paths": 0}, "paths must be a whole number"),
    ],
)
def test_what_does_not_fit_is_told(places: list[int], settings: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        calm_terms(Chunks(2, 2), torch.zeros(12, dtype=torch.long), torch.tensor(places, dtype=torch.long), **settings)
