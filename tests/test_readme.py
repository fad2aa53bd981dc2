"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_s_python_runs(smollm2: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 2
    # The second goes on from the first, and a fifth of the document must be more than its protected tokens.
    names = {"document": "The tide tables of the bay are printed every year in March. " * 12}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert "tokens in" in capsys.readouterr().out
    assert "quickmerge+prior" in names["run"].reducer.label  # type: ignore[attr-defined]


def test_the_readme_names_commands_that_exist() -> None:
    from quickmerge.cli import app

    text = README.read_text(encoding="utf-8")
    known = {str(c.name) for c in app.registered_commands} | {str(g.typer_instance.info.name) for g in
                                                               app.registered_groups if g.typer_instance}  # fmt: skip
    used = set(re.findall(r"^quickmerge (\w+)", text, flags=re.M))
    assert used and used <= known
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`", text):
        assert f"\n{target}:" in makefile
