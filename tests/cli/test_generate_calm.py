"""``quickmerge generate calm``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from calm_samples import small_calm, words_tokenizer

from quickmerge.calm.cli import is_calm, parse_method
from quickmerge.calm.model import load_calm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.models import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_calm(3).save_pretrained(tmp_path / "calm")
    words_tokenizer().save_pretrained(tmp_path / "calm")
    return tmp_path / "calm"


def test_it_goes_on_with_a_text(run, folder, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("w3 w4 w5", encoding="utf-8")
    options = ["--prompt", "w6 w7", "--max-new-tokens", "7", "--seed", "2", "--json", tmp_path / "g.json"]
    code, out, err = run("generate", "calm", "--model", folder, "--file", tmp_path / "a.txt", *options)
    assert code == 0, err
    data = json.loads((tmp_path / "g.json").read_text())
    assert out.startswith("w3 w4 w5\n\nw6 w7") and data["prompt_tokens"] == 5
    assert data["tokens"] <= 7 and data["steps"] == -(-data["tokens"] // 3)
    assert f"{data['tokens']} tokens in {data['steps']} steps of 3, " in err and " tokens/s)" in err
    model, tokenizer = load_calm(folder)
    ids = tokenizer("w3 w4 w5\n\nw6 w7", return_tensors="pt")["input_ids"]
    want = tokenizer.decode(model.generate(ids, max_new_tokens=7, seed=2)[0, 5:], skip_special_tokens=True)
    assert data["text"] == want and out.rstrip().endswith(want.strip())
    assert run("generate", "calm", "--model", folder, "--file", tmp_path / "a.txt", *options)[1] == out


def test_at_a_temperature(run, folder) -> None:
    for method in ([], ["--temperature-method", "batch:20"], ["--temperature-method", "exact"]):
        code, out, err = run("generate", "calm", "--model", folder, "--prompt", "w6 w7", "--max-new-tokens", "6",
                             "--temperature", "0.5", *method)  # fmt: skip
        assert code == 0 and out.startswith("w6 w7"), err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--temperature", "0"],
            r"temperature must be a number in (0, 1] for a model that only gives samples, got 0.0",
        ),
        (["--temperature", "1.5"], "got 1.5"),
        (["--temperature-method", "batch"], "--temperature-method is for a temperature below 1"),
        (["--temperature", "0.5", "--temperature-method", "btach"], "got 'btach' (did you mean 'batch'?)"),
        (["--temperature", "0.5", "--temperature-method", "batch:0"], "with a whole number N of at least 1"),
        (["--keep", "0.5"], "calm has no option --keep: it belongs to quickmerge generate text and quickmerge gen"),
        (["--compare"], "quickmerge generate calm has no option --compare: it belongs to"),
        (["--drafter", "lookup"], "quickmerge generate calm has no option --drafter: it belongs to"),
        (["--max-new-tokens", "4000"], "the backbone reads at most 64"),
        (["--seed", "-1"], "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_wrong_options_are_one_sentence(run, folder, options: list[str], message: str) -> None:
    code, _, err = run("generate", "calm", "--model", folder, "--prompt", "w6", *options)
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err, err


def test_the_right_sub_command_is_named(run, folder, tiny_folder) -> None:
    code, _, err = run("generate", "--model", tiny_folder, "--prompt", "sea", "--temperature-method", "batch")
    assert code == 2 and "has no option --temperature-method: it belongs to quickmerge generate calm" in err
    code, _, err = run("generate", "--model", folder, "--prompt", "w6")
    assert code == 2 and "is a CALM: let it write with quickmerge generate calm" in err


def test_folders_are_told_apart_and_damage_is_told(folder, tiny_folder, tmp_path) -> None:
    assert is_calm(str(folder)) and not is_calm(str(tiny_folder)) and not is_calm(None) and not is_calm("smollm2-135m")
    with pytest.raises(
        QuickmergeError, match=r"must be a folder that holds a CALM, but .* holds a llama: `quickmerge tra"
    ):
        load_calm(tiny_folder)
    with pytest.raises(QuickmergeError, match="there is no folder"):
        load_calm(tmp_path / "none")
    with pytest.raises(UnsupportedModelError, match=r"is a CALM.* open it with quickmerge.calm.load_calm"):
        load(folder, progress=False)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(QuickmergeError, match=r"model.safetensors is damaged"):
        load_calm(folder)
    from safetensors.torch import load_file, save_file

    weights.write_bytes(whole)
    state = load_file(weights)
    del state["head.last.weight"]
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(QuickmergeError, match=r"don't belong together"):
        load_calm(folder)


def test_a_tokenizer_of_more_words_is_refused(folder) -> None:
    tokenizer = words_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(QuickmergeError, match="must have the 20 tokens that the model was trained with, got 21"):
        load_calm(folder)


def test_methods() -> None:
    assert parse_method(None) == {} and parse_method("batch") == {"temperature_method": "batch"}
    assert parse_method("batch:7") == {"temperature_method": "batch", "batch_samples": 7}
    with pytest.raises(QuickmergeError, match="must be exact, batch or batch:N with a whole number"):
        parse_method("exact:7")


def test_half_precision(folder) -> None:
    model, _ = load_calm(folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.generate(torch.tensor([[4, 5]]), max_new_tokens=6, eos_token_id=[]).shape == (1, 8)
