"""The layout of the checkpoints that were published with Gumiho: by the names of the repository's modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding_samples import tiny
from gumiho_samples import heads
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.speculative.gumiho import read_published, write_published
from quickmerge.speculative.gumiho.published import FILE, is_published

PLAIN: dict[str, Any] = {"feature_scale": 1.0, "embedding_scale": 0.4, "mlp_depth": 6, "serial": 2, "heads": 3}


def read(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / FILE, weights_only=True)
    return found


def test_what_is_written_is_read_again_and_drafts_the_same(tmp_path: Path) -> None:
    model = tiny()
    made = heads(model, epsilon=1e-5, rope_base=500.0, **PLAIN)
    made.network.float()
    write_published(made, model, tmp_path)
    assert is_published(tmp_path)
    again = read_published(tmp_path, model)
    assert again.config.epsilon == 1e-5 and again.config.rope_base == 500.0 and again.config.heads == 3
    embedded, features = torch.randn(1, 5, made.config.embedding), torch.randn(1, 5, made.config.features)
    with torch.no_grad():
        for one, other in ((made.network, again.network), (again.network, made.network)):
            pairs = one.fuse(embedded, features), other.fuse(embedded, features)
            torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-4)
            places = torch.arange(5)[None]
            torch.testing.assert_close(
                one.serial(pairs[0], places), other.serial(pairs[0], places), rtol=1e-4, atol=1e-3
            )
            guess = [each.guess(pairs[0][0, :1], pairs[0][0, 1:2]) for each in (one, other)]
            torch.testing.assert_close(*guess, rtol=1e-4, atol=1e-3)


def test_names_and_shapes_are_those_of_the_repository(tmp_path: Path) -> None:
    model = tiny()
    made = heads(model, **PLAIN)
    write_published(made, model, tmp_path)
    state, width = read(tmp_path), made.config.features
    assert state["fc.weight"].shape == (width, 2 * width) and state["fc.bias"].shape == (width,)
    assert state["mlp.2.0.linear.weight"].shape == (width, 2 * width)
    assert state["mlp.2.5.linear.weight"].shape == (width, width) and state["mlp.2.5.linear.bias"].shape == (width,)
    assert "layers.0.input_layernorm.weight" not in state and "layers.1.input_layernorm.weight" in state
    # one parallel head, as the repository's modules compute it: torch's own linear layers by these names
    u = torch.randn(2 * width, dtype=torch.float64)
    y = torch.nn.functional.silu(state["mlp.1.0.linear.weight"].double() @ u + state["mlp.1.0.linear.bias"].double())
    for layer in range(1, 6):
        weight, bias = (state[f"mlp.1.{layer}.linear.{kind}"].double() for kind in ("weight", "bias"))
        y = y + torch.nn.functional.silu(weight @ y + bias)
    assert made.network.parallel is not None
    torch.testing.assert_close(made.network.parallel(u[None])[1, 0], y, rtol=1e-9, atol=1e-9)


def test_renamed_keys_and_a_config_elsewhere_are_read(tmp_path: Path) -> None:
    model = tiny()
    write_published(heads(model, **PLAIN), model, tmp_path)
    state = {
        name.replace("mlp.", "mlp.mlp.", 1) if name.startswith("mlp.") else name: x
        for name, x in read(tmp_path).items()
    }
    torch.save(state, tmp_path / FILE)
    config = tmp_path / "elsewhere.json"
    (tmp_path / "config.json").rename(config)
    settings = {**json.loads(config.read_text()), "rms_norm_eps": 1e-3}
    config.write_text(json.dumps(settings))
    assert read_published(tmp_path, model, config=config).config.epsilon == 1e-3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"feature_scale": 1.7}, "feature_scale must be 1"),
        ({"activation": "relu"}, "activation must be silu"),
        ({"mlp_width": 24}, "mlp_width must be"),
    ],
)
def test_what_the_layout_has_no_place_for_is_refused(tmp_path: Path, shape: dict[str, Any], message: str) -> None:
    model = tiny()
    with pytest.raises(QuickmergeError, match=message):
        write_published(heads(model, **{**PLAIN, **shape}), model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Runs:
    """A pickle that does something."""

    def __reduce__(self) -> Any:
        return print, ("it ran",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("fc.weight"), "must hold fc.weight"),
        (lambda state: state.pop("mlp.1.3.linear.bias"), "must hold mlp.1.3.linear.bias"),
        (lambda state: state.update(more=torch.zeros(1)), None),
        (lambda state: state.update({"layers.0.more": torch.zeros(1)}), "layers.0.more"),
        (
            lambda state: state.update({"embed_tokens.weight": torch.randn_like(state["embed_tokens.weight"])}),
            "another model",
        ),
        (lambda state: state.update({"fc.bias": torch.full_like(state["fc.bias"], torch.nan)}), "fc.bias"),
        (lambda state: state.update({"fc.bias": Runs()}), "can't be read"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, change: Any, message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny()
    write_published(heads(model, **PLAIN), model, tmp_path)
    state = read(tmp_path)
    change(state)
    torch.save(state, tmp_path / FILE)
    if message is None:
        read_published(tmp_path, model)
        return
    with pytest.raises(QuickmergeError, match=message):
        read_published(tmp_path, model)
    assert "it ran" not in capsys.readouterr().out
