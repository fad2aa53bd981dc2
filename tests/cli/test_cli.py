"""The command line on a tiny model: results, and one clear sentence for everything that is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quickmerge.cli import app

COMMANDS = ["batch", "calibrate", "demo", "package", "push", "recognize", "studio", "transplant", "plan", "ls"]
CHOICES = {
    "generate": ["text", "image", "calm"], "bench": ["text", "tasks", "image", "vlm", "decode", "calm"],
    "show": ["text", "image", "video"], "recipe": ["show", "check"],
    "export": ["eagle", "gumiho"],
    "train": ["prior", "classifier", "dynamicvit", "gumiho", "recognizer", "vlm", "calm"],
}  # fmt: skip
ALL = [*COMMANDS, *(f"{name} {sub}" for name, subs in CHOICES.items() for sub in subs)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("the sea " * 700, encoding="utf-8")
    return path


def test_the_list_of_commands_is_whole() -> None:
    from typer.main import get_command

    found = get_command(app).commands
    groups = {name: list(one.commands) for name, one in found.items() if hasattr(one, "commands")}
    assert groups == CHOICES and set(found) == {*COMMANDS, *CHOICES}


@pytest.mark.parametrize("command", ALL)
def test_every_command_has_help_with_an_example(run, monkeypatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and f"Example: quickmerge {command}" in re.sub(r"\s+", " ", out)
    writes = "--out" if command.startswith(("train", "batch", "export", "package")) else "--json"
    assert {"push": "--dry-run", "studio": "--port"}.get(command, writes) in out


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["bench", "--keep", "x"], "bench text"), (["bench", "--image", "x"], "bench image"),
        (["bench", "--rounds", "3", "--drafter", "x", "--image=x"], "bench decode"),
        (["generate", "--keep", "x"], "generate text"), (["generate", "--keep", ".4", "--image=a"], "generate image"),
        (["show", "--video", "x", "--image", "y"], "show video"), (["show", "--frames", "3"], "show text"),
    ],
)  # fmt: skip
def test_options_without_a_sub_command_mean_one(run, given: list[str], meant: str) -> None:
    code, out, err = run(*given, "--no-such-thing")
    assert code == 2 and out == "" and f"quickmerge {meant}" in err and err.count("\n") == 1, err


def test_an_argument_may_be_written_as_an_option(run, tiny_folder, text) -> None:
    given = ["--model", tiny_folder, "--limit", "40", "--layer", "1"]
    ways = [["text", text, *given], ["text", *given, "--file", text], [*given, f"--file={text}"], [*given, "--", text]]
    ends = [run("show", *way)[:2] for way in ways]
    assert ends[0][0] == 0 and ends.count(ends[0]) == 4
    code, _, err = run("show", "--file", "--limit", "40")
    assert code == 2 and err == "quickmerge: --file must be followed by a value, got none\n"


def test_a_sub_command_is_asked_for_where_nothing_says_which(run) -> None:
    for name in ("generate", "bench", "show"):
        code, _, err = run(name)
        told = f"quickmerge: Name what is meant: quickmerge {name} {' or '.join(CHOICES[name])}"
        assert code == 2 and err == f"{told} (see quickmerge {name} --help)\n"
    code, _, err = run("bench", "txet")
    assert code == 2 and "No such command 'txet'. Did you mean 'text'?" in err


def test_plan_counts_before_running(run, tiny_folder, tmp_path) -> None:
    code, out, _ = run("plan", "--model", tiny_folder, "--tokens", "100", "--keep", "0.5", "--layer", "1",
                       "--json", tmp_path / "p.json")  # fmt: skip
    data = json.loads((tmp_path / "p.json").read_text())
    assert code == 0 and "50 tokens" in out
    assert data["tokens_per_layer"] == [100, 50] and data["lossy"] is True and data["cache_ratio"] == 0.75


def test_plan_measures_where_merging_pays(run, tiny_folder, tmp_path) -> None:
    given = ["plan", "--model", tiny_folder, "--tokens", "100", "--keep", "0.5", "--layer", "1"]
    code, out, _ = run(*given, "--json", tmp_path / "p.json")
    assert code == 0 and "not measured (--measure)" in " ".join(out.split()) and "256 tokens, the default" in out
    assert json.loads((tmp_path / "p.json").read_text())["break_even_measured"] is None
    code, out, err = run(*given, "--measure", "--dtype", "auto", "--json", tmp_path / "p.json")
    assert code == 0 and "plain over merged prefill" in " ".join(out.split()), err
    assert err.count("dtype auto: ") == 1
    found = json.loads((tmp_path / "p.json").read_text())["break_even_measured"]
    assert found["points"] and found["dtype"] in ("float32", "bfloat16")
    assert all(64 <= point["tokens"] <= 128 for point in found["points"])  # the model reads no more


def test_show_writes_page_and_image(run, tiny_folder, text, tmp_path) -> None:
    outputs = ["--html", tmp_path / "m.html", "--figure", tmp_path / "m.png", "--json", tmp_path / "m.json"]
    settings = ["--limit", "60", "--keep", "0.5", "--layer", "1"]
    code, out, _ = run("show", "--model", tiny_folder, "--file", text, *settings, *outputs)
    assert code == 0, out
    data = json.loads((tmp_path / "m.json").read_text())
    assert data["kept"] == 30 and len(data["tokens"]) == 60
    assert (tmp_path / "m.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"


def test_generate_compares(run, tiny_folder, text, tmp_path) -> None:
    short = tmp_path / "s.txt"
    short.write_text("the sea " * 20, encoding="utf-8")
    code, out, _ = run("generate", "--model", tiny_folder, "--file", short, "--prompt", "sea the sea", "--keep", "0.6",
                       "--layer", "1", "--max-new-tokens", "4", "--compare", "--min-tokens", "0", "--json",
                       tmp_path / "g.json")  # fmt: skip
    assert code == 0 and "== reduced ==" in out and "== full ==" in out
    data = json.loads((tmp_path / "g.json").read_text())
    assert data["full"]["tokens_per_layer"] == [43, 43] and data["reduced"]["tokens_per_layer"][0] == 43
    assert data["reduced"]["tokens_per_layer"][1] < 43
    code, _, err = run("generate", "--model", tiny_folder, "--file", short, "--prompt", "sea the sea", "--layer", "1",
                       "--max-new-tokens", "4", "--json", tmp_path / "g.json")  # fmt: skip
    assert code == 0 and "not reduced: 1 of 1 rows below min_tokens=256" in err
    assert json.loads((tmp_path / "g.json").read_text())["reduced"]["tokens_per_layer"] == [43, 43]


def teach(folder: Path) -> None:
    """Teach the tiny model that "the" and "sea" take turns: now context is worth something."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = torch.tensor([[2, 3] * 40, [3, 2] * 40])
    for _ in range(30):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def test_bench_gives_an_entropy_budget_a_mean_share(run, tiny_folder, text, tmp_path) -> None:
    teach(tiny_folder)
    given = ["bench", "--model", tiny_folder, "--text", text, "--reducer", "quickmerge:preset=paper", "--context", 60,
             "--target", 20, "--layer", 1]  # fmt: skip
    code, _, err = run(*given, "--budget", "entropy:0.6", "--json", tmp_path / "rows.json")
    assert code == 0, err
    found = json.loads((tmp_path / "rows.json").read_text())
    (row,) = found["rows"]
    kept = row["recipe"]["merge"]["reducer"]["keep"]
    assert row["keep"] == 0.6 and found["meta"]["budget"] == "entropy" and kept["type"] == "Entropy"
    assert kept["scale"] > 0 and 20 < row["tokens_kept"] < 60
    for budget, more, message in [
        ("entropi", [], r"--budget must be one of share, entropy, got 'entropi' .did you mean 'entropy'"),
        ("entropy:2", [], r"--keep must be a number in .0, 1., got 2"),
        ("entropy:0.4", ["--keep", 0.3], "--keep must be left out where --budget names a share, got 0.3"),
    ]:
        code, _, err = run(*given, "--budget", budget, *more)
        assert code == 2 and re.search(message, err), err
    code, _, err = run(*given[:5], "--budget", "entropy", "--recipe", tmp_path)
    assert code == 2 and "--budget can't be used with --recipe" in err


def test_bench_writes_rows(run, tiny_folder, text, tmp_path) -> None:
    teach(tiny_folder)
    code, _, err = run("bench", "--model", tiny_folder, "--text", text, "--reducer", "quickmerge,random", "--keep",
                         "0.5", "--layer", "1", "--context", "60", "--target", "20", "--json", tmp_path / "b.json",
                         "--out", tmp_path / "r")  # fmt: skip
    assert code == 0, err
    data = json.loads((tmp_path / "b.json").read_text())
    assert [r["reducer"] for r in data["rows"]] == ["quickmerge", "random"] and data["meta"]["environment"]["torch"]
    assert (tmp_path / "r" / "report.html").exists()


def wrong(tmp_path: Path, folder: Path, text: Path) -> dict[str, tuple[list[object], str]]:
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "zero.txt").write_bytes(b"ab\0cd")
    (tmp_path / "short.txt").write_text("the sea")
    base: list[object] = ["generate", "--model", folder, "--prompt", "sea"]
    bench: list[object] = ["bench", "--model", folder]
    show: list[object] = ["show", "--model", folder]
    return {
        "keep above": ([*base, "--file", text, "--keep", "1.2"], r"--keep must be a number in \(0, 1\], got 1.2"),
        "keep zero": ([*bench, "--text", text, "--keep", "0,0.5"], r"--keep must be a number in \(0, 1\], got 0"),
        "keep word": ([*bench, "--text", text, "--keep", "half"], "--keep must be numbers"),
        "layer": ([*base, "--max-new-tokens", "4", "--layer", "2"], r"layer must lie in 1..1 .* got 2"),
        "layer word": ([*base, "--layer", "first"], "--layer must be a whole number"),
        "reducer": (
            [*base, "--file", text, "--reducer", "quickmerg"],
            r"got 'quickmerg' \(did you mean 'quickmerge'\?\)",
        ),
        "model": (["plan", "--model", "smollm-135m"], r"did you mean 'smollm2-135m'\?"),
        "empty": ([*bench, "--text", tmp_path / "empty.txt"], "got an empty file"),
        "binary": ([*bench, "--text", tmp_path / "binary.txt"], "must be UTF-8 text"),
        "zero byte": ([*show, "--file", tmp_path / "zero.txt"], "got binary data"),
        "folder": ([*show, "--file", tmp_path], "got a folder"),
        "missing": ([*show, "--file", tmp_path / "nowhere.txt"], "can't be read"),
        "short document": ([*bench, "--text", tmp_path / "short.txt"], "at least 1000 tokens to be measured, got 2"),
        "both": ([*show, "--file", text, "--text", "sea"], "give either a file or --text, got both"),
        "neither": (show, "give either a file or --text, got neither"),
        "image": ([*show, "--file", text, "--figure", "m.gif"], ".png or .svg"),
        "unwritable": (["ls", "--json", text / "x.json"], "can't be written"),
    }


CASES = """keep above,keep zero,keep word,layer,layer word,reducer,model,empty,binary,zero byte,folder,missing,
short document,both,neither,image,unwritable""".replace("\n", "").split(",")


def test_the_list_of_cases_is_whole(tiny_folder, text, tmp_path) -> None:
    assert list(wrong(tmp_path, tiny_folder, text)) == CASES


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence_and_exit_2(case, run, tiny_folder, text, tmp_path) -> None:
    args, message = wrong(tmp_path, tiny_folder, text)[case]
    code, out, err = run(*map(str, args))
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and out == ""
    assert len(lines) == 1 and lines[0].startswith("quickmerge: ") and re.search(message, lines[0]), err


def test_an_unsupported_architecture_is_named(run, tmp_path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)).save_pretrained(tmp_path / "g")
    code, _, err = run("plan", "--model", tmp_path / "g")
    assert code == 2 and "MambaForCausalLM" in err and "its blocks are of a state space" in " ".join(err.split())


def test_linear_layers_of_any_class_are_counted(run, tmp_path) -> None:
    """GPT-2's are no `nn.Linear`, so their weights would be missed by their class."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from quickmerge.merge.bench.cost import model_shape

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    assert model_shape(model).weights == (12 * 32 * 32,) * 2


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    from quickmerge.console.options import write_json

    path = tmp_path / "out.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_importing_the_package_stays_cheap() -> None:
    code = "import sys, quickmerge; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


GENERATE = {"merged": [], "multipole": ["--attention", "multipole"], "drafted": ["--drafter", "lookup"],
            "seen": ["--image", "photo.png"]}  # fmt: skip


@pytest.mark.parametrize("way", GENERATE)
def test_a_template_without_end_is_refused_before_torch_is_imported(way: str, tiny_folder: Path) -> None:
    (tiny_folder / "chat_template.jinja").write_text("{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2)
    code = """
import sys
from quickmerge import cli
from quickmerge.models import chat
chat.SECONDS = 0.5
try:
    cli.main()
finally:
    print("torch" in sys.modules)
"""
    given = ["generate", "--model", str(tiny_folder), "--prompt", "the sea", *GENERATE[way]]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    assert done.stderr == "quickmerge: the chat template must be rendered within 0.5 seconds, but takes longer\n"
