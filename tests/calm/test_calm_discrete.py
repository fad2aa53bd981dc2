"""The ordinary language model beside a CALM: its loss, its training, and what can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calm_bench_samples import BACKBONE, WORDS, tiny_discrete, words
from safetensors.torch import load_file
from training_samples import settings
from transformers import AutoModelForCausalLM

from quickmerge.calm.texts import CalmTexts
from quickmerge.calm.train import DiscreteTexts, new_discrete, train_discrete
from quickmerge.errors import QuickmergeError

RIDDLE = " ".join(f"w{1 + i % 7}" for i in range(60))
"""A text whose next word is known by the last."""


def windows(patch: int = 1) -> CalmTexts:
    return CalmTexts(words(), [RIDDLE, RIDDLE[:40]], patch, 16)


@torch.no_grad()
def test_the_loss_is_that_of_every_token_but_pads() -> None:
    model = tiny_discrete().double()
    batch = torch.randint(0, WORDS, (3, 9), generator=torch.Generator().manual_seed(0))
    batch[1, 6:] = WORDS
    batch[2, 1:] = WORDS  # one token, behind which nothing follows
    batch[0, :2] = WORDS  # what stands before a text is hidden, and its first token is not predicted
    total, count = 0.0, 0
    for row in batch:
        row = row[row != WORDS]
        log = model(input_ids=row[None]).logits[0].log_softmax(-1)
        total -= sum(float(log[at, token]) for at, token in enumerate(row[1:].tolist()))
        count += len(row) - 1
    assert count == 6 + 5 and float(DiscreteTexts(model, WORDS)(batch, 0.0)["loss"]) == pytest.approx(total / count)
    assert float(DiscreteTexts(model, WORDS)(batch[2:], 0.0)["loss"]) == 0


def test_it_learns_and_opens_again(tmp_path: Path) -> None:
    model = new_discrete(windows(), BACKBONE, seed=1)
    untrained = float(DiscreteTexts(model, WORDS)(windows()[0][None], 0.0)["loss"].detach())
    train_discrete(model, windows(), settings(steps=60, learning_rate=2e-2), tmp_path, tokenizer=words())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert float(DiscreteTexts(opened, WORDS)(windows()[0][None], 0.0)["loss"].detach()) < 0.2 * untrained
    assert (
        opened.config.pad_token_id == WORDS
        and opened.config.eos_token_id == 0
        and opened.config.vocab_size == WORDS + 1
    )
    assert (tmp_path / "tokenizer.json").is_file() and (tmp_path / "metrics.jsonl").is_file()


def test_windows_of_chunks_are_read_token_by_token(tmp_path: Path) -> None:
    model = new_discrete(windows(3), BACKBONE)
    result = train_discrete(model, windows(3), settings(), tmp_path)
    assert result.finished and result.metrics["loss"] > 0 and windows(3)[0].shape == (48,)


def test_a_run_that_was_broken_off_ends_with_the_same_weights(tmp_path: Path) -> None:
    def run(out: str, resume: bool = False, seed: int = 0, **changes: Any) -> None:
        torch.manual_seed(len(out))  # what was drawn before must not matter
        model = new_discrete(windows(), {**BACKBONE, "attention_dropout": 0.2}, seed)
        train_discrete(model, windows(), settings(**changes), tmp_path / out, resume=resume)

    run("whole")
    run("parts", max_minutes=1e-9)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    run("parts", resume=True)
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(QuickmergeError, match="fingerprint weights was"):
        run("parts", resume=True, seed=1)


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match=r"model_type.*did you mean 'llama'"):
        new_discrete(windows(), {**BACKBONE, "model_type": "lama"})
    with pytest.raises(QuickmergeError, match="vocab_size of backbone must be that of the texts, 25, got 9"):
        new_discrete(windows(), {**BACKBONE, "vocab_size": 9})
    model = new_discrete(windows(), BACKBONE)
    model.resize_token_embeddings(WORDS + 2)
    with pytest.raises(QuickmergeError, match="vocab_size of the model must be that of the texts, 25, got 26"):
        train_discrete(model, windows(), settings(), tmp_path)
