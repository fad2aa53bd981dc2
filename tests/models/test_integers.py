"""Integers may lie beside weights as counters, but are never read as weights, whatever they are called."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from quickmerge.errors import DamagedWeightsError
from quickmerge.models import load


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_floats_that_call_themselves_integers_are_refused(tiny_folder: Path, name: str) -> None:
    path = tiny_folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[name]["dtype"] = "I32"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(DamagedWeightsError, match="as I32, but weights must be one of"):
        load(tiny_folder, progress=False)


def test_so_are_biases_and_tokens_that_are_parameters(tmp_path: Path) -> None:
    import vision_samples
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    from quickmerge.models import load_vision

    ViTModel(ViTConfig(**vision_samples.SIZE, **vision_samples.IMAGE)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    for name in ("embeddings.cls_token", "layernorm.bias"):
        save_file({**held, name: held[name].int()}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(DamagedWeightsError, match=f"{name}' as I32"):
            load_vision(tmp_path, progress=False)
