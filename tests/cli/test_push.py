"""``quickmerge push``, and commands that take an id of the hub where a folder would do; by a stand-in of the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calm_bench_samples import save, texts, tiny_calm, tiny_discrete
from hub_samples import MAKE, OPEN, push, same
from hub_server import Hub, hub_at
from scene_samples import small_recognizer, write_scenes

import quickmerge as qm
from quickmerge.merge.reducers.dynamicvit import Predictor
from quickmerge.models import load
from quickmerge.models.kinds import KINDS


def bench_calm(run: Any, models: str, folder: Path) -> Any:
    """Measure CALMs on the text in a folder, the results beside it."""
    return run(
        "bench", "calm", "--model", models, "--text", folder / "a.txt", "--context", 48, "--limit", 6, "--samples", 4,
        "--batch", "", "--json", folder / "b.json",
    )  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_at(monkeypatch, str(tmp_path / "cache")) as hub:
        yield hub


def saved(kind: str, folder: Path) -> Any:
    thing = MAKE[kind]()
    thing.save_pretrained(folder)
    if kind == "calm":
        from calm_samples import words_tokenizer

        words_tokenizer().save_pretrained(folder)
    return thing


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_sent_as_it_is(kind: str, run: Any, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "thing"
    thing = saved(kind, folder)
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 0.51234}\n')
    (folder / "checkpoints" / "step-000005").mkdir(parents=True)
    (folder / "checkpoints" / "step-000005" / "model.safetensors").write_bytes(b"x")
    code, out, err = run(
        "push", folder, "ann/thing", "--private", "--license", "mit", "--command", "quickmerge train it"
    )
    assert code == 0, err
    assert out.startswith(f"{hub.url}/ann/thing/commit/") and hub.repositories["ann/thing"].private
    sent = hub.files("ann/thing")
    assert "metrics.jsonl" not in sent and not [name for name in sent if name.startswith("checkpoints")]
    text = sent["README.md"].decode()
    assert "license: mit" in text and "step 5, loss 0.5123" in text and "```bash\nquickmerge train it\n```" in text
    assert same(OPEN[kind]("ann/thing"), thing)
    assert f"sent {KINDS[kind].name}: {len(sent) - 2} files and a card" in err


def test_a_dry_run_sends_nothing_and_needs_no_token(
    run: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    qm.Recipe(merge=qm.QuickMerge(keep=0.4), decoding=qm.PromptLookup()).save_pretrained(tmp_path / "recipe")
    code, out, err = run(
        "push", tmp_path / "recipe", "ann/recipe", "--dry-run", "--model", "smollm2-135m", "--tokens", 4096
    )
    assert code == 0, err
    assert out.startswith("recipe.json  ") and "- **merge**, the text: `QuickMerge(keep=0.4)`" in out
    assert "cache: 100.8 MiB of 180.0 MiB" in out and 'qm.Recipe.from_pretrained("ann/recipe")' in out
    assert not hub.asked


def test_a_benchmarks_json_stands_on_the_card(run: Any, hub: Hub, tmp_path: Path) -> None:
    """The real file of a real benchmark, with its intervals and its environment."""
    saved("prior", tmp_path / "prior")
    for name in ("two", "plain"):
        save(tiny_calm(2) if name == "two" else tiny_discrete(), tmp_path / name)
    (tmp_path / "a.txt").write_text(texts(1, 80)[0])
    code, _, err = bench_calm(run, f"{tmp_path / 'two'},{tmp_path / 'plain'}", tmp_path)
    assert code == 0, err
    code, _, err = run("push", tmp_path / "prior", "ann/prior", "--results", tmp_path / "b.json")
    assert code == 0, err
    text = hub.files("ann/prior")["README.md"].decode()
    row = json.loads((tmp_path / "b.json").read_text())["rows"][0]
    ends = f"{row['brier_lm']:.4g} ({row['brier_lm_low']:.4g} to {row['brier_lm_high']:.4g})"
    assert ends in text and f"torch {torch.__version__}" in text.replace("\\", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere", "ann/x"], "FOLDER must be one in which quickmerge has saved one of a recipe, a prior, "),
        (
            ["prior", "ann/x", "--model", "smollm2-135m"],
            "--model is for a recipe, whose effect on it is told, got a prior",
        ),
        (["prior", "ann/x", "--tokens", "9"], "--tokens is the length of a prompt of --model: give --model too"),
        (["prior", "x"], "repo_id must be an id of the hub, owner/name, got 'x'"),
        (["prior", "ben/x"], "ben/x can't be written with this token (You don't have the rights"),
        (["prior", "ann/x", "--results", "none.json"], "results must be a file of JSON that there is, got none.json"),
        (["prior", "ann/x", "--create-pr", "--revision", "a"], "revision must be left out with create_pr"),
        (["broken", "ann/x"], "don't belong together"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    args: list[str], message: str, run: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved("prior", tmp_path / "prior")
    shutil.copytree(tmp_path / "prior", tmp_path / "broken")
    data = bytearray((tmp_path / "broken" / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "broken" / "model.safetensors").write_bytes(data)
    code, out, err = run("push", *args)
    assert code == 2 and out == "" and message in err, err
    assert len(err.splitlines()) == 1 and not hub.repositories


def test_no_token_and_no_network(run: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("prior", tmp_path / "prior")
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = run("push", tmp_path / "prior", "ann/x")
    assert code == 2 and "ann/x can't be written without a token of its owner: run hf auth login" in err
    monkeypatch.setenv("HF_TOKEN", "hf_ann")
    hub.stop()
    code, _, err = run("push", tmp_path / "prior", "ann/x")
    assert code == 2 and "can't be reached" in err and len(err.splitlines()) == 1


# Commands that take an id -------------------------------------------------------------------------------------------


@pytest.fixture
def document(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("the sea " * 12)
    return tmp_path / "a.txt"


def test_recipe_takes_an_id(run: Any, hub: Hub, tiny_folder: Path, document: Path, tmp_path: Path) -> None:
    recipe = qm.Recipe(
        merge=qm.Merge(qm.QuickMerge(0.5, pool=1), 1, qm.Prefix(min_tokens=0)), decoding=qm.PromptLookup()
    )
    recipe.push_to_hub("ann/recipe")
    recipe.save_pretrained(tmp_path / "recipe")
    options = ["--model", tiny_folder, "--max-new-tokens", 6]
    code, out, err = run("generate", "text", document, "--prompt", "the sea", "--recipe", "ann/recipe", *options)
    assert code == 0, err
    assert out == run("generate", "text", document, "--prompt", "the sea", "--recipe", tmp_path / "recipe", *options)[1]
    code, out, err = run("recipe", "show", "ann/recipe", "--model", tiny_folder, "--tokens", 64)
    assert code == 0 and "PromptLookup (lossless)" in out, err
    code, out, err = run("recipe", "check", "ann/recipe", "--model", tiny_folder)
    assert code == 0 and out.startswith("ann/recipe fits "), err


def test_drafter_takes_an_id(run: Any, hub: Hub, tiny_folder: Path, document: Path) -> None:
    model = load(str(tiny_folder), progress=False)[0]
    torch.manual_seed(0)
    qm.Gumiho.new(model, serial=1, serial_layers=1, heads=2, mlp_depth=2).push_to_hub("ann/heads")
    base = ["generate", "text", document, "--prompt", "the sea", "--model", tiny_folder, "--max-new-tokens", 6]
    code, out, err = run(*base, "--drafter", "ann/heads:beam=2")
    assert code == 0, err
    assert out.splitlines()[0] == run(*base)[1].splitlines()[0]
    code, _, err = run(*base, "--drafter", "ann/never")
    assert code == 2 and "the hub has no ann/never that can be seen with this token" in err
    code, _, err = run(*base, "--prior", "ann/heads")
    assert (
        code == 2 and "ann/heads on the hub holds draft heads, where a prior must be: quickmerge.Gumiho opens it" in err
    )


def test_prior_takes_an_id(run: Any, hub: Hub, tiny_folder: Path, document: Path, tmp_path: Path) -> None:
    """Fetched and opened: what refuses it is that it was trained for other layers."""
    thing = saved("prior", tmp_path / "prior")
    thing.push_to_hub("ann/prior")
    base = ["generate", "text", document, "--prompt", "the sea", "--model", tiny_folder, "--layer", "1",
            "--min-tokens", "0"]  # fmt: skip
    code, out, err = run(*base, "--prior", "ann/prior")
    assert (code, out, err) == run(*base, "--prior", tmp_path / "prior")


def test_recognize_takes_an_id(run: Any, hub: Hub, tmp_path: Path) -> None:
    small_recognizer().push_to_hub("ann/recognizer")
    image = next(write_scenes(tmp_path / "scenes").rglob("*.png"))
    small_recognizer().save_pretrained(tmp_path / "recognizer")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    code, out, err = run("recognize", image, "--model", "ann/recognizer", "--labels", tmp_path / "labels.txt")
    assert code == 0 and "cat" in out, err
    assert out == run("recognize", image, "--model", tmp_path / "recognizer", "--labels", tmp_path / "labels.txt")[1]
    code, _, err = run("recognize", image, "--model", "ann/never")
    assert code == 2 and "which must name a recognizer" in err


def test_calm_commands_take_an_id(run: Any, hub: Hub, tmp_path: Path) -> None:
    push("calm", MAKE["calm"](), "ann/calm")
    code, out, err = run("generate", "calm", "--model", "ann/calm", "--prompt", "w6 w7", "--max-new-tokens", 6)
    assert code == 0 and out.startswith("w6 w7"), err
    saved_at = save(tiny_calm(2), tmp_path / "two")
    code, _, err = run("push", saved_at, "ann/two")
    assert code == 0, err
    (tmp_path / "a.txt").write_text(texts(1, 80)[0])
    code, out, err = bench_calm(run, f"ann/two,here={saved_at}", tmp_path)
    assert code == 0, err
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["two", "here"] and rows[0]["brier_lm"] == rows[1]["brier_lm"]


def test_dynamicvit_takes_an_id(run: Any, hub: Hub, classifier: Path, photos: Path, tmp_path: Path) -> None:
    import vision_samples

    torch.manual_seed(0)
    width = vision_samples.SIZE["hidden_size"]
    folder = tmp_path / "dvit"
    qm.DynamicViT(0.5, torch.nn.ModuleList([Predictor(width)]), (1,)).save_pretrained(folder)
    shutil.copytree(classifier, folder / "backbone")
    code, _, err = run("push", folder, "ann/dvit")
    assert code == 0, err
    assert "backbone/model.safetensors" in hub.files("ann/dvit")
    code, _, err = run(
        "bench",
        "image",
        photos,
        "--model",
        classifier,
        "--dynamicvit",
        "ann/dvit",
        "--reducer",
        "random",
        "--flops",
        "0.7",
        "--limit",
        4,
        "--rounds",
        2,
        "--json",
        tmp_path / "b.json",
    )
    assert code == 0, err
    assert any("dynamicvit" in row["method"] for row in json.loads((tmp_path / "b.json").read_text())["rows"])


# The program itself -------------------------------------------------------------------------------------------------


def program(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quickmerge", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, **environment}
    )


def test_the_program_sends_fetches_and_goes_on_offline(hub: Hub, tmp_path: Path) -> None:
    MAKE["recipe"]().save_pretrained(tmp_path / "recipe")
    qm.Recipe(merge=qm.QuickMerge(keep=0.4)).save_pretrained(tmp_path / "plain")
    done = program("push", tmp_path / "plain", "ann/plain")
    assert done.returncode == 0 and done.stdout.startswith(f"{hub.url}/ann/plain/commit/"), done.stderr
    done = program("recipe", "show", "ann/plain", "--tokens", 4096)
    assert done.returncode == 0 and "merge: quickmerge keep 0.4 (lossy)" in done.stdout, done.stderr
    asked = len(hub.asked)
    again = program("recipe", "show", "ann/plain", "--tokens", 4096, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, done.stdout) and len(hub.asked) == asked
    done = program("recipe", "show", "ann/never", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "was not fetched before, which HF_HUB_OFFLINE asks for" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_program_sends_each_kind_and_another_process_opens_it(kind: str, hub: Hub, tmp_path: Path) -> None:
    saved(kind, tmp_path / "thing")
    done = program("push", tmp_path / "thing", "ann/thing")
    assert done.returncode == 0, done.stderr
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from hub_samples import MAKE, OPEN, same\n"
        "kind = sys.argv[3]\n"
        "assert same(OPEN[kind]('ann/thing'), MAKE[kind]())\n"
    )
    here = Path(__file__).parents[1]
    for offline in ("0", "1"):
        again = subprocess.run(
            [sys.executable, "-c", code, str(here), str(here / "samples"), kind],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": offline},
        )
        assert again.returncode == 0, again.stderr
