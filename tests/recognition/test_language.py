"""Cutting a causal language model, and making sure that it can be read as labels need it."""

from __future__ import annotations

from typing import Any

import hosts_zoo
import pytest
import torch
import transformers as hf
from caches import past
from transformers import DynamicCache

from quickmerge.errors import UnsupportedModelError
from quickmerge.recognition.language import check_reading, cut, fork, read
from quickmerge.training.packing import packed_mask, packed_positions

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(head_dim=8, **SIZES)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(logits_scaling=3.0, **SIZES)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(head_dim=8, num_local_experts=2, num_experts_per_tok=1, rope_scaling=None, **SIZES)
    ),
}


@pytest.mark.parametrize("family", hosts_zoo.ZOO)
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_the_first_blocks_are_kept_with_the_norm_and_the_head(family: str, blocks: int) -> None:
    whole = hosts_zoo.build(family)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    made = cut(whole, blocks)
    ids = hosts_zoo.tokens(2, 12)
    taken: list[torch.Tensor] = []
    handle = whole.base_model.layers[blocks - 1].register_forward_hook(
        lambda module, args, out: taken.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        got = made(ids).logits
        whole(ids)
        base = whole.base_model
        norm = base.final_layer_norm if hasattr(base, "final_layer_norm") else base.norm
        assert torch.equal(got, whole.get_output_embeddings()(norm(taken[0])))
    handle.remove()
    # the original is as it was, and shares no weight
    assert len(whole.base_model.layers) == hosts_zoo.DEPTH == whole.config.num_hidden_layers
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
    assert not {p.data_ptr() for p in whole.parameters()} & {p.data_ptr() for p in made.parameters()}
    again = type(made)._from_config(type(made.config).from_dict(made.config.to_dict()))
    assert again.state_dict().keys() == made.state_dict().keys()


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_causal_model_that_does_as_told_will_do(name: str) -> None:
    torch.manual_seed(0)
    check_reading(cut(OTHERS[name]().eval(), 2))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_logits_of_some_rows_are_those_of_all(family: str) -> None:
    language = hosts_zoo.build(family, dtype=torch.float64)
    ids, rows = hosts_zoo.tokens(3, 8), torch.rand(3, 8) < 0.4
    group = torch.zeros_like(ids)
    see, position = packed_mask(group, group > 0), packed_positions(group)
    embeds = language.get_input_embeddings()(ids)
    with torch.no_grad():
        every = read(language, embeds, see, position)
        assert torch.allclose(every, language(ids).logits, atol=1e-10)
        assert torch.allclose(read(language, embeds, see, position, rows=rows), every[rows], atol=1e-12)
    assert not language.get_output_embeddings()._forward_pre_hooks


def test_the_head_is_left_clean_when_reading_fails() -> None:
    language = hosts_zoo.build("llama")
    group = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(RuntimeError):
        read(language, torch.zeros(1, 4, 7), packed_mask(group, group > 0), group, rows=group == 0)
    assert not language.get_output_embeddings()._forward_pre_hooks


def test_a_forked_cache_grows_by_itself() -> None:
    language, cache = hosts_zoo.build("llama"), DynamicCache()
    language(hosts_zoo.tokens(2, 5), **past(cache))
    other = fork(cache)
    assert other.layers[0].keys is cache.layers[0].keys
    language(hosts_zoo.tokens(2, 3), **past(other))
    assert (cache.get_seq_length(), other.get_seq_length()) == (5, 8)


def test_models_that_cannot_be_used_are_told() -> None:
    llama = hosts_zoo.build("llama")
    for blocks, message in ((5, "blocks must be at most 4"), (0, "blocks must be a whole number of at least 1, got 0")):
        with pytest.raises(ValueError, match=message):
            cut(llama, blocks)
    for model, message in (
        (torch.nn.Linear(2, 2), "language must be a transformers PreTrainedModel, got Linear"),
        (llama.model, "language must be a causal language model with an output matrix, got a LlamaModel"),
        (hosts_zoo.build("llama", attn="flex_attention"), "runs attention as 'flex_attention', which does not take"),
        (
            hf.OPTForCausalLM(hf.OPTConfig(vocab_size=97, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
                                           num_hidden_layers=2, num_attention_heads=4)),
            "OPTForCausalLM has 0 lists of 2 blocks",
        ),
    ):  # fmt: skip
        with pytest.raises(UnsupportedModelError, match=message):
            cut(model, 2)


def test_models_that_do_not_do_as_told_are_told() -> None:
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM can't be read with masks and positions"):
        check_reading(bloom.eval())
    mixed = hf.Lfm2ForCausalLM(hf.Lfm2Config(layer_types=["conv", "full_attention"] * 2, **SIZES))
    with pytest.raises(UnsupportedModelError, match="block 0 is of type 'conv'"):
        check_reading(mixed.eval())
    for spoilt in ("attention_mask", "position_ids"):
        llama = hosts_zoo.build("llama")
        plain = torch.arange(9)[None] if spoilt == "position_ids" else None

        def ignore(module: Any, args: Any, kwargs: Any, name: str = spoilt, other: Any = plain) -> Any:
            count = kwargs["inputs_embeds"].shape[1] if kwargs.get("inputs_embeds") is not None else 9
            return args, {**kwargs, name: None if other is None else other[:, -count:]}

        llama.model.register_forward_pre_hook(ignore, with_kwargs=True)
        with pytest.raises(
            UnsupportedModelError,
            match=r"LlamaForCausalLM (does not read tokens (at|that|behind) .*|can't be read)",
        ):
            check_reading(llama)


def test_a_check_leaves_the_mode_of_a_model() -> None:
    llama = hosts_zoo.build("llama").train()
    check_reading(llama)
    assert llama.training
