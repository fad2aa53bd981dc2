"""Training a CALM: it learns what comes next, resumes exactly, leaves its autoencoder alone, and is saved whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calm_samples import words_tokenizer
from transformers import AutoModelForCausalLM

from quickmerge.calm.autoencoder import CalmAutoencoder
from quickmerge.calm.heads.energy import energy_score
from quickmerge.calm.model import CalmForCausalLM, load_calm
from quickmerge.calm.texts import CalmTexts
from quickmerge.calm.train import (
    CalmText,
    check_causal,
    energy_range,
    llama_shape,
    new_autoencoder,
    new_calm,
    train_calm,
)
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.training import TrainingConfig

TEXTS = ["w2 w3 w4 w5 w6 w7 " * 20, "w8 w9 w10 w11 w12 w13 " * 20]
TINY = llama_shape(32, 2, 2)


def texts_of(patch: int = 2, chunks: int = 8) -> CalmTexts:
    return CalmTexts(words_tokenizer(), TEXTS, patch, chunks)


def coder_of(texts: CalmTexts, seed: int = 0, **shape: Any) -> CalmAutoencoder:
    sizes = {"latent": 8, "width": 32, **shape}
    return new_autoencoder(texts, seed=seed, **sizes).eval()


def tiny(texts: CalmTexts, coder: CalmAutoencoder | None = None, **settings: Any) -> CalmForCausalLM:
    given = {"backbone": TINY, "samples": 4, "targets": 4, **settings}
    return new_calm(coder or coder_of(texts), **given)


@pytest.fixture(scope="module")
def taught() -> CalmAutoencoder:
    """An autoencoder that knows the chunks of the texts."""
    texts = texts_of()
    torch.manual_seed(0)
    coder = coder_of(texts, token_dropout=0.0, latent_dropout=0.0, kl_weight=1e-3).train()
    optimizer = torch.optim.Adam(coder.parameters(), lr=5e-3)
    for step in range(200):
        batch = torch.stack([texts[(4 * step + at) % len(texts)] for at in range(4)])
        optimizer.zero_grad()
        told = coder(batch)
        told.loss.backward()
        optimizer.step()
    assert told.accuracy > 0.97
    return coder.eval()


def test_it_learns_what_comes_next(taught: CalmAutoencoder, tmp_path: Path) -> None:
    texts = texts_of()
    model = tiny(texts, taught, seed=1)
    frozen = {name: value.clone() for name, value in model.autoencoder.state_dict().items()}
    config = TrainingConfig(steps=300, batch=8, learning_rate=6e-3, warmup=10, save_every=300, log_every=100)
    before = float(CalmText(model)(torch.stack([texts[at] for at in range(4)]), 0.0)["loss"].detach())
    result = train_calm(model, texts, config, tmp_path, tokenizer=words_tokenizer())
    assert result.finished and result.metrics["loss"] < 0.4 * before
    assert all(torch.equal(value, frozen[name]) for name, value in model.autoencoder.state_dict().items())
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    loaded, tokenizer = load_calm(tmp_path)
    right = 0
    for start in ("w2 w3 w4 w5 w6 w7 w2", "w8 w9 w10 w11 w12 w13", "w4 w5 w6 w7 w2 w3 w4 w5"):
        ids = tokenizer(start, return_tensors="pt")["input_ids"]
        out = loaded.generate(ids, max_new_tokens=6, seed=0)[0]
        cycle = list(range(2, 8)) if int(ids[0, 0]) < 8 else list(range(8, 14))
        at = cycle.index(int(ids[0, -1]))
        right += sum(int(token) == cycle[(at + 1 + step) % 6] for step, token in enumerate(out[ids.shape[1] :]))
    assert right >= 14  # of 18, of twenty words


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_score_has_its_range(taught: CalmAutoencoder, alpha: float) -> None:
    """Heads that know nothing and all are made by hand, and scored by the loss itself."""
    texts = texts_of()
    model = tiny(texts, taught, alpha=alpha)
    before = torch.get_rng_state()
    nothing, everything = energy_range(model, texts)
    assert torch.equal(before, torch.get_rng_state()) and 0 < everything < 0.7 * nothing
    assert energy_range(model, texts) == (nothing, everything)
    ids = torch.cat([texts[at].view(-1, texts.patch) for at in range(len(texts))])
    ids = ids[(ids != texts.pad).any(-1)]
    draws = 400
    truth = model.draw_targets(ids, draws)
    known = energy_score(model.draw_targets(ids, draws), truth, alpha).mean()
    any_chunk = ids[torch.randint(len(ids), (draws, len(ids)))]
    blind = model.autoencoder.draw(*model.autoencoder.encode(any_chunk), 1)[0]
    assert float(known) == pytest.approx(everything, rel=0.1)
    assert float(energy_score(blind, truth, alpha).mean()) == pytest.approx(nothing, rel=0.1)


@pytest.mark.parametrize("head", ["energy", "flow", "diffusion"])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, head: str) -> None:
    config = {"steps": 4, "batch": 3, "save_every": 2}

    def run(out: str, resume: bool = False, seed: int = 0, **changes: Any) -> CalmForCausalLM:
        texts = texts_of()
        model = tiny(texts, coder_of(texts, seed), head=head)
        train_calm(model, texts, TrainingConfig(**config, **changes), tmp_path / out, resume=resume)
        return model

    whole = run("whole")
    run("parts", max_minutes=1e-9)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    parts = run("parts", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / out) for out in ("whole", "parts"))
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    with pytest.raises(QuickmergeError, match="weights was"):
        run("parts", resume=True, seed=1)  # on another autoencoder


def test_the_other_heads_learn_too(taught: CalmAutoencoder, tmp_path: Path) -> None:
    texts = texts_of()
    for head in ("flow", "diffusion"):
        model = tiny(texts, taught, head=head)
        config = TrainingConfig(steps=60, batch=8, learning_rate=3e-3, save_every=60, log_every=10)
        result = train_calm(model, texts, config, tmp_path / head)
        lines = (tmp_path / head / "metrics.jsonl").read_text().splitlines()
        assert result.finished and len(lines) == 6
        batch = torch.stack([texts[at] for at in range(len(texts))])
        torch.manual_seed(0)
        old = float(tiny(texts, taught, head=head)(batch, labels=batch).loss.detach())
        assert float(model(batch, labels=batch).loss.detach()) < 0.8 * old


def test_only_the_rest_is_trained_and_put_into_checkpoints(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    texts = texts_of()
    model = tiny(texts)
    result = train_calm(model, texts, TrainingConfig(steps=1, batch=2), tmp_path)
    names = load_file(next(result.checkpoint.glob("model*.safetensors")))
    assert names and not [name for name in names if "autoencoder" in name]


def test_padding_has_no_part_in_the_loss() -> None:
    texts = CalmTexts(words_tokenizer(), ["w2 w3 w4"], 2, 6, phase=0)
    model = tiny(texts)
    told = CalmText(model)(texts[0][None], 0.0)
    assert texts[0].tolist() == [2, 3, 4, 1] + 8 * [20]
    assert float(told["chunks"]) == 1


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    texts, config = texts_of(), TrainingConfig(steps=1)
    with pytest.raises(QuickmergeError, match="patch of the model must be that of the texts, 3, got 2"):
        train_calm(tiny(texts), texts_of(3), config, tmp_path)
    with pytest.raises(QuickmergeError, match="windows of at least 2 chunks, or nothing is predicted, got 1"):
        train_calm(tiny(texts), texts_of(chunks=1), config, tmp_path)
    with pytest.raises(ValueError, match=r"width must be a multiple of twice heads \(6\), got 32"):
        llama_shape(32, 2, 3)
    with pytest.raises(ValueError, match="alpha must be a number strictly between 0 and 2"):
        tiny(texts, alpha=2.0)


def test_a_backbone_that_looks_ahead_is_refused() -> None:
    texts = texts_of()
    bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32}  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="backbone must be a causal language model, got BertModel, which l"):
        tiny(texts, backbone=bert)
    check_causal(tiny(texts, backbone={**bert, "is_decoder": True}))


def test_a_seed_makes_the_weights() -> None:
    texts = texts_of()
    one, two, other = (tiny(texts, coder_of(texts), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    name = "embedding.up.weight"
    assert not torch.equal(one[name], other[name])
    assert llama_shape(192, 4, 4)["intermediate_size"] == 512 and llama_shape(1024, 1, 16)["intermediate_size"] == 2752
