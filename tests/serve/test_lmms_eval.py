"""lmms-eval's own command line with our vision-language model; for environments in which lmms-eval is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlm_samples
from PIL import Image

import quickmerge as qm
from quickmerge.models import ask_inputs, load_vlm

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: see docs/doors/harness.md")

QUESTIONS = ("what is red ?", "is it left ?", "what is blue ?")
YAML = """
task: looks
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function looks.visual
doc_to_text: !function looks.text
doc_to_target: a
generation_kwargs: {{max_new_tokens: 6, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0}}]
"""
FUNCTIONS = """
def visual(doc):
    return [doc["image"].convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["q"]
"""
ENTRY = "[lmms_eval.models]\nquickmerge = quickmerge.serve.lmms_eval:manifest\n"


def shown(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a task with three images, and the metadata of an installed package that names our entry point."""
    import datasets

    place = tmp_path_factory.mktemp("lmms")
    vlm_samples.save(place / "vlm")
    rows = [{"image": shown(i), "q": question, "a": "red"} for i, question in enumerate(QUESTIONS)]
    kinds = {"image": datasets.Image(), "q": datasets.Value("string"), "a": datasets.Value("string")}
    datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).to_parquet(place / "test.parquet")
    (place / "tasks").mkdir()
    (place / "tasks" / "looks.yaml").write_text(YAML.format(file=place / "test.parquet"))
    (place / "tasks" / "looks.py").write_text(FUNCTIONS)
    info = place / "entry" / "quickmerge_door-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quickmerge-door\nVersion: 0\n")
    (info / "entry_points.txt").write_text(ENTRY)
    return place


def asked(place: Path, out: Path, *model_args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(place / "entry"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home")}
    args = ",".join([f"pretrained={place / 'vlm'}", *model_args])
    return subprocess.run(
        [sys.executable, "-m", "lmms_eval", "--model", "quickmerge", "--model_args", args, "--tasks", "looks",
         "--include_path", str(place / "tasks"), "--batch_size", "1", "--output_path", str(out), "--log_samples"],
        capture_output=True, text=True, check=False, timeout=500, env=env,
    )  # fmt: skip


def texts(place: Path, recipe: qm.Recipe) -> list[str]:
    """What a user gets who applies the recipe and generates."""
    model, processor = load_vlm(place / "vlm", progress=False)
    found = []
    for i, question in enumerate(QUESTIONS):
        inputs = ask_inputs(processor, [shown(i)], question)
        with torch.inference_mode(), qm.apply(model, recipe):
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=1)
        new = out[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(new, skip_special_tokens=True))
    return found


def answers(out: Path) -> tuple[list[str], dict[str, Any]]:
    (samples,), (results,) = list(out.rglob("*samples*.jsonl")), list(out.rglob("*results.json"))
    rows: Sequence[dict[str, Any]] = [json.loads(line) for line in samples.read_text().splitlines()]
    return [row["filtered_resps"] for row in sorted(rows, key=lambda r: r["doc_id"])], json.loads(results.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "recipe"), [((), qm.Recipe()), (("visual=scope", "keep=0.5"), qm.Recipe(visual=qm.SCOPE(keep=0.5)))]
)
def test_texts_are_those_of_the_applied_recipe(
    place: Path, tmp_path: Path, args: tuple[str, ...], recipe: qm.Recipe
) -> None:
    done = asked(place, tmp_path, *args)
    assert done.returncode == 0, done.stderr
    found, results = answers(tmp_path)
    assert found == texts(place, recipe)
    told = json.dumps(results)
    assert "quickmerge_prefill_seconds" in told and "quickmerge_cache_bytes" in told


@pytest.mark.slow
def test_what_was_given_wrongly_is_told(place: Path, tmp_path: Path) -> None:
    for args, said in (
        (("visul=scope",), "model_args has the unknown name 'visul'"),
        (("keep=0.5",), "keep is for a reducer: give visual=scope"),
        (("visual=scop", "keep=0.5"), "did you mean 'scope'"),
    ):
        done = asked(place, tmp_path, *args)
        assert said in done.stdout + done.stderr
