"""Draft heads on disk: what is saved comes back, and what is damaged is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from decoding_samples import tiny
from gumiho_samples import SHAPES, heads
from safetensors.torch import load_file, save_file

from quickmerge.errors import QuickmergeError
from quickmerge.speculative.gumiho import Gumiho


@pytest.mark.parametrize("shape", SHAPES)
def test_saved_and_loaded(shape: str, tmp_path: Path) -> None:
    made = heads(drafted=torch.tensor([4, 8, 90]), **SHAPES[shape])
    made.network.float()
    made.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = Gumiho.from_pretrained(tmp_path, beam=3)
    assert loaded.config == made.config and loaded.beam == 3
    for name, value in made.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], value), name
    assert not any(value.shape[0] == 97 for value in made.network.state_dict().values())  # nothing of the target


def test_half_the_size(tmp_path: Path) -> None:
    made = heads(drafted=torch.tensor([4, 8, 90]))
    made.network.float()
    made.save_pretrained(tmp_path / "whole")
    made.save_pretrained(tmp_path / "half", torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    state = Gumiho.from_pretrained(tmp_path / "half").network.state_dict()
    assert state["fusion.weight"].dtype == torch.float32 and state["drafted"].tolist() == [4, 8, 90]
    torch.testing.assert_close(state["fusion.weight"], made.network.fusion.weight, atol=1e-3, rtol=1e-3)


def test_what_is_damaged_is_told(tmp_path: Path) -> None:
    made = heads(drafted=torch.tensor([4, 8, 90]))
    with pytest.raises(QuickmergeError, match=r"must be a folder with config.json and model.safetensors, got"):
        Gumiho.from_pretrained(tmp_path / "none")
    made.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)

    def refused(change: dict[str, torch.Tensor | None], message: str) -> None:
        save_file({name: value for name, value in {**state, **change}.items() if value is not None}, weights)
        with pytest.raises(QuickmergeError, match=message):
            Gumiho.from_pretrained(tmp_path)

    refused({"fusion.bias": None}, "it lacks fusion.bias")
    refused({"more": torch.ones(1)}, "it has the unknown entry more")
    refused({"fusion.bias": torch.ones(3)}, r"fusion.bias must have shape \(16,\), got \(3,\)")
    refused({"fusion.bias": torch.full((16,), torch.nan)}, "fusion.bias holds values that are not finite")
    refused({"drafted": torch.tensor([8, 4, 90])}, "drafted must be rising token ids below 97")
    refused({"drafted": torch.tensor([4, 8, 97])}, "drafted must be rising token ids below 97")
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(QuickmergeError, match="is damaged"):
        Gumiho.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(QuickmergeError, match=r"model.safetensors is missing"):
        Gumiho.from_pretrained(tmp_path)


def test_a_config_of_another_shape_does_not_fit(tmp_path: Path) -> None:
    heads(tiny()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "serial_layers": 1}))
    with pytest.raises(QuickmergeError, match=r"has the unknown entry layers.1"):
        Gumiho.from_pretrained(tmp_path)
