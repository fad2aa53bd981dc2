"""Draft heads in the layout of the checkpoints that were published with Gumiho: pytorch_model.bin, and what it means.

Read off the loader in the paper's public repository (AMD-AIG-AIMA/Gumiho, gumiho/model), which fills its modules by
name and lets nothing be left over:

- ``embed_tokens.weight``: the target's embeddings;
- ``fc.weight (H, 2 H)``, ``fc.bias``: the fusion, embedding first;
- ``layers.I. ...``: Llama layers by transformers' names, the first without ``input_layernorm``;
- ``mlp.M.J.linear.weight``, ``.bias``: linear layer J of parallel head M, SiLU behind each, all but the first residual.
  Some copies are written with ``mlp.mlp.`` in the place of ``mlp.``; both are read.

Their config is that of a Llama of as many layers; published checkpoints come without, and the repository holds one for
each. How many tokens the serial part drafts is in neither: it is a setting of the run, 2 in the repository's scripts.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quickmerge.errors import DamagedWeightsError, QuickmergeError, door
from quickmerge.models.identity import model_hash
from quickmerge.models.part import CONFIG
from quickmerge.models.weights import check_finite, check_regular, local_path, read_json
from quickmerge.speculative.gumiho.config import GumihoConfig
from quickmerge.speculative.gumiho.drafter import Gumiho
from quickmerge.speculative.gumiho.network import GumihoNetwork, check_target
from quickmerge.together import write_together

__all__ = ["FILE", "is_published", "read_published", "write_published"]

FILE = "pytorch_model.bin"
SERIAL = 2
_HEAD = re.compile(r"mlp\.(?:mlp\.)?(\d+)\.(\d+)\.linear\.(weight|bias)")


def is_published(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds heads in that layout and none of ours."""
    path = Path(folder)
    return (path / FILE).is_file() and not (path / "model.safetensors").exists()


def read_published(
    folder: str | os.PathLike[str], model: PreTrainedModel, *, config: str | os.PathLike[str] | None = None
) -> Gumiho:
    """Read published heads for the model that they were trained for.

    Nothing in them tells which model that is, but for its embeddings, which they hold: they must be this model's.

    Args:
        folder: with pytorch_model.bin.
        model: the target.
        config: the heads' config in the repository's form; default: config.json in the folder, if there is one, else
            that of the target, of which heads have the shape of a layer.

    Raises:
        QuickmergeError: there is no such file, it holds something else, or heads of another model.
    """
    check_target(model)
    path = local_path("heads", folder) / FILE
    if not path.is_file():
        raise QuickmergeError(f"heads must be a folder with {FILE}, got {folder}, where there is none")
    check_regular(path)
    with door(f"{path} can't be read", DamagedWeightsError, "copy or download it again"):
        # tensors alone: a pickle that would run something is refused
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(state.items())
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise QuickmergeError(f"{path} must hold tensors by name, got something else")
    state = {name: value.float() for name, value in state.items() if not name.endswith("rotary_emb.inv_freq")}
    check_finite(str(path), state.items())
    network = _network(state, path, model, _settings(path, model, config))
    own = model.get_input_embeddings().weight.detach().cpu().float()
    given = state["embed_tokens.weight"]
    if given.shape != own.shape or not torch.allclose(given, own, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        raise QuickmergeError(
            f"{path} holds heads of another model: its embeddings {tuple(given.shape)} are not those of this "
            f"{type(model).__name__} {tuple(own.shape)}"
        )
    return Gumiho(network)


def _settings(path: Path, model: PreTrainedModel, config: str | os.PathLike[str] | None) -> Mapping[str, Any]:
    """The heads' config: the one that was given, the one beside them, or their target's."""
    if config is not None:
        return read_json(local_path("config", config))
    if (path.parent / CONFIG).is_file():
        return read_json(path.parent / CONFIG)
    found: dict[str, Any] = model.config.get_text_config(decoder=True).to_dict()
    return found


def _network(state: dict[str, Tensor], path: Path, model: PreTrainedModel, given: Mapping[str, Any]) -> GumihoNetwork:
    def shape(name: str) -> torch.Size:
        if name not in state:
            raise QuickmergeError(f"{path} must hold {name}, as the checkpoints that were published with Gumiho do")
        return state[name].shape

    heads = sorted({int(found[1]) for name in state if (found := _HEAD.fullmatch(name))})
    depth = len({int(found[2]) for name in state if (found := _HEAD.fullmatch(name))})
    layers = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    features = shape("fc.weight")[0]
    rope = given.get("rope_parameters") or {}
    attention = int(given.get("num_attention_heads") or 0)
    with door(f"{path} can't be used"):
        config = GumihoConfig(
            features=features,
            embedding=shape("embed_tokens.weight")[1],
            vocabulary=shape("embed_tokens.weight")[0],
            serial=SERIAL if layers else 0,
            serial_layers=layers,
            attention_heads=attention,
            key_value_heads=int(given.get("num_key_value_heads") or attention),
            head_width=shape("layers.0.self_attn.q_proj.weight")[0] // max(1, attention) if layers else 0,
            inner=shape("layers.0.mlp.gate_proj.weight")[0] if layers else 0,
            rope_base=float(given.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
            heads=len(heads),
            mlp_depth=max(depth, 2),
            mlp_width=features,
            epsilon=float(given.get("rms_norm_eps") or 1e-6),
            trained_for={"hash": model_hash(model)},
        )
    network = GumihoNetwork(config)
    made: dict[str, Tensor] = {
        "fusion.weight": state["fc.weight"],
        "fusion.bias": state.get("fc.bias", torch.zeros(features)),
    }
    made |= {name: value for name, value in state.items() if name.startswith("layers.")}
    if heads:

        def linear(head: int, layer: int, kind: str) -> Tensor:
            names = (f"mlp.{head}.{layer}.linear.{kind}", f"mlp.mlp.{head}.{layer}.linear.{kind}")
            name = next((each for each in names if each in state), names[0])
            shape(name)
            return state[name]

        made["parallel.first"] = torch.stack([linear(h, 0, "weight").T for h in heads])
        made["parallel.first_bias"] = torch.stack([linear(h, 0, "bias")[None] for h in heads])
        rest = range(1, depth)
        made["parallel.weight"] = torch.stack([torch.stack([linear(h, j, "weight").T for h in heads]) for j in rest])
        made["parallel.bias"] = torch.stack([torch.stack([linear(h, j, "bias")[None] for h in heads]) for j in rest])
    wanted = network.state_dict()
    for name in sorted(set(wanted) | set(made)):
        if name not in made or name not in wanted or made[name].shape != wanted[name].shape:
            raise QuickmergeError(
                f"{path} must hold heads of one shape, as the checkpoints published with Gumiho do: {name} is "
                f"{tuple(made[name].shape) if name in made else 'missing'} and must be "
                f"{tuple(wanted[name].shape) if name in wanted else 'left out'}"
            )
    network.load_state_dict(made)
    return network.eval()


def write_published(heads: Gumiho, model: PreTrainedModel, folder: str | os.PathLike[str]) -> Path:
    """Write heads in that layout: pytorch_model.bin and a config.json beside it, both or neither.

    Args:
        heads: of SiLU, of the model's width and without a feature scale, since the layout has no place for these.
        model: the model that they were trained for.
        folder: where to; made if need be.

    Returns:
        The folder.

    Raises:
        QuickmergeError: the layout can't hold the heads, naming the setting; or the disk is full or not writable.
    """
    heads.check(model)
    config, state = heads.config, heads.network.state_dict()
    for name, given, must in (
        ("feature_scale", config.feature_scale, 1.0),
        ("activation", config.activation, "silu"),
        ("mlp_width", config.mlp_width, config.features),
    ):
        if config.heads and given != must:
            raise QuickmergeError(
                f"{name} must be {must} for the layout of published heads, which has no place for another, got {given}"
            )
    if config.feature_scale != 1.0:
        raise QuickmergeError(f"feature_scale must be 1 for the layout of published heads, got {config.feature_scale}")
    if config.embedding != config.features:
        raise QuickmergeError(
            f"embedding must be as wide as features ({config.features}) for the layout of published heads, got "
            f"{config.embedding}"
        )
    words = model.get_input_embeddings().weight.detach().cpu().float()
    fusion = state["fusion.weight"].cpu().clone()
    fusion[:, : config.embedding] /= config.embedding_scale
    made: dict[str, Tensor] = {"embed_tokens.weight": words, "fc.weight": fusion, "fc.bias": state["fusion.bias"].cpu()}
    made |= {name: value.cpu() for name, value in state.items() if name.startswith("layers.")}
    for head in range(config.heads):
        made[f"mlp.{head}.0.linear.weight"] = state["parallel.first"][head].T.cpu()
        made[f"mlp.{head}.0.linear.bias"] = state["parallel.first_bias"][head, 0].cpu()
        for layer in range(config.mlp_depth - 1):
            made[f"mlp.{head}.{layer + 1}.linear.weight"] = state["parallel.weight"][layer, head].T.cpu()
            made[f"mlp.{head}.{layer + 1}.linear.bias"] = state["parallel.bias"][layer, head, 0].cpu()
    text: Any = model.config.get_text_config(decoder=True)
    told = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "bias": True,
        "vocab_size": config.vocabulary, "hidden_size": config.features, "intermediate_size": config.inner,
        "num_hidden_layers": config.serial_layers, "num_attention_heads": config.attention_heads,
        "num_key_value_heads": config.key_value_heads, "rms_norm_eps": config.epsilon, "rope_theta": config.rope_base,
        "pad_token_id": getattr(text, "pad_token_id", None) or 0, "tie_word_embeddings": False,
        "max_position_embeddings": int(getattr(text, "max_position_embeddings", None) or 2048),
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save({name: value.contiguous().clone() for name, value in made.items()}, buffer)
    target = local_path("out", folder)

    def fill(work: Path) -> None:
        (work / FILE).write_bytes(buffer.getvalue())
        (work / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    write_together(target, fill)
    return target
