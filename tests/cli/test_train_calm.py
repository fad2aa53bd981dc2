"""``quickmerge train calm`` on tiny models: its stages, resuming, and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quickmerge.calm import CalmAutoencoder, CalmForCausalLM

SMALL = ["--patch", 2, "--chunks", 6, "--batch", 3, "--save-every", 2]
CODER = ["--latent", 6, "--ae-width", 16]
SPEAKER = ["--layers", 1, "--width", 16, "--heads", 2, "--samples", 2, "--targets", 3]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text("the sea and the sand and the sea again. " * 20 + name)
    return folder


@pytest.fixture
def base(texts: Path) -> list[Any]:
    return ["train", "calm", "--data", texts, *SMALL]


def test_both_stages_and_the_ordinary_model(run: Any, base: list[Any], texts: Path, tmp_path: Path) -> None:
    out, unseen = tmp_path / "out", tmp_path / "unseen.txt"
    unseen.write_text("the sand again and the sea and the sand. " * 4)
    code, told, err = run(
        *base, *CODER, *SPEAKER, "--vocabulary", 270, "--ae-steps", 3, "--ae-batch", 2, "--steps", 2, "--out", out,
        "--held-out", unseen,
    )  # fmt: skip
    assert code == 0, err
    assert f"wrote {out / 'autoencoder'}" in told and told.endswith(f"wrote {out}\n"), told
    assert "held-out tokens found again:" in told and "dimensions in use: " in told and "of 6; " in told
    assert "windows of 16 chunks of 2 tokens" in err and "windows of 6 chunks of 2 tokens" in err
    coder, model = CalmAutoencoder.from_pretrained(out / "autoencoder"), CalmForCausalLM.from_pretrained(out)
    assert coder.config.vocab_size == 271 and coder.config.latent == 6 and coder.config.patch == 2
    inside = model.autoencoder.state_dict()
    assert all(torch.equal(inside[name], value) for name, value in coder.state_dict().items())
    for folder in (out, out / "autoencoder"):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert not [path for path in out.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    # another model on the same autoencoder, and an ordinary one on its tokens
    more = [*base, "--autoencoder", out / "autoencoder", "--steps", 2]
    code, told, err = run(*more, *SPEAKER, "--stage", "model", "--head", "flow", "--out", tmp_path / "flow")
    assert code == 0 and told == f"wrote {tmp_path / 'flow'}\n", err
    assert json.loads((tmp_path / "flow" / "config.json").read_text())["head"] == "flow"
    code, told, err = run(*more, *SPEAKER[:6], "--stage", "discrete", "--out", tmp_path / "plain")
    assert code == 0 and told == f"wrote {tmp_path / 'plain'}\n", err
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["vocab_size"] == 271


def test_the_autoencoder_alone(run: Any, base: list[Any], tiny_folder: Path, tmp_path: Path) -> None:
    """Its plain options are the stage's own; it may sample words and begin from a model's embeddings."""
    out = tmp_path / "ae"
    code, told, err = run(
        *base, *CODER, "--tokenizer", tiny_folder, "--embeddings", tiny_folder, "--stage", "autoencoder",
        "--sampled", 3, "--steps", 2, "--kl-floor", 0, "--out", out,
    )  # fmt: skip
    assert code == 0 and told == f"wrote {out}\n", err
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == 5 and config["kl_floor"] == 0 and config["eos_token_id"] == 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all("accuracy" not in line for line in lines)
    code, _, err = run(*base, *CODER, "--vocabulary", 270, "--embeddings", tiny_folder, "--stage", "autoencoder",
                       "--steps", 2, "--out", tmp_path / "other")  # fmt: skip
    assert code == 2 and "--embeddings must name a model with the tokenizer that is used" in err


def test_large_vocabularies_are_sampled_and_it_is_said(
    run: Any, base: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quickmerge.calm import cli_train as train_calm_stages

    monkeypatch.setattr(train_calm_stages, "LARGE", 200)
    monkeypatch.setattr(train_calm_stages, "SAMPLED", 20)
    more = [*base, *CODER, "--vocabulary", 270, "--stage", "autoencoder", "--steps", 2]
    code, _, err = run(*more, "--out", tmp_path / "a")
    assert code == 0 and "of 271 tokens 20 are sampled for the loss of each step" in err
    code, _, err = run(*more, "--sampled", 0, "--out", tmp_path / "b")
    assert code == 0 and "sampled" not in err
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert not torch.equal(one["embed.weight"], two["embed.weight"])


def test_a_stopped_run_goes_on_to_the_same_weights(run: Any, base: list[Any], tmp_path: Path) -> None:
    """Stopped in the first stage, and again in the second."""
    base = [*base, *CODER, *SPEAKER, "--vocabulary", 270, "--ae-steps", 3, "--steps", 3]
    assert run(*base, "--out", tmp_path / "whole")[0] == 0
    out = tmp_path / "parts"
    code, told, _ = run(*base, "--out", out, "--max-minutes", "1e-6")
    assert code == 0 and told == f"stopped after step 1; go on with --resume: {out / 'autoencoder'}\n"
    code, told, _ = run(*base, "--out", out)
    assert code == 2 and told == ""  # there is a run already
    ends = []
    for _ in range(5):
        code, told, err = run(*base, "--out", out, "--resume", "--max-minutes", "1e-6")
        assert code == 0, err
        ends.append(told.splitlines()[-1])
    assert (
        ends[:4]
        == [
            f"stopped after step 2; go on with --resume: {out / 'autoencoder'}",
            *[f"stopped after step {step}; go on with --resume: {out}" for step in (1, 2)],
            f"wrote {out}",
        ]
        and ends[4] == f"wrote {out}"
    )  # what is done is done
    for name in ("model.safetensors", "autoencoder/model.safetensors"):
        one, two = (load_file(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "modle"], "--stage must be one of both, autoencoder, model, discrete, got 'modle'"),
        (
            ["--stage", "model", "--latent", 3],
            "--latent has no meaning with --stage model: it belongs to both and auto",
        ),
        (["--stage", "autoencoder", "--ae-steps", 3], "--ae-steps has no meaning with --stage autoencoder"),
        (["--stage", "discrete", "--head", "flow"], "--head has no meaning with --stage discrete"),
        (["--stage", "autoencoder", "--layers", 2], "--layers has no meaning with --stage autoencoder"),
        (["--autoencoder", "here"], "--autoencoder has no meaning with --stage both"),
        (["--stage", "model"], "there is no autoencoder in"),
        (["--vocabulary", 100], "vocabulary must be a whole number of at least 257, got 100"),
        (["--vocabulary", 5000], "vocabulary must be at most"),
        (["--tokenizer", "a", "--vocabulary", 300], "give either --tokenizer or --vocabulary, got a and 300"),
        (["--vocabulary", 270, "--patch", 0], "patch must be a whole number of at least 1, got 0"),
        (["--vocabulary", 270, "--latent", 0], "latent must be a whole number of at least 1, got 0"),
        (["--head", "gaussian"], "head must be one of"),
        (["--alpha", 2], "alpha must be a number strictly between 0 and 2"),
        (["--chunks", 1], "--chunks must be at least 2, or nothing is predicted, got 1"),
        (["--backbone", "x", "--layers", 2], "--backbone has its own shape: give it or --layers, not both"),
        (["--precision", "int8"], "precision must be one of no, bf16, fp16, got 'int8'"),
        (["--resume", "--vocabulary", 270], "nothing to resume"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    run: Any, base: list[Any], tmp_path: Path, options: list[Any], message: str
) -> None:
    code, told, err = run(*base, "--out", tmp_path / "out", "--steps", 1, *options)
    assert code == 2 and told == "" and message in " ".join(err.split()), err
    assert not list((tmp_path / "out").rglob("*.safetensors"))
