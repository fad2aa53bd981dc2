"""The ends of the target: logits as the model itself makes them, embeddings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding_samples import FAMILIES, tiny
from gumiho_samples import heads
from transformers import (
    AutoModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.speculative.gumiho.network import Ends, check_fit, check_target

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
ODD = {
    "bent": (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.7)),
    "scaled": (CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.3)),
    "divided": (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=5.0)),
    "with a bias": (PhiForCausalLM, PhiConfig(**SIZES)),
}


def odd(kind: str) -> Any:
    torch.manual_seed(0)
    maker, config = ODD[kind]
    model = maker(config).eval().double()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.5)
    return model


@pytest.mark.parametrize("kind", [*FAMILIES, *ODD])
def test_logits_are_the_models_own(kind: str) -> None:
    model = odd(kind) if kind in ODD else tiny(kind)
    ids = torch.randint(3, 50, (2, 5))
    with torch.no_grad():
        features, logits = model.base_model(ids).last_hidden_state, model(ids).logits
    torch.testing.assert_close(Ends(model, None, torch.float64).logits(features), logits)
    some = torch.tensor([3, 9, 40])
    ends = Ends(model, some, torch.float64)
    torch.testing.assert_close(ends.logits(features[:, None]), logits[:, None, :, some])
    assert ends.tokens(torch.tensor([[2, 0]])).tolist() == [[40, 3]]
    torch.testing.assert_close(ends.embed(ids), model.get_input_embeddings()(ids))
    assert not ends.embed(ids).requires_grad and not ends.weight.requires_grad


def test_another_type_of_the_ends() -> None:
    ends = Ends(tiny(), None, torch.bfloat16)
    features = torch.randn(2, 3, 16).bfloat16()
    assert ends.embed(torch.tensor([1])).dtype == torch.bfloat16
    assert ends.logits(features).dtype == torch.float32


def test_what_heads_can_not_share_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="must be a transformers PreTrainedModel, got a Linear"):
        check_target(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no language-model head"):
        check_target(AutoModel.from_config(tiny().config))


def test_a_model_of_other_sizes_is_refused() -> None:
    config = heads().config
    with pytest.raises(QuickmergeError, match=r"have 97 tokens in its vocabulary, .* got a LlamaForCausalLM with 50"):
        check_fit(tiny(vocab_size=50), config)
    wide = type(tiny())(type(tiny().config)(**{**tiny().config.to_dict(), "hidden_size": 32}))
    with pytest.raises(QuickmergeError, match=r"must have 16 features in its last hidden state, .* with 32"):
        check_fit(wide, config)
