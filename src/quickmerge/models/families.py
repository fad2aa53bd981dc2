"""The families of language models, and what was proven of each: the table in families.json, which the tests write.

Nothing is decided by it. A model is served for what it is built of; see `quickmerge.models.traits`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

__all__ = ["CAPABILITIES", "NOT_TRIED", "WORKS", "order", "proven", "rows"]

TABLE = Path(__file__).with_name("families.json")

WORKS = "works"
"""What a cell says where every law held; else why the capability is refused."""

NOT_TRIED = "not tried: "
"""How a cell begins whose family can't be built as a tiny model."""

CAPABILITIES = ("prefix", "block_causal", "multipole", "speculation")
"""The columns of the table."""

USAGE = (
    "llama", "qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen2", "qwen2_moe", "gpt_oss",
    "gemma4_text", "gemma3_text", "gemma3n_text", "gemma2", "gemma", "mistral", "ministral3", "ministral", "mixtral",
    "deepseek_v3", "deepseek_v32", "deepseek_v4", "deepseek_v2", "glm4_moe", "glm_moe_dsa", "glm4_moe_lite", "glm4",
    "glm", "kimi_linear", "minimax_m2", "llama4_text", "phi3", "phi", "phimoe", "granitemoehybrid", "granite",
    "granitemoe", "nemotron_h", "nemotron", "lfm2", "lfm2_moe", "olmo3", "olmo2", "olmoe", "smollm3", "ernie4_5_moe",
    "ernie4_5", "seed_oss", "hunyuan_v1_dense", "exaone4", "cohere2", "cohere", "falcon_h1", "bamba", "jamba", "gpt2",
    "gpt_neox", "opt", "starcoder2", "stablelm", "bloom", "falcon", "mamba2", "mamba",
)  # fmt: skip
"""``model_type`` of the families that are used most, late in 2026, first the most used; the others by their names."""


@cache
def rows() -> dict[str, dict[str, str]]:
    """By family what was found of each capability: `WORKS`, or why it is refused, or why it was not tried."""
    found: dict[str, dict[str, str]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return {family: found[family] for family in sorted(found, key=order)}


def order(family: str) -> tuple[int, str]:
    """Where a family stands in the table."""
    return (USAGE.index(family) if family in USAGE else len(USAGE), family)


def proven(capability: str = "prefix") -> tuple[str, ...]:
    """The families for which a capability is proven, the most used first."""
    return tuple(family for family, cells in rows().items() if cells.get(capability) == WORKS)
