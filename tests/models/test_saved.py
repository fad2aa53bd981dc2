"""What is saved does not tell where it came from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModel, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from quickmerge.models.part import model_label, save_parts


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=4, patch_size=2)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**small, vocab_size=32), image_token_index=31)
    )


def test_no_configuration_names_a_place_of_the_disk(tmp_path: Path) -> None:
    files = []
    for place in ("/home/one/model", "/somewhere/else"):
        model = llava()
        for config in (model.config, model.config.text_config, model.config.vision_config):
            config._name_or_path = place
        folder = tmp_path / place.rpartition("/")[2]
        folder.mkdir()
        save_parts(folder, model, None)
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert model.config.text_config._name_or_path == place  # the user's own stays as it is
        assert AutoModel.from_pretrained(folder).config.text_config.hidden_size == 16
    assert files[0] == files[1]
    assert "name_or_path" not in files[0]["config.json"].decode()
    assert json.loads(files[0]["config.json"])["model_type"] == "llava"


def test_a_model_is_called_by_its_name_and_not_by_its_place() -> None:
    assert [model_label(name) for name in ("smollm2-135m", "owner/name", "runs/calm")] == [
        "smollm2-135m", "owner/name", "runs/calm"
    ]  # fmt: skip
    assert model_label("/home/someone/models/mine") == "mine"
