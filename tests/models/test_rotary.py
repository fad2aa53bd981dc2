"""Keys without their rotation and queries at a fixed place, against what transformers itself rotates."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hosts_zoo import ZOO, build
from strategies import generator
from torch import Tensor, nn

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.decoder import find_decoder
from quickmerge.models.rotary import Rotary

THETA = {"rope_theta": 10000.0}
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    **THETA,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ZOO},
    "linear": ("llama", {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 3.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "yarn, scaled": ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.7}}),
    "gpt_neox, all": ("gpt_neox", {"rope_parameters": {**THETA, "partial_rotary_factor": 1.0}}),
    "phi3, half": ("phi3", {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}),
}
WANTED = "space must be 'rotated'"
LAYER = 3  # of full attention in every family that has others


def rotary_of(name: str, dtype: torch.dtype = torch.float32, layer: int = LAYER) -> tuple[Rotary, Any, nn.Module]:
    family, settings = MODELS[name]
    decoder = find_decoder(build(family, dtype=dtype, **settings))
    return (
        Rotary.of(decoder.base, decoder.attentions[layer], layer, wanted=WANTED),
        decoder.base,
        decoder.attentions[layer],
    )


def rotated(base: Any, attention: nn.Module, x: Tensor, position: Tensor, layer: int = LAYER) -> Tensor:
    """``x (B, h, n, D)`` as the model would rotate it at ``position (B, n)``."""
    if not getattr(attention, "use_rope", True):
        return x
    types = {"layer_type": base.config.layer_types[layer]} if base.config.model_type == "gemma3_text" else {}
    cos, sin = base.rotary_emb(x, position, **types)
    turn: Any = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return turn(x, x, cos, sin)[0]  # type: ignore[no-any-return]


def places(rows: int, count: int) -> Tensor:
    """Positions from the first to far beyond what a float32 holds angles of exactly."""
    near = torch.arange(count - 4).expand(rows, -1)
    return (
        torch.cat([near, torch.tensor([[511, 4099, 65537, 131071]]).expand(rows, -1)], 1) + torch.arange(rows)[:, None]
    )


def scaling(base: Any) -> float:
    """The attention scaling that YaRN multiplies rotated channels with."""
    return float(getattr(base.rotary_emb, "attention_scaling", 1.0))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unrotated_keys_are_those_that_were_rotated(name: str, dtype: torch.dtype) -> None:
    rotary, base, attention = rotary_of(name, dtype)
    keys = torch.randn(2, 3, 20, 8, dtype=dtype, generator=generator(0))
    position = places(2, 20)
    got = rotary.unrotate(rotated(base, attention, keys, position), position)
    assert got.dtype == dtype
    first = rotated(base, attention, keys, torch.zeros_like(position))
    torch.testing.assert_close(got, first, rtol=1e-5, atol=1e-5)
    if rotary.module is not None:
        channels = base.rotary_emb(keys, position)[0].shape[-1] if "gemma3" not in name else 8
        torch.testing.assert_close(first[..., :channels], keys[..., :channels] * scaling(base))
        assert torch.equal(first[..., channels:], keys[..., channels:])


def test_yarn_scales_and_partial_rotations_leave_channels_alone() -> None:
    """What the cases above are there for."""
    assert scaling(rotary_of("yarn, scaled")[1]) == pytest.approx(1.7)
    assert scaling(rotary_of("yarn")[1]) > 1.1
    x = torch.randn(1, 1, 1, 8)
    for name, channels in (("gpt_neox", 2), ("gpt_neox, all", 8), ("phi3, half", 4)):
        _, base, _ = rotary_of(name)
        assert base.rotary_emb(x, torch.ones(1, 1).long())[0].shape[-1] == channels


@pytest.mark.parametrize("name", MODELS)
def test_windowed_logits_are_those_of_keys_so_many_places_away(name: str) -> None:
    rotary, base, attention = rotary_of(name)
    draws = generator(1)
    query, keys = torch.randn(2, 3, 5, 8, generator=draws), torch.randn(2, 3, 20, 8, generator=draws)
    at, position = torch.tensor([[7, 8, 9, 10, 70000]]).expand(2, -1), places(2, 20)
    far = rotary.move(rotated(base, attention, query, at), at, 2048)
    bare = rotary.unrotate(rotated(base, attention, keys, position), position)
    there = rotated(base, attention, query, torch.full_like(at, 2048))
    here = rotated(base, attention, keys, torch.zeros_like(position))
    torch.testing.assert_close(far, there, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(far @ bare.mT, there @ here.mT, rtol=1e-4, atol=1e-4)


def test_one_list_of_positions_serves_all_rows() -> None:
    rotary, base, attention = rotary_of("llama")
    keys, position = torch.randn(3, 2, 20, 8), places(1, 20)
    got = rotary.unrotate(rotated(base, attention, keys, position.expand(3, -1)), position)
    torch.testing.assert_close(got, keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "yarn, scaled"])
def test_a_model_in_bfloat16_is_undone_as_exactly_as_it_rotates(name: str) -> None:
    rotary, base, attention = rotary_of(name, torch.bfloat16)
    keys = torch.randn(2, 3, 20, 8, generator=generator(0)).bfloat16()
    position = places(2, 20)
    got = rotary.unrotate(rotated(base, attention, keys, position), position)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, rotated(base, attention, keys, 0 * position), rtol=3e-2, atol=3e-2)


def test_blocks_without_rotation_are_left_alone() -> None:
    rotary, _, attention = rotary_of("smollm3", layer=1)
    assert not attention.use_rope
    assert rotary.module is None
    keys = torch.randn(1, 2, 4, 8)
    assert torch.equal(rotary.unrotate(keys, torch.arange(4)[None]), keys)
    assert torch.equal(rotary.move(keys, torch.arange(4)[None], 2048), keys)
    assert rotary_of("smollm3", layer=0)[0].module is not None


def test_each_type_of_block_has_its_own_angles() -> None:
    sliding, full = rotary_of("gemma3_text", layer=0)[0], rotary_of("gemma3_text", layer=1)[0]
    assert (sliding.layer_type, full.layer_type) == ("sliding_attention", "full_attention")
    keys, position = torch.randn(1, 1, 9, 8), torch.arange(9)[None]
    assert not torch.allclose(sliding.unrotate(keys, position), full.unrotate(keys, position))


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {**THETA, "rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}),
        (
            "phi3",
            {
                **THETA,
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
)
def test_angles_that_change_with_the_length_are_refused(family: str, rope: dict[str, Any]) -> None:
    model = build(family, rope_parameters=rope)
    kind = rope["rope_type"]
    with pytest.raises(UnsupportedModelError, match=f"space must be 'rotated' .* of type '{kind}' changes"):
        Rotary.of(model.model, model.model.layers[0].self_attn, 0, wanted=WANTED)


def test_another_order_of_channels_is_refused() -> None:
    from transformers import CohereConfig, CohereForCausalLM, GlmConfig, GlmForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    for model in (CohereForCausalLM(CohereConfig(**sizes)), GlmForCausalLM(GlmConfig(head_dim=8, **sizes))):
        with pytest.raises(UnsupportedModelError, match="an order of its own"):
            Rotary.of(model.model, model.model.layers[0].self_attn, 0, wanted=WANTED)


def test_no_rotary_embedding_is_refused() -> None:
    model = build("llama")
    with pytest.raises(UnsupportedModelError, match="has no rotary embedding"):
        Rotary.of(nn.Module(), model.model.layers[0].self_attn, 0, wanted=WANTED)
