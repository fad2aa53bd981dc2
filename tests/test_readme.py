"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_s_python_runs(smollm2: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 1
    document = "The tide tables of the bay are printed every year in March. " * 12
    exec(compile(blocks[0], str(README), "exec"), {"document": document})
    assert "tokens in" in capsys.readouterr().out


def test_the_readme_names_commands_that_exist() -> None:
    from quickmerge.cli import app

    text = README.read_text(encoding="utf-8")
    known = {str(c.name) for c in app.registered_commands}
    used = set(re.findall(r"^quickmerge (\w+)", text, flags=re.M))
    assert used and used <= known
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`", text):
        assert f"\n{target}:" in makefile
