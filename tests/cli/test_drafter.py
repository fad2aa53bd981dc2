"""``quickmerge generate text --drafter`` and ``quickmerge bench decode`` on a tiny model, and what can be wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quickmerge.speculative.gumiho import Gumiho

SHAPE = {"serial_layers": 1, "heads": 2, "mlp_depth": 2}


@pytest.fixture
def tiny_folder(tiny_folder: Path) -> Path:
    """The tiny model with a word for each of its 64 tokens, so that texts that differ are told apart."""
    known = {"<unk>": 0, "</s>": 1, "the": 2, "sea": 3} | {f"w{i}": i for i in range(4, 64)}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(tiny_folder)
    return tiny_folder


@pytest.fixture
def heads(tiny_folder: Path, tmp_path: Path) -> Path:
    """Untrained heads for the tiny model."""
    torch.manual_seed(0)
    Gumiho.new(AutoModelForCausalLM.from_pretrained(tiny_folder), **SHAPE).save_pretrained(tmp_path / "heads")
    return tmp_path / "heads"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    asked = [{"kind": "sea", "prompt": "the sea " * 8}, {"kind": "the", "prompt": "the the sea"}, {"prompt": "sea"}]
    path.write_text("\n".join(map(json.dumps, asked)))
    return path


@pytest.mark.parametrize("more", [[], ["--tree", 4], ["--temperature", 0.7, "--seed", 3]])
@pytest.mark.parametrize("which", ["lookup", "lookup:ngram=2:length=4", "heads", "heads:beam=2:fta=duplicate"])
def test_generate_writes_the_model_s_own_text(run, tiny_folder, heads, tmp_path, which, more) -> None:
    data = tmp_path / "g.json"
    given = which.replace("heads", str(heads))
    common = ["--model", tiny_folder, "--prompt", "the sea the sea", "--max-new-tokens", 20, "--compare"]
    code, out, err = run("generate", "--drafter", given, *common, *more, "--json", data)
    assert code == 0, err
    assert "== drafted ==" in out and "== plain ==" in out and "lossless" in err
    found = json.loads(data.read_text())
    assert found["drafter"] == which and found["tree"] == (4 if "--tree" in more else "auto")
    drafted, plain = found["drafted"], found["plain"]
    assert plain["tokens_per_pass"] == 1 and plain["passes"] == plain["tokens"]
    assert drafted["tokens_per_pass"] == (drafted["tokens"] - 1) / (drafted["passes"] - 1)
    assert sum(drafted["accepted"]) + drafted["passes"] >= drafted["tokens"]
    if "--temperature" in more:
        assert found["sample"] is True
        assert run("generate", "--drafter", given, *common, *more)[1] == out, "the same seed gives the same text"
    else:
        assert "the same text, token for token" in err and drafted["text"] == plain["text"] != ""


def test_a_tree_stops_at_the_end_of_the_context(run, tiny_folder, heads) -> None:
    """128 positions: 100 for the prompt, 28 for what is written."""
    common = ["--model", tiny_folder, "--prompt", "the sea " * 50, "--compare", "--tree", 64]
    for drafter in ("lookup", heads):
        code, _, err = run("generate", "--drafter", drafter, *common, "--max-new-tokens", 28)
        assert code == 0 and "the same text, token for token" in err, err
    code, _, err = run("generate", "--drafter", "lookup", *common, "--max-new-tokens", 29)
    assert code == 2 and "must fit the model's 128 positions, got 100 and 29 tokens" in err


def test_bench_sets_drafters_beside_plain_decoding(run, tiny_folder, heads, prompts, tmp_path) -> None:
    data = tmp_path / "b.json"
    code, out, err = run(
        "bench", "--drafter", f"lookup,{heads}", "--model", tiny_folder, "--prompts", prompts, "--temperature", "0,1",
        "--max-new-tokens", 12, "--tree", 4, "--json", data, "--out", tmp_path / "r",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(data.read_text())
    assert [(r["temperature"], r["method"]) for r in found["rows"]] == [
        (t, name) for t in (0, 1) for name in ("plain", "lookup", "heads")
    ]
    assert all(r["same"] == 3 for r in found["rows"] if r["temperature"] == 0)
    assert found["rows"][0]["tokens_per_pass"] == found["rows"][0]["speedup"] == 1
    assert set(found["rows"][1]["kinds"]) == {"sea", "the", "prompt"} and found["meta"]["prompts"] == 3
    assert len(found["prompts"]) == 3 * 3 * 2 and found["meta"]["environment"]["torch"]
    assert "lookup" in out and "3 of 3" in out
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert "Tokens per forward pass" in page and "accepted so many drafted tokens" in page


def test_bench_has_prompts_of_its_own(run, tiny_folder, tmp_path) -> None:
    data = tmp_path / "b.json"
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.config.max_position_embeddings = 2048
    model.save_pretrained(tiny_folder)
    common = ["--drafter", "lookup", "--model", tiny_folder, "--max-new-tokens", 3, "--limit", 2, "--json", data]
    code, _, err = run("bench", *common)
    assert code == 0, err
    found = json.loads(data.read_text())
    assert [r["kind"] for r in found["prompts"]] == ["question"] * 2 + ["summary"] * 2
    plain, drafted = found["rows"]
    assert "recipe" not in plain and drafted["recipe"]["decoding"]["type"] == "PromptLookup"


def test_what_train_gumiho_writes_is_a_drafter(run, tiny_folder, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("the sea the the sea " * 100)
    shape = ["--serial-layers", 1, "--heads", 1, "--mlp-depth", 2]
    common = ["--model", tiny_folder, "--steps", 2, "--batch", 2, "--length", 32, "--out", tmp_path / "heads"]
    code, _, err = run("train", "gumiho", "--data", tmp_path / "a.txt", *common, *shape)
    assert code == 0, err
    asked = ["--model", tiny_folder, "--prompt", "the sea", "--max-new-tokens", 12, "--tree", 4, "--compare"]
    code, _, err = run("generate", "--drafter", tmp_path / "heads", *asked)
    assert code == 0 and "the same text, token for token" in err


def test_the_temperature_is_of_any_generate(run, tiny_folder) -> None:
    asked = ["generate", "--model", tiny_folder, "--prompt", "the sea " * 20, "--layer", 1, "--max-new-tokens", 30]
    greedy, cold = (run(*asked, *more) for more in ([], ["--temperature", 1e-3]))
    assert greedy[0] == cold[0] == 0 and greedy[1] == cold[1]
    assert len({run(*asked, "--temperature", 1, "--seed", seed)[1] for seed in range(4)}) > 1
    code, _, err = run(*asked, "--temperature", -1)
    assert code == 2 and "--temperature" in err


def other_model(tmp_path: Path, **changes: int) -> Path:
    """Heads for another model."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{"vocab_size": 64, "num_key_value_heads": 2, **sizes, **changes})
    Gumiho.new(LlamaForCausalLM(config), **SHAPE).save_pretrained(tmp_path / "others")
    return tmp_path / "others"


def wrong(tmp_path: Path, folder: Path) -> dict[str, tuple[list[object], str]]:
    generate: list[object] = ["generate", "--model", folder, "--prompt", "sea", "--max-new-tokens", 4]
    drafters: list[object] = ["bench", "--model", folder, "--max-new-tokens", 4, "--drafter", "lookup"]
    lookup: list[object] = [*generate, "--drafter", "lookup"]
    (tmp_path / "bad.jsonl").write_text('{"kind": "no prompt"}')
    return {
        "unknown folder": ([*generate, "--drafter", "runs/deep/nowhere"], "or a hub id, got 'runs/deep/"),
        "near": ([*generate, "--drafter", "lokup"], r"got 'lokup' \(did you mean 'lookup'\?\)"),
        "no heads": ([*generate, "--drafter", folder], "must belong to draft heads"),
        "other model": ([*generate, "--drafter", tmp_path / "others"], "were trained for .* with other weights"),
        "vocabulary": ([*generate, "--drafter", tmp_path / "others"], "48 tokens in its vocabulary.* with 64"),
        "width": ([*generate, "--drafter", tmp_path / "others"], "64 features in its last hidden state.* with 32"),
        "setting": ([*generate, "--drafter", "lookup:ngrams=2"], r"ngram, length, got 'ngrams' \(did you mean 'ngram'"),
        "setting value": ([*generate, "--drafter", "lookup:ngram=0"], "ngram must be a whole number"),
        "tree word": ([*lookup, "--tree", "big"], "--tree must be auto or a whole number of at least 1, got 'big'"),
        "tree zero": ([*lookup, "--tree", "0"], "--tree must be auto or a whole number of at least 1, got '0'"),
        "tree alone": ([*generate, "--tree", "4"], "--tree is for drafted tokens: give --drafter too"),
        "temperature": ([*lookup, "--sample", "--temperature", "0"], "--temperature must be above 0 with --sample"),
        "empty prompt": (["generate", "--drafter", "lookup", "--prompt", " "], "--prompt must hold some text"),
        "bench text": ([*drafters, "--text", "a.txt"], "no option --text: it belongs to quickmerge bench text"),
        "bench rounds": ([*drafters, "--rounds", "3"], "quickmerge bench decode has no option --rounds: it belongs to"),
        "bench twice": ([*drafters[:-1], "lookup,lookup"], "a name of its own, got 'lookup' for two ways"),
        "bench prompts": ([*drafters, "--prompts", tmp_path / "bad.jsonl"], 'must hold an object such as {"prompt"'),
        "bench temperature": ([*drafters, "--temperature", "hot"], "--temperature must be numbers"),
        "bench minus": ([*drafters, "--temperature", "-1"], "--temperature must be a number of at least 0.0001"),
        "bench alone": (["bench", "--prompts", "a.jsonl"], "no option --prompts: it belongs to quickmerge bench dec"),
    }  # fmt: skip


CASES = (
    "unknown folder,near,no heads,other model,vocabulary,width,setting,setting value,"
    "tree word,tree zero,tree alone,temperature,empty prompt,bench text,bench rounds,"
    "bench twice,bench prompts,bench temperature,bench minus,bench alone"
)


def test_the_list_of_cases_is_whole(tmp_path) -> None:
    assert list(wrong(tmp_path, tmp_path)) == CASES.split(",")


@pytest.mark.parametrize("case", CASES.split(","))
def test_bad_input_is_one_sentence_and_exit_2(run, tiny_folder, tmp_path, case) -> None:
    changes = {"vocabulary": {"vocab_size": 48}, "width": {"hidden_size": 64}}
    if case in ("other model", "vocabulary", "width"):
        other_model(tmp_path, **changes.get(case, {}))
    args, message = wrong(tmp_path, tiny_folder)[case]
    code, out, err = run(*map(str, args))
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and out == "", err
    assert len(lines) == 1 and lines[0].startswith("quickmerge: ") and re.search(message, lines[0]), err
