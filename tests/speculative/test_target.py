"""Reading trees with real models of every family, and which models can."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
import torch
import transformers
from caches import past
from decoding_samples import FAMILIES, prompts, random_shape, read_rows, tiny
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds
from torch import Tensor
from transformers import DynamicCache

import quickmerge as qm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.speculative import Tree
from quickmerge.speculative.proof import check_target
from quickmerge.speculative.target import last_hidden, plain_cache
from quickmerge.speculative.tree import pack


def path_to(tree: Tree, node: int) -> list[int]:
    """Tokens from the root to a node."""
    tokens = [tree.tokens[node]]
    while node:
        node = tree.parent[node]
        tokens.insert(0, tree.tokens[node])
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3), seed=seeds)
@prop(4)
def test_every_node_reads_its_own_text_alone(family: str, lengths: list[int], seed: int) -> None:
    rng, model, inputs = Random(seed), tiny(family), prompts(lengths, seed)
    target = read_rows(model, inputs)
    target.features = True
    trees = []
    for _ in lengths:
        size = rng.randint(1, 8)
        trees.append(Tree([rng.randrange(97) for _ in range(size)], random_shape(size, rng), [1.0] * size))
    with torch.no_grad():
        logits, features = target.read(pack(trees))
        assert features is not None
        for row, tree in enumerate(trees):
            text = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
            for node in range(len(tree)):
                ids = torch.cat([text, torch.tensor(path_to(tree, node))])[None]
                with last_hidden(model) as hidden:
                    wanted = model(input_ids=ids).logits[0, -1]
                assert torch.allclose(logits[row, node], wanted, atol=1e-9)
                assert torch.allclose(features[row, node], hidden[0][0, -1], atol=1e-9)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_bfloat16_is_read_as_it_is_alone(attn: str) -> None:
    model = tiny("gemma3_text", attn=attn, seed=1)
    half = model.to(torch.bfloat16)
    try:
        target = read_rows(half, prompts([9, 4]))
        trees = [Tree([5, 6, 7, 8], [0, 0, 0, 2], [1.0] * 4), Tree.chain([9, 10])]
        with torch.no_grad():
            logits = target.read(pack(trees))[0]
            inputs = prompts([9, 4])
            for row, tokens, node in [(0, [5, 7, 8], 3), (1, [9, 10], 1)]:
                text = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
                wanted = half(input_ids=torch.cat([text, torch.tensor(tokens)])[None]).logits[0, -1]
                assert (logits[row, node] - wanted).abs().max() < 0.05 * wanted.abs().max()
    finally:
        model.to(torch.float64)


def test_no_hook_is_left() -> None:
    model = tiny()
    with pytest.raises(RuntimeError, match="stop"), last_hidden(model):
        raise RuntimeError("stop")
    assert not model.base_model._forward_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_pass(family: str) -> None:
    check_target(tiny(family))


SMALL: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}


def other(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **more})
    kind = "ForConditionalGeneration" if name == "T5" else "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, name + kind)(config).double().eval()


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Olmo2", "Granite", "Phi", "Cohere"])
def test_what_is_tried_out_and_works_is_let_through(name: str) -> None:
    more = {"OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16}, "Cohere": {"pad_token_id": 0}}
    check_target(other(name, **more.get(name, {})))


def test_a_model_that_can_not_read_a_tree_is_told() -> None:
    for model, trait in [
        (other("Falcon", alibi=True, new_decoder_architecture=False), "mask of four dimensions"),
        (other("Bloom"), "takes no position_ids"),
        (other("Mamba2", state_size=4, num_heads=4, head_dim=8, n_groups=1), "linear_attention"),
    ]:
        assert trait in check_target(model)
    encoder = {"num_hidden_layers": 2, "intermediate_size": 32}
    for model, message in [
        (object(), "must be a transformers PreTrainedModel, got object"),
        (other("T5", d_model=16, d_kv=8, d_ff=32), "needs a decoder with a language-model head, got a T5"),
        (other("Roberta", **encoder), "reads several tokens behind a cache otherwise than text"),
        (other("Mamba", state_size=4), r"can't read several tokens behind a cache .* neither: .*linear_attention"),
    ]:
        with pytest.raises(UnsupportedModelError, match=message):
            check_target(model)


def test_another_attention_is_told() -> None:
    model = other("Llama", num_key_value_heads=2)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModelError, match=r"'flex_attention'.*set attn_implementation to one of eager, sdpa"):
        check_target(model)


def test_a_run_that_reads_no_trees_is_told() -> None:
    model = tiny()
    with qm.reduce(model, qm.QuickMerge(keep=0.5), layer=1):
        check_target(model)
    with (
        qm.reduce(model, qm.QuickMerge(keep=0.5), mode="block_causal"),
        pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM can't read draft trees here.*use prefix mode"),
    ):
        check_target(model)


class Deaf(transformers.LlamaForCausalLM):
    """Takes a mask and does not look at it."""

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, cache: Any = None,
        **more: Any,
    ) -> Any:  # fmt: skip
        return super().forward(input_ids, None, position_ids, cache, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_the_mask_is_found_out(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 32, "initializer_range": 0.2}
    assert "no mask of four dimensions" in check_target(Deaf(transformers.LlamaConfig(**sizes)).eval().to(dtype))


def test_rounding_in_half_precision_is_not_taken_for_a_trait(smollm2: tuple[Any, Any]) -> None:
    """Where a processor has no instructions for bfloat16 this model's logits differ by a fifth, read two right ways."""
    model = copy.deepcopy(smollm2[0]).to(torch.bfloat16)
    assert check_target(model) == ""
    deaf = copy.deepcopy(model)
    deaf.__class__ = Deaf
    assert "no mask of four dimensions" in check_target(deaf)


def test_caches_are_made_plain_or_refused() -> None:
    config = tiny("gemma3_text").config
    cache = DynamicCache(config=config)
    assert plain_cache(cache) is cache
    assert {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}
    assert isinstance(plain_cache(None), DynamicCache)
    filled = DynamicCache(config=config)
    tiny("gemma3_text")(input_ids=torch.arange(3, 12)[None], **past(filled))
    with pytest.raises(QuickmergeError, match="must hold every token, got one with sliding layers"):
        plain_cache(filled)
    with pytest.raises(QuickmergeError, match=r"must be a DynamicCache .* got one with StaticLayer"):
        plain_cache(transformers.StaticCache(config=tiny().config, max_cache_len=8))
    with pytest.raises(QuickmergeError, match="must be a DynamicCache"):
        plain_cache(DynamicCache(offloading=True))
