"""The README's Python runs as it stands."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import scene_samples
import torch
import vlm_samples
from PIL import Image

README = Path(__file__).parents[1] / "README.md"


def python_of_readme() -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 10
    return blocks


@pytest.mark.slow
def test_the_readme_s_vision_runs() -> None:
    """Slow for its download of 90 MB."""
    names: dict[str, Any] = {"qm": importlib.import_module("quickmerge"), "image": Image.new("RGB", (300, 260), "teal")}
    exec(compile(python_of_readme()[4], str(README), "exec"), names)
    assert names["features"].shape == (1, 257 - 12 * 16, 384)
    assert names["run"].summary().tokens_per_block[-1] == 65


def test_the_readme_s_python_runs(smollm2: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [python_of_readme()[i] for i in (0, 1, 2, 3, 7, 8, 9)]
    # The others go on from the first, and a fifth of the document must be more than its protected tokens.
    names = {"document": "The tide tables of the bay are printed every year in March. " * 12}
    labels = []
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        labels.append(getattr(getattr(names.get("run"), "reducer", None), "label", None))
    assert "tokens in" in capsys.readouterr().out
    assert labels[3] == "quickmerge+prior"
    assert list(names["run"].summary().of) == ["merge", "attention", "decoding"]  # type: ignore[attr-defined]


def test_the_readme_s_visual_tokens_and_recognition_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {
        "qm": importlib.import_module("quickmerge"),
        "folder": vlm_samples.save(tmp_path / "vlm"),
        "image": Image.new("RGB", (40, 40), "teal"),
        "prompt": "user : <image> what is it ?",
        "images": torch.rand(2, 3, 40, 48),
    }
    scene_samples.small_recognizer().save_pretrained(tmp_path / "runs" / "recognizer")
    monkeypatch.chdir(tmp_path)
    for block in python_of_readme()[5:7]:
        exec(compile(block, str(README), "exec"), names)
    assert len(names["recognizer"].recognize(names["recognizer"].prepare(names["images"]))) == 2


def test_the_readme_names_commands_and_options_that_exist() -> None:
    from typer.main import get_command

    from quickmerge.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    lines = re.findall(r"^quickmerge (.+)", text := README.read_text(encoding="utf-8"), flags=re.M)
    assert len(lines) > 20
    for line in lines:
        first, second, *_ = [*line.split(), ""]
        found = commands[first]
        found = found.commands[second] if hasattr(found, "commands") else found
        known = {option for param in found.params for option in (*param.opts, *param.secondary_opts)}
        assert set(re.findall(r"(?<= )--[\w-]+", line)) <= known, line
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`", text):
        assert f"\n{target}:" in makefile
