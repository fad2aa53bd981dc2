"""Training an autoencoder of chunks: it comes to find tokens again, and runs resume exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from quickmerge.calm import CalmAutoencoder, CalmAutoencoderConfig
from quickmerge.calm.evaluate import autoencoder_scores
from quickmerge.calm.texts import CalmTexts, document_chunks, train_tokenizer
from quickmerge.calm.train import new_autoencoder, train_calm_autoencoder
from quickmerge.errors import QuickmergeError
from quickmerge.training import TrainingConfig

WORDS = ["the sea", " and", " the sand", " or", " a stone", ".", " What is", " it?"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(documents(), 290)


def documents(count: int = 12, seed: int = 0, words: int = 60) -> list[str]:
    draws = torch.Generator().manual_seed(seed)
    return ["".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=draws)) for _ in range(count)]


def settings(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"steps": 6, "batch": 3, "learning_rate": 5e-3, "save_every": 2, "log_every": 1, **changes})


def start(texts: CalmTexts, **more: Any) -> CalmAutoencoder:
    return new_autoencoder(texts, **{"latent": 8, "width": 32, **more})


@pytest.mark.parametrize("sampled", [None, 64])
def test_tokens_of_unseen_texts_are_found_again(tokenizer: Any, tmp_path: Path, sampled: int | None) -> None:
    texts = CalmTexts(tokenizer, documents(), 2, 8)
    model = start(texts)
    unseen = document_chunks(tokenizer, documents(3, seed=7), 2)
    before = autoencoder_scores(model, unseen)
    result = train_calm_autoencoder(
        model, texts, settings(steps=200, batch=8, learning_rate=1e-2, save_every=200, warmup=10), tmp_path,
        sampled=sampled, tokenizer=tokenizer,
    )  # fmt: skip
    assert result.finished
    after = autoencoder_scores(AutoModel.from_pretrained(tmp_path), unseen)
    assert before.accuracy[0.0] < 0.2 < 0.95 < after.accuracy[0.0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "cross_entropy", "kl", "clipped_kl"} <= lines[0].keys()
    assert ("accuracy" in lines[0]) == (sampled is None)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in tmp_path.iterdir()}
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]


@pytest.mark.parametrize(("sampled", "precision"), [(None, "no"), (16, "no"), (None, "bf16")])
def test_a_stopped_run_goes_on_to_the_same_weights(
    tokenizer: Any, tmp_path: Path, sampled: int | None, precision: str
) -> None:
    """With random phases, hidden tokens, noise and sampled words: all depend on the run's random numbers."""
    texts = CalmTexts(tokenizer, documents(4), 3, 4)

    def run(out: str, resume: bool = False, sampled: int | None = sampled, kl: float = 1e-3, **changes: Any) -> None:
        model = start(texts, kl_weight=kl)
        torch.manual_seed(len(out))  # what was drawn before must not matter
        train_calm_autoencoder(
            model, texts, settings(precision=precision, **changes), tmp_path / out, sampled=sampled, resume=resume
        )

    run("whole")
    run("parts", max_minutes=1e-9)
    run("parts", resume=True)
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(QuickmergeError, match="fingerprint sampled was"):
        run("parts", resume=True, sampled=15)
    with pytest.raises(QuickmergeError, match="fingerprint autoencoder was"):
        run("parts", resume=True, kl=2e-3)


def test_free_bits_keep_dimensions_in_use(tokenizer: Any, tmp_path: Path) -> None:
    """The ablation: a high price on everything leaves fewer dimensions that say something than a partly free one."""
    texts = CalmTexts(tokenizer, documents(), 2, 8)
    unseen = document_chunks(tokenizer, documents(3, seed=7), 2)
    active = {}
    for floor in (0.5, 0.0):
        model = start(texts, latent=16, kl_floor=floor, kl_weight=1.0)
        train_calm_autoencoder(
            model, texts, settings(steps=80, batch=8, save_every=80), tmp_path / f"{floor}", tokenizer=tokenizer
        )
        active[floor] = autoencoder_scores(model, unseen).active
    assert active[0.5] > active[0.0], active


def test_an_autoencoder_of_other_texts_is_told(tokenizer: Any, tmp_path: Path) -> None:
    texts = CalmTexts(tokenizer, documents(2), 2, 4)
    model = CalmAutoencoder(CalmAutoencoderConfig(vocab_size=291, patch=3, latent=4, width=8))
    with pytest.raises(QuickmergeError, match="patch of the autoencoder must be that of the texts, 2, got 3"):
        train_calm_autoencoder(model, texts, settings(), tmp_path)
    with pytest.raises(ValueError, match="draws must be a whole number of at least 1, got 0"):
        train_calm_autoencoder(start(texts), texts, settings(), tmp_path, sampled=0)
    assert not list(tmp_path.iterdir())
