"""Trained parts as folders: a pair that doesn't belong together is refused, whatever the part; hostile configs too."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import quickmerge as qm
from quickmerge.calm import CalmAutoencoder, CalmAutoencoderConfig
from quickmerge.data import GUMIHOS, PRIORS, shipped_gumiho, shipped_prior
from quickmerge.merge.prior import Prior
from quickmerge.merge.prior.config import PriorConfig
from quickmerge.merge.reducers.dynamicvit import DynamicViT, Predictor
from quickmerge.models.part import CONFIG, HASH, WEIGHTS, file_hash
from quickmerge.models.read import read_config, read_weights
from quickmerge.speculative.gumiho import Gumiho
from quickmerge.speculative.gumiho.config import GumihoConfig
from quickmerge.speculative.gumiho.network import GumihoNetwork


def prior(seed: int) -> Any:
    torch.manual_seed(seed)
    return Prior(PriorConfig(features=32, width=16, layers=1, heads=2, depths=(1,)))


def heads(seed: int) -> Any:
    torch.manual_seed(seed)
    shape = {
        "features": 16,
        "vocabulary": 97,
        "embedding": 16,
        "mlp_width": 16,
        "attention_heads": 2,
        "key_value_heads": 2,
        "head_width": 8,
        "inner": 24,
    }
    return Gumiho(GumihoNetwork(GumihoConfig(**shape, serial_layers=1, trained_for={"model": "x", "hash": "y"})))


def predictors(seed: int) -> Any:
    torch.manual_seed(seed)
    return DynamicViT(0.7, nn.ModuleList(Predictor(8) for _ in range(2)), (1, 2), {"hash": "y", "model": "x"})


def coder(seed: int) -> Any:
    torch.manual_seed(seed)
    return CalmAutoencoder(CalmAutoencoderConfig(vocab_size=50, patch=2, latent=4, width=8))


def read_coder(folder: Path) -> Any:
    model, lacking = read_weights(CalmAutoencoder, str(folder), read_config(str(folder)), {})
    assert not lacking
    return model


PARTS: dict[str, tuple[Callable[[int], Any], Callable[[Path], Any]]] = {
    "prior": (prior, Prior.from_pretrained),
    "heads": (heads, Gumiho.from_pretrained),
    "predictors": (predictors, DynamicViT.from_pretrained),
    "autoencoder": (coder, read_coder),
}
parts = pytest.mark.parametrize(("build", "load"), PARTS.values(), ids=PARTS)


@parts
def test_weights_of_another_part_are_refused_though_they_fit(tmp_path: Path, build: Any, load: Any) -> None:
    for seed in (0, 1):
        build(seed).save_pretrained(tmp_path / str(seed))
    load(tmp_path / "0")
    shutil.copy(tmp_path / "1" / WEIGHTS, tmp_path / "0" / WEIGHTS)
    with pytest.raises(qm.QuickmergeError, match="don't belong together"):
        load(tmp_path / "0")
    config = json.loads((tmp_path / "0" / CONFIG).read_text())
    for hashes, message in (({"../x": "a"}, "is missing"), ("abc", "must hold the hash"), ({WEIGHTS: 3}, "must hold")):
        (tmp_path / "0" / CONFIG).write_text(json.dumps({**config, HASH: hashes}))
        with pytest.raises(qm.QuickmergeError, match=message):
            load(tmp_path / "0")
    del config[HASH]  # as an earlier release wrote it
    (tmp_path / "0" / CONFIG).write_text(json.dumps(config))
    load(tmp_path / "0")


@parts
def test_saving_again_gives_the_hash_of_what_is_saved(tmp_path: Path, build: Any, load: Any) -> None:
    build(0).save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a")
    network = again if isinstance(again, nn.Module) else getattr(again, "network", getattr(again, "predictors", None))
    with torch.no_grad():
        next(network.parameters()).add_(1)
    for name in ("a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "notes.txt").write_text("mine")
        again.save_pretrained(tmp_path / name)
        load(tmp_path / name)
        assert (tmp_path / name / "notes.txt").read_text() == "mine"
        saved = json.loads((tmp_path / name / CONFIG).read_text())[HASH]
        assert saved == {WEIGHTS: file_hash(tmp_path / name / WEIGHTS)}


@parts
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(
    tmp_path: Path, build: Any, load: Any, dtype: torch.dtype
) -> None:
    build(0).save_pretrained(tmp_path)
    state = {name: value.to(dtype) for name, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(state, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(qm.QuickmergeError, match=r"weights must be one of|must be like"):
        load(tmp_path)


@parts
@pytest.mark.parametrize("value", [10**6, 10**9, 10**30, -1, 0, "x", None, [1], {}, 1e400, True])
def test_no_entry_of_a_config_builds_more_than_the_weights_hold(
    tmp_path: Path, build: Any, load: Any, value: Any
) -> None:
    build(0).save_pretrained(tmp_path)
    path = tmp_path / CONFIG
    config = json.loads(path.read_text())
    whole = load_state(load(tmp_path))
    for name in config:
        path.write_text(json.dumps({**config, name: value}))
        try:
            assert load_state(load(tmp_path)) == whole, name
        except qm.QuickmergeError as error:
            assert "\n" not in str(error)


def load_state(part: Any) -> list[tuple[int, ...]]:
    network = part if isinstance(part, nn.Module) else getattr(part, "network", getattr(part, "predictors", None))
    return [tuple(parameter.shape) for parameter in network.parameters()]


@parts
@pytest.mark.parametrize("given", ["", "a\0b", "~nobody-of-this-name/x", "x" * 5000])
def test_names_that_no_folder_has(given: str, build: Any, load: Any) -> None:
    if load is not read_coder:
        with pytest.raises(qm.QuickmergeError):
            load(given)


def test_shipped_parts_hold_the_hash_of_their_weights() -> None:
    for folder in (*map(shipped_prior, PRIORS), *map(shipped_gumiho, GUMIHOS)):
        assert folder is not None
        assert json.loads((folder / CONFIG).read_text())[HASH] == {WEIGHTS: file_hash(folder / WEIGHTS)}
