"""The serial head as an EAGLE drafter, held against what such a drafter computes, step by step in float64."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding_samples import tiny
from gumiho_samples import heads, literal_serial
from safetensors.torch import load_file
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.speculative.gumiho import write_eagle
from quickmerge.speculative.gumiho.eagle import eagle_config, eagle_state

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SERIAL = {
    "one layer": {"serial": 2, "serial_layers": 1, "heads": 2},
    "two layers": {"serial": 2, "serial_layers": 2, "heads": 0},
    "another epsilon": {"serial": 1, "serial_layers": 2, "heads": 1, "epsilon": 1e-2},
    "no scales": {"serial": 2, "heads": 1, "feature_scale": 1.0, "embedding_scale": 1.0},
    "few tokens": {"serial": 2, "heads": 1, "drafted": torch.arange(0, 40, 3)},
}


def drafter(state: dict[str, Tensor], config: dict[str, Any]) -> Any:
    """EAGLE's layers by their names, as what `literal_serial` goes through: no scale, a norm's epsilon from config."""

    def weight(name: str) -> SimpleNamespace:
        return SimpleNamespace(weight=state[name], eps=config["rms_norm_eps"])

    layers = []
    for index in range(config["num_hidden_layers"]):
        at = f"layers.{index}"
        assert (f"{at}.input_layernorm.weight" in state) == (index > 0)
        layers.append(SimpleNamespace(
            self_attn=SimpleNamespace(**{n: weight(f"{at}.self_attn.{n}.weight") for n in ATTENTION}),
            mlp=SimpleNamespace(**{n: weight(f"{at}.mlp.{n}.weight") for n in ("gate_proj", "up_proj", "down_proj")}),
            input_layernorm=weight(f"{at}.input_layernorm.weight") if index else None,
            post_attention_layernorm=weight(f"{at}.post_attention_layernorm.weight"),
        ))  # fmt: skip
    shape = SimpleNamespace(
        attention_heads=config["num_attention_heads"], key_value_heads=config["num_key_value_heads"],
        head_width=config["head_dim"], rope_base=config["rope_theta"], feature_scale=1.0,
    )  # fmt: skip
    return SimpleNamespace(layers=layers, config=shape)


@pytest.mark.parametrize("shape", SERIAL)
def test_it_computes_what_the_serial_head_does(shape: str) -> None:
    model = tiny()
    made = heads(model, **SERIAL[shape])
    network, embedding = made.network, model.get_input_embeddings().weight.detach().double()
    state = eagle_state(network, embedding, torch.float64)
    config = eagle_config(network, model)
    tokens = torch.randint(0, len(embedding), (7,), generator=torch.Generator().manual_seed(1))
    features = torch.randn(7, network.config.features, generator=torch.Generator().manual_seed(2)).double() * 3
    with torch.no_grad():
        wanted = network.serial(network.fuse(embedding[tokens], features)[None], torch.arange(7)[None])[0]
        pairs = [
            state["fc.weight"] @ torch.cat([state["embed_tokens.weight"][token], feature])
            for token, feature in zip(tokens, features, strict=True)
        ]
        made_by = torch.stack(literal_serial(drafter(state, config), pairs))
    torch.testing.assert_close(made_by, wanted, rtol=1e-9, atol=1e-9)


def test_the_files_are_those_that_vllm_reads(tmp_path: Path) -> None:
    model = tiny()
    made = heads(model, serial=2, heads=2)
    write_eagle(made, model, tmp_path / "out", torch.bfloat16)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    state = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    width = made.config.features
    assert state["fc.weight"].shape == (width, 2 * width) and state["fc.weight"].dtype == torch.bfloat16
    assert state["embed_tokens.weight"].shape == (made.config.vocabulary, width)
    assert config["architectures"] == ["LlamaForCausalLM"] and config["num_hidden_layers"] == 2
    assert config["rms_norm_eps"] == pytest.approx(1e-6 * 1.7**2) and config["dtype"] == "bfloat16"
    assert not any(name.startswith(("parallel", "lm_head")) for name in state)


def test_heads_that_can_not_be_one_are_refused(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(QuickmergeError, match="serial of at least 1"):
        write_eagle(heads(model, serial=0, serial_layers=0, heads=3), model, tmp_path / "out")
    with pytest.raises(QuickmergeError, match="were trained for"):
        write_eagle(heads(model), tiny(seed=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
