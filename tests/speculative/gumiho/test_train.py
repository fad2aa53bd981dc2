"""Training draft heads for a tiny language model: they come to draft what it writes, and runs resume exactly."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.speculative.gumiho import Gumiho, LossWeights
from quickmerge.speculative.gumiho.self_answers import Answered
from quickmerge.speculative.gumiho.texts import DraftTexts, collate_texts, keep_features
from quickmerge.speculative.gumiho.train import GumihoText, feature_scale, train_gumiho
from quickmerge.training import TrainingConfig

QUICK = LossWeights(token=1.0, heads=1.0, wait=0.0)
"""Cross-entropies from the start on: a short run learns more by them than by distances."""


@pytest.fixture
def model() -> Any:
    """Two layers with large random weights: what it writes depends on what stands before."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.25, tie_word_embeddings=False, bos_token_id=0,
            eos_token_id=None,
        )
    ).eval()  # fmt: skip


def answers(model: Any, count: int = 64, length: int = 24, seed: int = 0) -> DraftTexts:
    torch.manual_seed(seed)
    prompts = torch.randint(2, 32, (count, 3))
    rows = model.generate(prompts, max_new_tokens=length, do_sample=True, temperature=0.5, top_k=0, pad_token_id=0)
    return DraftTexts(None, [Answered(tuple(row[:3]), tuple(row[3:])) for row in rows.tolist()], length=length + 3)


def settings(**changes: Any) -> TrainingConfig:
    return TrainingConfig(
        **{
            "steps": 6,
            "batch": 4,
            "learning_rate": 5e-3,
            "weight_decay": 0.0,
            "save_every": 2,
            "log_every": 1,
            **changes,
        }
    )


def tokens_per_pass(model: Any, made: Gumiho, tree: int = 6) -> float:
    prompts = torch.randint(2, 32, (12, 3), generator=torch.Generator().manual_seed(9))
    engine = qm.SpeculativeDecoding(made, tree=tree)
    text = model.generate(prompts, max_new_tokens=24, do_sample=False, custom_generate=engine, pad_token_id=0)
    assert torch.equal(text, model.generate(prompts, max_new_tokens=24, do_sample=False, pad_token_id=0))
    return engine.stats.tokens_per_pass


SHAPES = {
    "gumiho": {"serial": 2, "serial_layers": 1, "heads": 2},
    "serial": {"serial": 3, "serial_layers": 1, "heads": 0},
    "parallel": {"serial": 0, "serial_layers": 0, "heads": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_trained_heads_are_accepted_more_often(model: Any, tmp_path: Path, shape: str) -> None:
    """Than untrained ones, and than always drafting the most frequent tokens could be."""
    more = {"mlp_depth": 2, "inner": 32, **SHAPES[shape]}
    result = train_gumiho(
        model, answers(model), settings(steps=120, batch=16, save_every=120), tmp_path, name="tiny", weights=QUICK,
        noise=0.0, **more,
    )  # fmt: skip
    assert result.finished
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(line["loss"] for line in part) for part in (lines[:10], lines[-10:]))
    assert last < first
    made = Gumiho.from_pretrained(tmp_path)
    assert made.config.trained_for["model"] == "tiny"
    torch.manual_seed(0)
    fresh = Gumiho.new(model, **more)
    trained, untrained = tokens_per_pass(model, made), tokens_per_pass(model, fresh)
    assert trained > untrained + 0.15, (trained, untrained)


def test_parallel_heads_learn_too(model: Any, tmp_path: Path) -> None:
    """Each head comes nearer to its own tokens; the first ones, whose task is easier, nearest."""
    train_gumiho(
        model, answers(model), settings(steps=120, batch=16, save_every=120), tmp_path, name="tiny", weights=QUICK,
        noise=0.0, mlp_depth=2, inner=32, **SHAPES["gumiho"],
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("token", "token_1", "token_2", "feature", "feature_1", "feature_2"):
        assert sum(line[name] for line in lines[-10:]) < sum(line[name] for line in lines[:10]), name
    last = {name: sum(line[name] for line in lines[-30:]) for name in ("agree", "agree_1", "agree_2")}
    assert last["agree"] > last["agree_1"] > last["agree_2"] * 0.9


def test_features_kept_or_read_again_train_the_same(model: Any) -> None:
    texts = answers(model, 8)
    torch.manual_seed(0)
    network = Gumiho.new(model, mlp_depth=2).network
    goal = GumihoText(model, network, noise=0.0)
    read = goal(collate_texts([texts[i] for i in range(8)]), 0.5)
    keep_features(model, texts, {})
    kept = goal(collate_texts([texts[i] for i in range(8)]), 0.5)
    for name, value in read.items():
        torch.testing.assert_close(kept[name], value, atol=0.03, rtol=0.02)
    assert "features" in texts[0] and not any("model" in name for name, _ in goal.named_parameters())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_stopped_run_goes_on_to_the_same_weights(model: Any, tmp_path: Path, precision: str) -> None:
    """With noise, a share and a draft vocabulary, so that the run depends on its random numbers."""

    texts = answers(model, 10)

    def run(out: str, resume: bool = False, share: float = 0.6, **changes: Any) -> None:
        torch.manual_seed(len(out))  # what was drawn before must not matter
        train_gumiho(
            deepcopy(model), texts, settings(precision=precision, **changes), tmp_path / out, name="tiny",
            draft_vocabulary=20, share=share, resume=resume, mlp_depth=2, inner=16,
        )  # fmt: skip

    run("whole")
    run("parts", max_minutes=1e-9)
    run("parts", resume=True)
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not [path for path in (tmp_path / "parts").rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    with pytest.raises(QuickmergeError, match="fingerprint share was"):
        run("parts", resume=True, share=0.5)


def test_bfloat16_and_half_files(model: Any, tmp_path: Path) -> None:
    texts = answers(model, 8)
    train_gumiho(model, texts, settings(precision="bf16"), tmp_path, name="tiny", half=True, mlp_depth=2)
    state = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert model.dtype == torch.bfloat16
    Gumiho.from_pretrained(tmp_path).check(model.float())


def test_the_scale_of_features(model: Any) -> None:
    texts = answers(model, 40)
    with torch.no_grad():
        hidden = [model.base_model(texts[i]["ids"][None]).last_hidden_state for i in range(40)]
    scale = feature_scale(model, texts)
    assert scale == pytest.approx(float(torch.cat(hidden).square().mean().sqrt()), rel=0.05)
    assert scale == float(f"{scale:.3g}")
    keep_features(model, texts, {})
    assert feature_scale(model, texts) == pytest.approx(scale, rel=0.01)


def test_what_does_not_fit_is_told(model: Any, tmp_path: Path) -> None:
    texts = answers(model, 8)
    with pytest.raises(ValueError, match=r"share must be a number in \(0, 1\], got 0"):
        train_gumiho(model, texts, settings(), tmp_path, name="tiny", share=0)
    with pytest.raises(ValueError, match="noise must be a number of at least 0, got -1"):
        train_gumiho(model, texts, settings(), tmp_path, name="tiny", noise=-1)
    with pytest.raises(ValueError, match=r"unknown setting 'head' of the draft heads .did you mean 'heads'"):
        train_gumiho(model, texts, settings(), tmp_path, name="tiny", head=3)
    other = DraftTexts(None, [Answered((5, 40), (41, 6, 7))], length=10)
    with pytest.raises(QuickmergeError, match="texts must be made of the model's 32 tokens, got token 41"):
        train_gumiho(model, other, settings(), tmp_path, name="tiny")
