from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hosts_zoo import DEPTH, WINDOW, ZOO, build, reduce, tokens
from torch import nn

import quickmerge as qm
from quickmerge.errors import UnsupportedModelError
from quickmerge.models.decoder import FAMILIES, IMPLEMENTATIONS, find_decoder, layer_window


def other(model: str, config: str, **settings: Any) -> Any:
    return getattr(transformers, model)(getattr(transformers, config)(vocab_size=97, **settings))


def test_the_zoo_covers_every_family_that_is_claimed() -> None:
    assert sorted(ZOO) == sorted(FAMILIES)


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
def test_the_parts_are_found(family: str, attn: str) -> None:
    model = build(family, attn)
    decoder = find_decoder(model)
    assert len(decoder) == DEPTH and decoder.model is model and decoder.base is model.base_model
    assert decoder.layers is model.base_model.layers
    for block, attention in zip(decoder.layers, decoder.attentions, strict=True):
        assert attention in list(block.children()) and "Attention" in type(attention).__name__
    expected = {"mistral": [WINDOW] * 4, "gemma3_text": [WINDOW, None] * 2}.get(family, [None] * 4)
    assert list(decoder.windows) == expected


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_slides_above_max_window_layers_when_told_to(family: str) -> None:
    model = build(family, use_sliding_window=True, sliding_window=7, max_window_layers=2)
    assert find_decoder(model).windows == (None, None, 7, 7)


@pytest.mark.parametrize(
    ("model", "config", "settings"),
    [
        ("MambaForCausalLM", "MambaConfig", {"hidden_size": 16, "num_hidden_layers": 2}),
        (
            "T5ForConditionalGeneration",
            "T5Config",
            {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2},
        ),
        (
            "BertForMaskedLM",
            "BertConfig",
            {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        ),
    ],
)
@pytest.mark.parametrize("mode", ["prefix", "block_causal"])
def test_other_models_are_refused_by_name(model: str, config: str, settings: dict[str, Any], mode: str) -> None:
    built = other(model, config, **settings)
    with pytest.raises(UnsupportedModelError, match=rf"^{model}\b"):
        reduce(built, qm.Uniform(keep=0.5), mode=mode)


def test_a_decoder_without_a_head_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no language-model head"):
        reduce(build("llama").model, qm.Uniform(keep=0.5))


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="must be a transformers PreTrainedModel, got Linear"):
        reduce(nn.Linear(2, 2), qm.Uniform(keep=0.5))  # type: ignore[arg-type]


def test_a_model_with_two_lists_of_blocks_is_refused() -> None:
    model = build("llama")
    model.model.more = nn.ModuleList(nn.Identity() for _ in range(DEPTH))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has 2 lists of decoder blocks"):
        find_decoder(model)


TRAITS = [
    # What config and model a block is read from, and what it must be found to be.
    ("GptOss", {"layer_types": ["sliding_attention", "full_attention"]}, {"sinks": True, "attention": "full"}),
    ("Gemma2", {"head_dim": 8}, {"softcap": 50.0, "attention": "full"}),
    ("Cohere", {}, {"parallel": True}),
    ("GPT2", {}, {"positions": "learned", "attention": "full"}),
    ("Lfm2", {"layer_types": ["full_attention", "conv"]}, {"attention": None, "memory": "a convolution"}),
]


@pytest.mark.parametrize(("name", "settings", "expected"), TRAITS, ids=[name for name, _, _ in TRAITS])
def test_the_traits_of_the_last_block_are_read(name: str, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    more = {"num_local_experts": 2} if name == "GptOss" else {}
    heads = {} if name == "GPT2" else {"num_key_value_heads": 2}
    traits = find_decoder(other(head, f"{name}Config", **sizes, **heads, **settings, **more)).traits
    assert len(traits) == 2
    for trait, value in expected.items():
        assert getattr(traits[-1], trait) == value, trait


def test_a_trait_that_can_not_be_served_is_named() -> None:
    decoder = find_decoder(build("mistral"))
    decoder.need("anything", lambda block: None)
    with pytest.raises(UnsupportedModelError, match=r"^x can't be served for Mistral\w+, whose block 0 \(sliding"):
        decoder.need("x", lambda block: block.attention)


def test_a_kind_of_block_that_is_unknown_is_named() -> None:
    config = build("gemma3_text").config
    config.layer_types = ["full_attention", "chunked_attention"]
    assert layer_window(config, 0) is None
    with pytest.raises(UnsupportedModelError, match=r"gemma3_text block 1 is of type 'chunked_attention'"):
        layer_window(config, 1)


@pytest.mark.parametrize("family", ZOO)
def test_tied_and_untied_heads(family: str) -> None:
    """The zoo's other half: whatever the zoo ties is untied here, and the other way round."""
    flipped = not build(family).config.tie_word_embeddings
    model = build(family, tie_word_embeddings=flipped)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == flipped
    ids = tokens(2, 30)
    with torch.no_grad():
        plain = model(ids).logits
        with reduce(model, qm.QuickMerge(keep=1.0), layer=2, recent=6):
            assert torch.equal(model(ids).logits, plain)
        with reduce(model, qm.QuickMerge(keep=0.5), layer=2, recent=6):
            assert model(ids).logits.shape[1] == 15
        assert torch.equal(model(ids).logits, plain)
