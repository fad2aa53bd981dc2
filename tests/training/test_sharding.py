"""Frozen bases that are sharded by FSDP2, in two real processes, or spread by a device_map: the same training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched_sharded import Windows, language_model
from safetensors.torch import load_file
from training_samples import Points, Small, lines, settings
from transformers import AutoModelForCausalLM

import quickmerge
from quickmerge.errors import QuickmergeError
from quickmerge.merge.prior.train_text import train_prior_text
from quickmerge.models.identity import model_hash
from quickmerge.training import TrainingConfig, train

SCRIPT = str(Path(__file__).parents[1] / "samples" / "launched_sharded.py")
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": os.pathsep.join(
        [str(Path(quickmerge.__file__).parents[1]), *(str(Path(__file__).parents[1] / n) for n in ("", "samples"))]
    ),
}  # fmt: skip
RUNS = ("prior", "heads", "predictors")
SHARDED = [
    "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip
WHOLE = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def launch(folder: Path, *words: str, shards: bool = False) -> None:
    folder.mkdir()
    command = [sys.executable, "-m", *(SHARDED if shards else WHOLE), SCRIPT, str(folder), "2", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same trainings: by one process, by two, by two that shard, and by two that shard and are stopped."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "one").mkdir()
    subprocess.run(
        [sys.executable, SCRIPT, str(folder / "one"), "4"],
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
        timeout=300,
    )
    launch(folder / "two")
    launch(folder / "sharded", "reduce", shards=True)
    launch(folder / "stopped", "stop", shards=True)
    return folder


def told(folder: Path) -> list[dict[str, dict[str, int]]]:
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(2)]


def trained(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "checkpoints" / "step-000006" / "model.safetensors")


@pytest.mark.slow
def test_each_of_two_processes_holds_half_of_the_blocks(runs: Path) -> None:
    for each in told(runs / "sharded"):
        for name in RUNS:
            counts = each[name]
            assert counts["split"] > counts["all"] / 2
            assert counts["held"] == counts["all"] - counts["split"] // 2
    assert all(each[name]["split"] == 0 for each in told(runs / "two") for name in RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_sharding_changes_no_bit(runs: Path, name: str) -> None:
    whole, split = trained(runs / "two", name), trained(runs / "sharded", name)
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[key], split[key]) for key in whole)
    assert lines(runs / "two" / name) == lines(runs / "sharded" / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_that_shard_equal_one_with_twice_the_batch(runs: Path, name: str) -> None:
    alone, split = trained(runs / "one", name), trained(runs / "sharded", name)
    for key, value in alone.items():
        torch.testing.assert_close(split[key], value, atol=2e-5, rtol=1e-4)
    for one, two in zip(lines(runs / "one" / name), lines(runs / "sharded" / name), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_run_resumes_exactly(runs: Path, name: str) -> None:
    whole, stopped = trained(runs / "sharded", name), trained(runs / "stopped", name)
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    assert lines(runs / "sharded" / name) == lines(runs / "stopped" / name)


@pytest.mark.slow
def test_a_sharded_model_is_merged_as_a_whole_one(runs: Path) -> None:
    for each in told(runs / "sharded"):
        by_shards, by_whole = each["reduced"]
        assert by_shards == by_whole and len(by_whole) == 8


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "this training has none"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for version 1: launch it with --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "offloads no parameters"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed"),
    ],
)
def test_other_sharding_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(QuickmergeError, match=words):
        train(Small(), Points(), settings(), tmp_path)


def prior(model: object, out: Path) -> None:
    train_prior_text(
        model, Windows(), TrainingConfig(steps=3, batch=2, learning_rate=1e-3, log_every=1), out, name="tiny",  # type: ignore[arg-type]
        keeps=[0.3, 0.4], layer=1, context=90, reducer={"layers": 1, "window": 8, "pool": 1}, temperature=(0.0, 0.0),
        width=16, heads=2,
    )  # fmt: skip


def test_a_base_that_a_device_map_has_spread_trains_the_same(tmp_path: Path) -> None:
    """On this machine the second place can only be the disk."""
    language_model().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=tmp_path / "aside", dtype=torch.float32
    ).eval()
    assert any(each.is_meta for each in spread.parameters())
    assert model_hash(spread) == model_hash(language_model())
    prior(spread, tmp_path / "spread")
    prior(language_model(), tmp_path / "whole")
    assert lines(tmp_path / "spread") == lines(tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("spread", "whole"))
    assert all(torch.equal(one[key], two[key]) for key in two)
