from __future__ import annotations

import json
from pathlib import Path

from quickmerge.models.families import proven, rows


def test_ls_models_prints_what_was_proven_of_every_family(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("ls", "models", "--json", tmp_path / "models.json")
    assert code == 0
    assert out.index("llama") < out.index("qwen3_5_text") < out.index("deepseek_v3")
    assert f"prefix works for {len(proven('prefix'))}" in " ".join(out.split())
    assert json.loads((tmp_path / "models.json").read_text(encoding="utf-8"))["models"] == rows()


def test_ls_lists_models_or_everything(run) -> None:
    code, _, err = run("ls", "nonsense")
    assert code == 2 and "must be models, or be left out, got 'nonsense'" in " ".join(err.split())
    code, out, _ = run("ls")
    assert code == 0 and "quickmerge ls models" in out and "gpt_oss" in out
