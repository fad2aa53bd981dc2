"""The serial head of Gumiho as a drafter of EAGLE's layout, which vLLM loads as it is.

EAGLE (arXiv 2401.15077) drafts as the serial head does: ``W [E(x); h]``, and Llama layers of which the first has no
norm in front of its attention. Its layout has no place for what our heads have beside that: scales of features and
embeddings, and a bias of the fusion. They are folded into the weights, and nothing is lost by it.

With a feature scale s, the drafter's hidden state is s times that of the heads. Behind a norm that is the same state if
the norm's epsilon is s^2 times as large. So of the first attention, which has no norm in front, q, k and v are divided
by s; o and down, which add to the state, are multiplied by it; and the rest stays. The bias goes into embeddings of the
drafter's own: ``E'(x) = s (W_E E(x) / e + b)``, of which ``W`` then takes the identity.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError
from quickmerge.models.part import CONFIG, WEIGHTS
from quickmerge.models.weights import local_path
from quickmerge.speculative.gumiho.drafter import Gumiho
from quickmerge.speculative.gumiho.network import GumihoNetwork
from quickmerge.together import write_together

__all__ = ["eagle_config", "eagle_state", "write_eagle"]


@torch.no_grad()
def eagle_state(network: GumihoNetwork, embedding: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights of the drafter, by the names of EAGLE's checkpoints.

    Args:
        network: the heads.
        embedding: ``(V, E)``, the token embeddings of the model that they draft for.
        dtype: what is stored; folding is done in float64.

    Returns:
        ``embed_tokens.weight (V, H)``, ``fc.weight (H, 2 H)`` and ``layers.I. ...`` of each serial layer.

    Raises:
        QuickmergeError: the heads have no serial layers.
    """
    config = network.config
    if not config.serial_layers:
        raise QuickmergeError(
            "heads must draft some tokens one after the other to be an EAGLE drafter (serial of at least 1), got heads "
            f"that draft {config.heads} in parallel and none before them"
        )
    scale, width = config.feature_scale, config.embedding
    fusion, bias = network.fusion.weight.double(), network.fusion.bias.double()
    device = fusion.device
    rows = []
    for part in torch.split(embedding.detach(), 8192):  # a vocabulary in float64 would take gigabytes
        made = part.to(device).double() @ fusion[:, :width].T / config.embedding_scale + bias
        rows.append((scale * made).to(dtype))
    identity = torch.eye(config.features, dtype=torch.float64, device=device)
    state = {
        "embed_tokens.weight": torch.cat(rows),
        # the features come in the target's scale and the state is s times the heads': both cancel
        "fc.weight": torch.cat([identity, fusion[:, width:]], 1).to(dtype),
    }
    for index, layer in enumerate(network.layers):
        for name, weight in layer.state_dict().items():
            factor = 1.0
            if index == 0 and name.startswith(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")):
                factor = 1 / scale
            elif name.startswith(("self_attn.o_proj", "mlp.down_proj")):
                factor = scale
            state[f"layers.{index}.{name}"] = (weight.double() * factor).to(dtype)
    return {name: value.contiguous().cpu() for name, value in state.items()}


def eagle_config(network: GumihoNetwork, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The content of the drafter's config.json: that of a Llama of as many layers as the serial head has."""
    config = network.config
    text: Any = model.config.get_text_config(decoder=True)
    own = {name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.features,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.serial_layers,
        "num_attention_heads": config.attention_heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.epsilon * config.feature_scale**2,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "max_position_embeddings": int(getattr(text, "max_position_embeddings", None) or 2048),
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        **own,
    }


def write_eagle(
    heads: Gumiho, model: PreTrainedModel, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> Path:
    """Write the serial head as an EAGLE drafter: config.json and model.safetensors, both or neither.

    vLLM loads the folder as ``speculative_config={"method": "eagle", "model": FOLDER, "num_speculative_tokens": 2}``.
    The parallel heads, and a draft vocabulary, are not in it: vLLM drafts all tokens, one after the other.

    Args:
        heads: the heads.
        model: the model that they were trained for.
        folder: where to; made if need be, other files stay.
        dtype: of the stored weights.

    Returns:
        The folder.

    Raises:
        QuickmergeError: the heads are another model's, have no serial part, or the disk is full or not writable.
    """
    from safetensors.torch import save

    heads.check(model)
    words: Any = model.get_input_embeddings()
    # by the module, not its matrix, since some models scale what they look up
    every = torch.arange(heads.config.vocabulary, device=words.weight.device)
    with torch.no_grad():
        state = eagle_state(heads.network, words(every), dtype)
    config = eagle_config(heads.network, model, dtype)
    data = save(state, {"format": "pt"})
    target = local_path("out", folder)

    def fill(work: Path) -> None:
        (work / WEIGHTS).write_bytes(data)
        (work / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    write_together(target, fill)
    return target
