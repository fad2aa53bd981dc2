"""A tiny random model of every causal language model that transformers registers, by one rule and a few exceptions."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING

from quickmerge.models.compat import causal_lm_names

DEPTH = 4
VOCABULARY = 97
WINDOW = 9
BOS, EOS = 1, 2

LARGEST = 2_000_000
"""Parameters of a tiny model."""

_RULES: tuple[tuple[str, Any], ...] = (
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (r"hidden_size_per_layer_input", 8),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_size|embedding_dim|word_embed_proj_dim|lru_width|attention_hidden_size"
     r"|backbone_hidden_size|.*_embedding_size", 32),
    (r"(.*_)?(moe|expert|shared)_(.*_)?(intermediate|hidden)_size|shared_intermediate_size", 16),
    (r"(.*_)?intermediate_size(_.*)?|(.*_)?ffn_dim|dff|dim_ff|d_inner|ffn_hidden_size|feed_forward_size", 48),
    (r"num_hidden_layers|n_layers?|num_layers|num_blocks|(num_)?(en|de)coder_layers", DEPTH),
    (r"(num_)?(.*_)?attention_heads|n_heads?|num_heads", 4),
    (r"(.*_)?num_(key_value|kv)_heads|num_global_key_value_heads", 2),
    (r"(.*_)?head_dim|kv_channels|d_head|dim_head|attention_head_size", 8),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank", 16),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_nope_head_dim", 8),
    (r"v_head_dim", 6),
    (r"(moe_)?num_(local_)?experts|n_routed_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"sliding_window(_size)?|attention_window_size|window_size|local_attention", WINDOW),
    (r"attention_chunk_size", 16),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length"
     r"|original_max_position_embeddings|max_target_positions", 512),
    (r"mamba_n_heads|mamba_num_heads", 4),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_d_ssm", 64),
    (r"(mamba_d_|ssm_)?state(_size)?", 8),
    (r"mamba_n_groups|n_groups", 1),
    (r"(mamba_)?chunk_size", 8),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"linear_(key|value)_head_dim", 8),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"index_topk", 8),
    (r"index_head_dim", 8),
    (r"index_n_heads", 2),
    (r"(.*_)?dropout(_prob)?|.*_pdrop|layerdrop|.*_layerdrop|.*_noise", 0.0),
    (r"initializer_range|init_std", 0.2),
)  # fmt: skip
"""What a setting becomes, by its name; the first that fits."""

_TYPES = ("layer_types", "mlp_layer_types", "layers_block_type")
"""Settings that name the kind of each block: each kind that the default names, in turn."""

EXCEPTIONS: dict[str, dict[str, Any]] = {}
"""What the rule doesn't find, by family."""


def _shrunk(default: Any, depth: int = DEPTH) -> dict[str, Any]:
    """The settings of a tiny configuration of the kind of ``default``."""
    told: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in _TYPES and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            told[name] = [kinds[i % len(kinds)] for i in range(depth)]
            continue
        if value is None or isinstance(value, (bool, str, list, dict)):
            continue
        for pattern, size in _RULES:
            if re.fullmatch(pattern, name):
                told[name] = size
                break
    # In latent attention `head_dim` is what is rotated.
    if "qk_rope_head_dim" in told and "head_dim" in told:
        told["head_dim"] = told["qk_rope_head_dim"]
    told |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0}
    return told


@cache
def families() -> tuple[str, ...]:
    """``model_type`` of every causal language model of the installed transformers, sorted."""
    return tuple(sorted(causal_lm_names()))


def config_of(family: str, **more: Any) -> Any:
    """A tiny configuration of a family; of the language model, where a family has several parts."""
    kind = CONFIG_MAPPING[family]
    default = kind()
    text = default.get_text_config(decoder=True)
    return type(text)(**{**_shrunk(text), **EXCEPTIONS.get(family, {}), **more})


def build(family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Any:
    """A random model of a family, in eval mode."""
    config = config_of(family, **more)
    kind = getattr(transformers, causal_lm_names()[family])
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > LARGEST:
        raise TooLargeError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    model = kind._from_config(config, attn_implementation=attn)
    return model.to(dtype).eval()


class TooLargeError(Exception):
    """A configuration that the rule did not make tiny."""
