"""``quickmerge package``: what lies in the folder, what is refused, and that nothing half-written stays."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from gumiho_samples import heads
from recipe_samples import prior
from stock_server import environment, talker

import quickmerge as qm
from quickmerge.serve.package import package

RECIPE = qm.Recipe(merge=qm.QuickMerge(keep=0.4))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(tmp_path_factory.mktemp("models") / "talker")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_folder_is_the_models_own_with_a_recipe_a_card_and_a_few_lines(model: Path, tmp_path: Path) -> None:
    (model / "notes.bin").write_bytes(b"not the model's")
    done = package(model, RECIPE, tmp_path / "out", progress=False)
    own = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    added = ["README.md", "custom_generate/generate.py", "custom_generate/requirements.txt", "recipe/recipe.json"]
    assert files(done.folder) == sorted([*own, "chat_template.jinja", *added])
    assert qm.Recipe.from_pretrained(done.folder / "recipe") == RECIPE
    assert (done.model, done.weights) == ("LlamaForCausalLM", (model / "model.safetensors").stat().st_size)
    code = (done.folder / "custom_generate" / "generate.py").read_text()
    assert "pip install quickmerge" in code and len(code.splitlines()) < 10
    card = (done.folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "transformers" and "custom_generate" in head["tags"]
    assert RECIPE.label in card and "transformers serve out --trust-remote-code" in card


def test_weights_are_linked_or_copied_as_asked(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    mode = weights.stat().st_mode
    hard = package(model, RECIPE, tmp_path / "auto", progress=False)
    assert hard.linked == "hard" and (hard.folder / weights.name).samefile(weights)
    assert weights.stat().st_mode == mode  # which a link shares
    symbolic = package(model, RECIPE, tmp_path / "symbolic", link="symbolic", progress=False)
    assert symbolic.linked == "symbolic" and (symbolic.folder / weights.name).readlink() == weights.resolve()
    copy = package(model, RECIPE, tmp_path / "copy", link="copy", progress=False)
    assert copy.linked == "copy" and not (copy.folder / weights.name).samefile(weights)
    assert (copy.folder / weights.name).read_bytes() == weights.read_bytes()


def test_where_no_hard_link_can_be_made_it_is_symbolic_or_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def far(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", far)
    assert package(model, RECIPE, tmp_path / "auto", progress=False).linked == "symbolic"
    with pytest.raises(qm.QuickmergeError, match=r"link must be symbolic or copy for .*can't be a hard link"):
        package(model, RECIPE, tmp_path / "hard", link="hard", progress=False)
    assert not (tmp_path / "hard").exists()


def test_programs_beside_a_model_are_not_taken_along(model: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in model.iterdir():
        (theirs / path.name).write_bytes(path.read_bytes())
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}}))
    (theirs / "evil.py").write_text("raise SystemExit(7)")
    (theirs / "README.md").write_text("---\nlicense: apache-2.0\nextra: [1]\n---\nwords")
    done = package(theirs, RECIPE, tmp_path / "out", progress=False)
    assert "evil.py" not in files(done.folder) and "auto_map" not in (done.folder / "config.json").read_text()
    assert yaml.safe_load((done.folder / "README.md").read_text().split("---\n")[1])["license"] == "apache-2.0"
    (theirs / "custom_generate").mkdir()
    with pytest.raises(qm.QuickmergeError, match="no way to generate of its own"):
        package(theirs, RECIPE, tmp_path / "other", progress=False)


# What is refused, in one sentence and before anything is written ------------------------------------------------------


def test_a_recipe_for_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    for recipe, why in (
        (prior(), "prior|features"),
        (qm.Recipe(merge=qm.Merge(qm.QuickMerge(), layer=40)), "layer"),
        (qm.Recipe(visual=qm.SCOPE()), "visual must be left out for LlamaForCausalLM, a language model"),
        (qm.Recipe(), "recipe must do something"),
    ):
        with pytest.raises(ValueError, match=why):
            package(model, recipe, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()


def test_heads_of_another_model_are_refused(model: Path, tmp_path: Path) -> None:
    made = heads(hf.AutoModelForCausalLM.from_pretrained(talker(tmp_path / "other", seed=1)))
    made.network.float()
    with pytest.raises(qm.QuickmergeError, match="trained for another model"):
        package(model, qm.Recipe(decoding=made), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_told_at_once(model: Path, tmp_path: Path) -> None:
    protected = qm.Recipe(merge=qm.Merge(qm.QuickMerge(), mode=qm.Prefix(protect=lambda ids: ids > 0)))
    with pytest.raises(qm.QuickmergeError, match=r"merge\.mode\.protect must be None to be saved"):
        package(model, protected, tmp_path / "out", progress=False)


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(qm.QuickmergeError, match=r"out can't be written \(No space left on device\)"):
        package(model, RECIPE, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_wrote_and_what_is_wrong(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quickmerge.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quickmerge", "package", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    out = tmp_path / "out"
    code, printed, err = run("--model", model, "--keep", 0.3, "--drafter", "lookup", "--out", out, "--copy")
    assert code == 0, err
    assert "quickmerge keep 0.3 + PromptLookup()" in printed and "weights as copies" in printed
    made = qm.Recipe.from_pretrained(out / "recipe")
    assert made == qm.Recipe(merge=qm.QuickMerge(keep=0.3), decoding=qm.PromptLookup())
    RECIPE.save_pretrained(tmp_path / "recipe")
    (tmp_path / "file").write_text("")
    for words, why in (
        (["--model", model, "--out", out], "out must be a folder that is new or empty, and there are files in"),
        (["--model", model, "--out", tmp_path / "file"], "which is a file"),
        (["--model", model, "--out", tmp_path / "file" / "x"], "Not a directory"),
        (["--model", "nobody/nothing", "--out", tmp_path / "new"], "the hub has no model 'nobody/nothing'"),
        (["--model", tmp_path / "none", "--out", tmp_path / "new"], "there is no folder"),
        (["--model", model, "--out", tmp_path / "new", "--recipe", tmp_path / "none"], "recipe must be a folder"),
        (["--model", model, "--out", tmp_path / "new", "--recipe", tmp_path / "recipe", "--keep", 0.2], "--keep"),
        (
            ["--model", model, "--out", tmp_path / "new", "--link", "soft"],
            "--link must be hard or symbolic, got 'soft'",
        ),
        (["--model", model, "--out", tmp_path / "new", "--link", "hard", "--copy"], "--link hard must be left out"),
        (["--model", model, "--out", tmp_path / "new", "--keep", 2], "--keep must be a number in"),
    ):
        code, printed, err = run(*words)
        assert code == 2 and printed == "" and why in err and "Traceback" not in err, (words, err)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_may_not_be_written_is_told(model: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        folder = Path("/proc/quickmerge")
    else:
        (tmp_path / "shut").mkdir(mode=0o500)
        folder = tmp_path / "shut" / "out"
    with pytest.raises(qm.QuickmergeError, match="can't be written"):
        package(model, RECIPE, folder, progress=False)


def test_without_quickmerge_one_sentence_says_how_to_install_it(model: Path, tmp_path: Path) -> None:
    """A program's imports are looked up by transformers before it runs it."""
    package(model, RECIPE, tmp_path / "out", progress=False)
    hidden = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'quickmerge':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", hidden], env=environment(), capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 1 and "pip install quickmerge" in done.stderr.splitlines()[-1]


def test_weights_are_what_the_plain_model_has(model: Path, tmp_path: Path) -> None:
    done = package(model, RECIPE, tmp_path / "out", progress=False)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():  # without trust_remote_code it is the plain model
        plain, other = (hf.AutoModelForCausalLM.from_pretrained(each)(ids).logits for each in (model, done.folder))
    assert torch.equal(plain, other)
