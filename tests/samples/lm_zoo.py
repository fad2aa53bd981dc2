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
    (r"kv_lora_rank|q_lora_rank|o_lora_rank", 16),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_nope_head_dim", 8),
    (r"v_head_dim", 6),
    (r"mamba_n_heads|mamba_num_heads", 4),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"(?!qk_)(.*_)?head_dim|kv_channels|d_head|dim_head|attention_head_size", 8),
    (r"(moe_)?num_(local_)?experts|n_routed_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"sliding_window(_size)?|attention_window_size|window_size|local_attention", WINDOW),
    (r"attention_chunk_size", 16),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length"
     r"|original_max_position_embeddings|max_target_positions", 512),
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

_LEFT_OUT = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
"""Settings that some classes have without a default that would do."""

_TYPES = ("layer_types", "mlp_layer_types", "layers_block_type")
"""Settings that name the kind of each block: each kind that the default names, in turn."""

_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_DECODER: dict[str, Any] = {"decoder_ffn_dim": 48, "decoder_attention_heads": 4, "encoder_attention_heads": 4}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot-small": {"decoder_layers": DEPTH},
    "cohere_compass_text": {"rope_parameters": {_FULL: {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "moshi": {"sliding_window": 512},  # which its mask doesn't know of
    "dory": {
        "num_hidden_layers": 6,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "layer_types": [_SLIDING, _FULL] * 3,
    },
    "dots3_note_text": {
        "n_shared_experts": 1,
        "head_dim": 12,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 6,
    },
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "layer_types": [_SLIDING, _FULL] * 3,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "intermediate_size": 48,
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": {"num_hidden_layers": 6, "layer_types": [_SLIDING, _FULL] * 3, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"num_hidden_layers": 6, "layer_types": [_SLIDING, _FULL] * 3, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], DEPTH // 2]]},
    "granitemoehybrid": {"layer_types": [_LINEAR, _FULL] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": [_SLIDING, _FULL] * 2},
    "lfm2": {"layer_types": ["conv", _FULL] * 2},
    "lfm2_moe": {"layer_types": ["conv", _FULL] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": [_SLIDING, _FULL] * 2},
    "minimax_m3_vl_text": {"layer_types": [_FULL, "minimax_m3_sparse"] * 2},
    "nemotron_h": {"layers_block_type": [_LINEAR, _FULL, "moe", _LINEAR, _FULL, "mlp"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    "smollm3": {"no_rope_layer_interval": 2},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 8},
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "marian", "mbart", "mvp", "pegasus", "plbart"), _DECODER),
    "whisper": _DECODER,
}
"""What the rule doesn't find, by family."""


def _shrunk(default: Any, depth: int = DEPTH) -> dict[str, Any]:
    """The settings of a tiny configuration of the kind of ``default``."""
    told: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in _TYPES and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            told[name] = [kinds[i % len(kinds)] for i in range(depth)]
            continue
        if (value is None and name not in _LEFT_OUT) or isinstance(value, (bool, str, list, dict)):
            continue
        for pattern, size in _RULES:
            if re.fullmatch(pattern, name):
                told[name] = size
                break
    # In latent attention `head_dim` is what is rotated.
    if "qk_rope_head_dim" in told:
        told["num_key_value_heads"] = told["num_attention_heads"]
        if "head_dim" in told:
            told["head_dim"] = told["qk_rope_head_dim"]
    told |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0}
    return told


_PARTS = "a model of several parts, whose language model is a row of its own"
_BESIDE = "a drafter, which reads the hidden states of another model"

UNBUILT: dict[str, str] = {
    "blt": "bytes, patched by a model of its own inside, for which there is no tiny configuration",
    **dict.fromkeys(
        ("fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "moss_transcribe_diarize",
         "phi4_multimodal"), _PARTS),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _BESIDE),
}  # fmt: skip
"""Families that can't be built tiny, and why."""

LAYERS = {"hy_v4": 1}
"""The block in front of which a family's prompt is merged in tests, where it can't be the third."""


def layer_of(family: str) -> int:
    """The block in front of which a family's prompt is merged in tests."""
    return LAYERS.get(family, 2)


@cache
def families() -> tuple[str, ...]:
    """``model_type`` of every causal language model of the installed transformers, sorted."""
    return tuple(sorted(causal_lm_names()))


def config_of(family: str, **more: Any) -> Any:
    """A tiny configuration of a family; of the language model, where a family has several parts."""
    kind = CONFIG_MAPPING[family]
    default = kind()
    text = default.get_text_config(decoder=True)
    # Of an encoder-decoder that is the same configuration under other names.
    text = default if type(text) is kind else text
    family = family if type(text) is kind else text.model_type
    return type(text)(**{**_shrunk(text), **EXCEPTIONS.get(family, {}), **more})


def build(family: str, attn: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Any:
    """A random model of a family, in eval mode; with sdpa where its class has it, unless told otherwise."""
    config = config_of(family, **more)
    kind = getattr(transformers, causal_lm_names()[family])
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > LARGEST:
        raise TooLargeError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    attn = ("sdpa" if kind._supports_sdpa else "eager") if attn is None else attn
    model = kind._from_config(config, attn_implementation=attn)
    return model.to(dtype).eval()


class TooLargeError(Exception):
    """A configuration that the rule did not make tiny."""
