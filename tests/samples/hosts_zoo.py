"""Tiny models of every supported family, and slow, obvious statements of what the host must compute."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

import quickmerge as qm
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.models.decoder import _WATCHED

DEPTH = 4
WINDOW = 9
BOS, EOS = 1, 2

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    # Large weights, so that attention is far from flat and every token matters.
    "initializer_range": 0.2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
_SHARED: dict[str, Any] = {"num_key_value_heads": 2}
_LAYERS = ["sliding_attention", "full_attention"] * (DEPTH // 2)

# family: (config class, model class, settings of its own)
ZOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_SHARED, "head_dim": 8, "layer_types": _LAYERS, "sliding_window": WINDOW, "tie_word_embeddings": True},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_SHARED, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_SHARED, "sliding_window": WINDOW}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", dict(_SHARED)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_SHARED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_SHARED, "head_dim": 8}),
    "smollm3": (
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {**_SHARED, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
    ),
}


def build(family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Any:
    """A random model of a family, in eval mode."""
    config_name, model_name, own = ZOO[family]
    config = getattr(transformers, config_name)(**{**_SIZES, **own, **more})
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)._from_config(config, attn_implementation=attn)
    return model.to(dtype).eval()


def reduce(model: Any, reducer: Any, layer: Any = None, **settings: Any) -> Any:
    """`quickmerge.reduce` for texts as short as those of tests, which it reads in full unless it is told otherwise."""
    short = {} if settings.get("mode") == "block_causal" else {"min_tokens": 0}
    return qm.reduce(model, reducer, layer, **{**short, **settings})


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids without special tokens."""
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions of rows of different length."""
    width = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp_min(0)


def generate(model: Any, ids: Tensor, new: int = 4, **more: Any) -> Any:
    """Exactly ``new`` greedy tokens with their logits."""
    more = {"do_sample": False, "attention_mask": torch.ones_like(ids), **more}
    return model.generate(
        ids, max_new_tokens=new, min_new_tokens=new, return_dict_in_generate=True, output_logits=True, **more
    )


def stored(cache: Any) -> list[int]:
    """Entries that each layer has been given, as the layer itself counts them."""
    return [layer.get_seq_length() for layer in cache.layers]


def assert_detached(model: Any, implementation: str) -> None:
    """No trace of a run is left on the model."""
    for name, module in model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, f"{name} has hooks left"
        assert module not in _WATCHED, f"{name} is still watched"
        config = getattr(module, "config", None)
        if config is not None:
            assert config._attn_implementation == implementation, f"{name} runs {config._attn_implementation}"


def window_of(config: Any, layer: int) -> int | None:
    """The sliding window of a layer, read off the zoo's own settings."""
    if config.model_type == "mistral":
        return WINDOW
    if config.model_type == "gemma3_text" and _LAYERS[layer] == "sliding_attention":
        return WINDOW
    return None


def rotary(base: Any, hidden: Tensor, position: Tensor, layer: int) -> Any:
    """Cosine and sine at the given positions."""
    if base.config.model_type == "gemma3_text":
        return base.rotary_emb(hidden, position, _LAYERS[layer])
    return base.rotary_emb(hidden, position)


def by_hand(
    model: Any,
    ids: Tensor,
    merges: dict[int, MergePlan],
    *,
    valid: Tensor | None = None,
    extra: Tensor | None = None,
    proportional: bool = False,
) -> Tensor:
    """Logits of a merged prompt and of ``extra`` tokens after it, without any cache or hook of ours.

    The layer modules are called one after the other; before a layer in ``merges`` the prompt part is merged. Masks
    are written out entry by entry from positions, angles are taken at the entries' positions.
    """
    base, n = model.base_model, ids.shape[1]
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.bool()
    extra = ids[:, :0] if extra is None else extra
    position = (valid.long().cumsum(-1) - 1).clamp_min(0)
    after = valid.sum(-1, keepdim=True) + torch.arange(extra.shape[1])
    position = torch.cat([position, after], 1)
    valid = torch.cat([valid, torch.ones_like(extra, dtype=torch.bool)], 1)
    size = torch.ones_like(position)
    h = base.get_input_embeddings()(torch.cat([ids, extra], 1))
    for i, layer in enumerate(base.layers):
        if i in merges:
            plan = merges[i]
            h = torch.cat([plan.merge(h[:, :n]), h[:, n:]], 1)
            position = torch.cat([plan.position, position[:, n:]], 1)
            valid = torch.cat([plan.valid, valid[:, n:]], 1)
            size = torch.cat([plan.size, size[:, n:]], 1)
            n = plan.slots
        index = torch.arange(h.shape[1])
        see = (index[None, :] <= index[:, None]) & valid[:, None, :]
        window = window_of(base.config, i)
        if window is not None:
            see = see & (position[:, :, None] - position[:, None, :] < window)
        # Padding looks at itself, so that no softmax is over nothing.
        see = see | torch.eye(h.shape[1], dtype=torch.bool)
        mask = torch.zeros(see.shape, dtype=h.dtype).masked_fill(~see, -torch.inf)
        if proportional:
            mask = mask + size.clamp_min(1).to(h.dtype).log()[:, None, :]
        h = layer(
            h,
            attention_mask=mask[:, None],
            position_ids=position,
            position_embeddings=rotary(base, h, position, i),
        )
        h = h[0] if isinstance(h, tuple) else h
    norm = base.final_layer_norm if hasattr(base, "final_layer_norm") else base.norm
    return model.get_output_embeddings()(norm(h))
