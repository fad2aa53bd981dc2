"""Saving and loading: bit for bit, whole or not at all, and clear about what is no recognizer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_zoo
from recognition_samples import PROMPT, build, pieces
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from quickmerge.errors import QuickmergeError
from quickmerge.recognition import Recognizer, store

PARTS = {"config.json", "model.safetensors", "vision", "language", "tokenizer"}


def same(a: Recognizer, b: Recognizer) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


@pytest.mark.parametrize(
    ("family", "eye", "dtype"),
    [
        ("llama", "vit", torch.float32),
        ("qwen2", "dinov2", torch.bfloat16),
        ("gemma3_text", "siglip", torch.float32),
        ("gpt_neox", "clip", torch.float32),
        ("smollm3", "dinov2-registers", torch.float32),
    ],
)
def test_a_loaded_recognizer_is_the_saved_one(family: str, eye: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tokenizer = pieces("bytes")
    recognizer = build(
        family, eye, dtype=dtype, blocks=3, tokenizer=tokenizer, layers=(4, 2), mask="prefix", separator=";"
    )
    recognizer.save_pretrained(tmp_path / "new" / "folder")
    loaded = Recognizer.from_pretrained(tmp_path / "new" / "folder")
    assert same(recognizer, loaded) and loaded.config == recognizer.config and not loaded.training
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in recognizer.parameters()]
    assert (
        loaded.labels.ids("red car") == recognizer.labels.ids("red car") and loaded.labels.sep == recognizer.labels.sep
    )
    files = {path.suffix for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert files <= {".json", ".safetensors", ".jinja"}, "nothing that would have to be unpickled"
    if dtype != torch.float32:  # the zoo has put tables of angles, which are not saved, into half precision too
        return
    images = torch.rand(2, 3, 48, 48)
    assert loaded.recognize(images) == recognizer.recognize(images)
    assert loaded.recognize(images, labels=["cat", "dog"]) == recognizer.recognize(images, labels=["cat", "dog"])


def test_the_encoder_of_a_classifier_has_no_pooler_and_is_loaded_all_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = AutoModelForImageClassification.from_config(vision_zoo.build("vit").config)
    like = build(dtype=torch.float32)
    made = Recognizer.new(
        classifier, like.language, like.labels.tokenizer, blocks=1, prompt=PROMPT, image_size=vision_zoo.IMAGE
    )
    made.save_pretrained(tmp_path)
    assert same(made, Recognizer.from_pretrained(tmp_path))


def test_saving_again_replaces_the_recognizer_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}")
    first, second = build(dtype=torch.float32), build("qwen2", "dinov2", dtype=torch.float32, seed=1)
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path)
    assert same(second, Recognizer.from_pretrained(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*PARTS, "metrics.jsonl"}


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(dtype=torch.float32)
    first.save_pretrained(tmp_path)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(QuickmergeError, match=r"can't be written \(No space left on device\)"):
        build(dtype=torch.float32, seed=1).save_pretrained(tmp_path)
    assert same(first, Recognizer.from_pretrained(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == PARTS


def test_a_kill_while_parts_are_moved_leaves_the_new_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "vision" / "notes.txt").write_text("mine")
    (tmp_path / "language" / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier one")
    second, move = build(dtype=torch.float32, seed=1), os.replace

    def killed(source: Path, target: Path) -> None:
        if target == tmp_path / "language" / "model.safetensors":
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        second.save_pretrained(tmp_path)
    assert same(second, Recognizer.from_pretrained(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == PARTS
    assert (tmp_path / "vision" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "language" / "model-00001-of-00002.safetensors").exists()


def change(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def spoil(kind: str, folder: Path) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no language":
        (folder / "language" / "model.safetensors").unlink()
    elif kind == "no vision":
        (folder / "vision" / "config.json").unlink()
    elif kind == "no tokenizer":
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    elif kind == "language cut":
        path = folder / "language" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
    elif kind in ("nan", "shape", "name"):
        own = load_file(weights)
        boundary = own.pop("boundary")
        new = {"nan": boundary * float("nan"), "shape": boundary[1:], "name": boundary}[kind]
        save_file({**own, "bounds" if kind == "name" else "boundary": new}, weights)
    elif kind == "config":
        config.write_text("{")
    elif kind == "llama":
        config.write_text((folder / "language" / "config.json").read_text())
    elif kind == "list":
        config.write_text("[]")
    elif kind == "entry":
        change(config, colour="red")
    elif kind == "setting":
        change(config, mask="none")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", r"model.safetensors is damaged"),
        ("no weights", r"model.safetensors is missing: train or copy"),
        ("no language", "language has a config.json but no weights"),
        ("no vision", "vision is not a model folder"),
        ("no tokenizer", r"tokenizer holds no tokenizer that can be read"),
        ("language cut", r"language.model.safetensors is damaged"),
        ("nan", "boundary holds values that are not finite"),
        ("shape", r"boundary does not fit config.json"),
        ("name", r"bound\w+ does not fit config.json"),
        ("config", r"config.json is damaged .it must be JSON"),
        ("llama", r"holds a recognizer, but .*config.json is of llama: `quickmerge train recognizer` makes one"),
        ("list", "it must hold an object, got list"),
        ("entry", "is of another release of quickmerge or damaged: it has the unknown entry colour"),
        ("setting", "config.json is damaged: mask must be one of"),
    ],
)
def test_a_damaged_folder_is_told_in_one_sentence(kind: str, message: str, tmp_path: Path) -> None:
    build(dtype=torch.float32).save_pretrained(tmp_path)
    spoil(kind, tmp_path)
    with pytest.raises(QuickmergeError, match=message) as caught:
        Recognizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_folders_of_something_else_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        QuickmergeError, match=r"model must be a folder that holds a recognizer, but there is no .*config"
    ):
        Recognizer.from_pretrained(tmp_path)
    with pytest.raises(QuickmergeError, match=r"got .*nowhere, which is none"):
        Recognizer.from_pretrained(tmp_path / "nowhere")
