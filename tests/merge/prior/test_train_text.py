"""Training a prior for a tiny language model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from caches import past
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.attach import reduce
from quickmerge.merge.prior import CollapseError, Prior, PriorConfig, QuickMergePrior
from quickmerge.merge.prior.train_text import PriorText, Weights, default_depths, gate_pull, train_prior_text
from quickmerge.models.identity import model_hash
from quickmerge.training import TrainingConfig

SETTINGS = {"layers": 1, "window": 8, "pool": 1}
CONTEXT, TARGET = 90, 12


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """Two layers with large random weights, so that attention is far from flat and a context matters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()


class Windows:
    """Random texts that repeat themselves, so that a context is worth reading."""

    def __init__(self, count: int, seed: int = 0) -> None:
        draws = torch.Generator().manual_seed(seed)
        piece = torch.randint(2, 64, (count, 13), generator=draws)
        self.ids = piece.repeat(1, 8)[:, : CONTEXT + TARGET]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[index]


def objective(model, **more) -> PriorText:
    torch.manual_seed(0)
    trained_for = {"model": "tiny", "hash": model_hash(model), "layers": [1], "decay": 0.7, "reducer": SETTINGS}
    config = PriorConfig(
        features=32, width=16, heads=2, depths=(1,), trained_for=trained_for, directions=more.pop("directions", "both")
    )
    return PriorText(model, Prior(config), keeps=[0.4], context=CONTEXT, settings=SETTINGS, **more)


def test_an_untrained_prior_scores_as_the_training_free_method(tiny_llama) -> None:
    """With no noise the losses are those of plain QuickMerge, computed here the way evaluation does it."""
    from transformers import DynamicCache

    batch = torch.stack([Windows(3)[i] for i in range(3)])
    told = objective(tiny_llama).eval()(batch, 0.0)
    with torch.no_grad():
        full = tiny_llama(batch).logits[:, CONTEXT:-1].log_softmax(-1)
        cache = DynamicCache(config=tiny_llama.config)
        plain = qm.QuickMerge(keep=0.4, recency=0.85, spans="none", **SETTINGS)
        with reduce(tiny_llama, plain, 1, min_tokens=0):
            tiny_llama(batch[:, :CONTEXT], **past(cache), logits_to_keep=1)
            merged = tiny_llama(batch[:, CONTEXT:-1], **past(cache)).logits.log_softmax(-1)
    torch.testing.assert_close(told["kl"], (full.exp() * (full - merged)).sum(-1).mean())
    torch.testing.assert_close(told["nll"], -merged.gather(-1, batch[:, CONTEXT + 1 :, None]).mean())


def test_gradients_reach_every_part_and_not_the_model(tiny_llama) -> None:
    torch.manual_seed(0)
    goal = objective(tiny_llama, weights=Weights(ar=1.0))
    for parameter in goal.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.1)
    goal.train()(torch.stack([Windows(2)[0], Windows(2)[1]]), 0.0)["loss"].backward()
    for name, parameter in goal.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name
    assert all(p.grad is None for p in tiny_llama.parameters())
    assert not any("llama" in name or "lm_head" in name for name, _ in goal.named_parameters())


def test_correction_gradients_are_those_of_finite_differences() -> None:
    """Through the cache, the merge and the frozen blocks, in float64 (Llama's norms would compute in float32)."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, initializer_range=0.3, **sizes)).double().eval()
    goal = objective(model, temperature=(0.0, 0.0), weights=Weights(ar=0.1)).double().eval()
    layer = goal.prior.corrections["1"]
    torch.nn.init.normal_(layer.weight, std=0.1)
    batch = Windows(2).ids
    loss = goal(batch, 0.0)["loss"]
    loss.backward()
    step = 1e-5
    for parameter, place in [
        (layer.weight, (3, 5)), (layer.bias, (7,)), (goal.prior.encoder.member.weight, (2, 9)),
        (goal.prior.encoder.weight.weight, (1, 4)), (goal.prior.trunk.blocks[0].up.weight, (6, 6)),
    ]:  # fmt: skip
        with torch.no_grad():
            parameter[place] += step
            above = goal(batch, 0.0)["loss"]
            parameter[place] -= 2 * step
            below = goal(batch, 0.0)["loss"]
            parameter[place] += step
        torch.testing.assert_close(parameter.grad[place], (above - below) / (2 * step), atol=1e-7, rtol=1e-4)


def test_gate_pull_is_nothing_forward_and_the_worth_of_a_token_backward() -> None:
    from quickmerge.merge.tokens import MergePlan, TokenView
    from quickmerge.merge.tokens.plan import next_anchor

    view = TokenView(hidden=torch.randn(1, 6, 3, dtype=torch.float64))
    anchor = torch.tensor([[True, False, True, False, False, True]])
    plan = MergePlan.from_anchors(view, anchor, next_anchor(view, anchor))
    slots = plan.merge(view.hidden)
    gate = anchor.double().requires_grad_()
    pull = gate_pull(plan, gate, slots)
    assert not bool(pull.any())
    worth = torch.randn(1, 3, 3, dtype=torch.float64)
    (grad,) = torch.autograd.grad((pull * worth).sum(), gate)
    follower = torch.cat([slots[:, 1:], slots[:, -1:]], 1)
    torch.testing.assert_close(grad[0, [0, 2, 5]], ((slots - follower) * worth).sum(-1)[0])
    assert not bool(grad[0, [1, 3, 4]].any())


@pytest.mark.parametrize("head", ["gaussian", "mixture", "energy"])
def test_training_lowers_the_loss_and_the_prior_can_be_used(tiny_llama, tmp_path, head) -> None:
    config = TrainingConfig(steps=40, batch=4, learning_rate=5e-3, log_every=1, save_every=20)
    result = train_prior_text(
        tiny_llama, Windows(32), config, tmp_path, name="tiny", keeps=[0.3], layer=1, context=CONTEXT,
        reducer=SETTINGS, width=16, heads=2, head=head,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result.finished and len(lines) == 40
    ar = [line["ar"] for line in lines]
    assert sum(ar[-10:]) < sum(ar[:10])
    assert all(line["spread"] > 0.5 for line in lines)
    prior = Prior.from_pretrained(tmp_path)
    reducer = QuickMergePrior.from_prior(prior, keep=0.3)
    assert (reducer.window, prior.config.trained_for["model"]) == (8, "tiny")
    with reduce(tiny_llama, reducer, 1, min_tokens=0) as run:
        tiny_llama.generate(Windows(1).ids, max_new_tokens=3, pad_token_id=0)
    assert "of the reducer's weights" in str(run.summary())


def test_alignment_learns_to_predict_as_from_all_tokens(tiny_llama, tmp_path) -> None:
    windows, settings = Windows(8), {**SETTINGS, "recency": 0.2}
    config = TrainingConfig(steps=150, batch=8, learning_rate=1e-2, log_every=10)
    train_prior_text(
        tiny_llama, windows, config, tmp_path, name="tiny", keeps=[0.3], layer=1, context=CONTEXT,
        reducer=settings, width=16, heads=2, weights=Weights(ar=0.0),
    )  # fmt: skip
    prior = Prior.from_pretrained(tmp_path)

    def kl() -> float:
        goal = PriorText(tiny_llama, prior, keeps=[0.3], context=CONTEXT, settings=settings)
        with torch.no_grad():
            return float(goal.eval()(windows.ids, 1.0)["kl"])

    trained = kl()
    for layer in prior.corrections.values():
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    prior.saliency = None
    assert trained < 0.7 * kl()


def test_remembered_windows_are_the_same(tiny_llama) -> None:
    memory: dict[bytes, Tensor] = {}
    plain = objective(tiny_llama).eval()(Windows(4).ids, 0.0)
    goal = objective(tiny_llama, memory=memory).eval()
    first = goal(Windows(4).ids, 0.0)
    assert len(memory) == 4
    again = goal(Windows(4).ids.flip(0).flip(0), 0.0)
    assert torch.equal(first["kl"], plain["kl"]) and torch.equal(again["kl"], first["kl"])
    memory.update({key: value + 1 for key, value in memory.items()})
    assert not torch.equal(goal(Windows(4).ids, 0.0)["kl"], first["kl"])


def test_a_collapsed_sequence_stops_the_training_and_is_named(tiny_llama) -> None:
    goal = objective(tiny_llama)
    layer = goal.prior.corrections["1"]
    with torch.no_grad():
        layer.bias.fill_(1e4)  # every slot is moved to the same far place
    with pytest.raises(CollapseError, match="the merged sequence has collapsed"):
        goal(Windows(2).ids, 0.0)


def test_default_depths_lie_where_slots_are() -> None:
    assert default_depths(qm.Schedule((8, 25), 0.15), 30) == (8, 12, 16, 20)
    assert default_depths(qm.Schedule((1,)), 2) == (1,)
    assert default_depths(qm.Schedule((2,)), 4) == (2, 3)


def test_settings_are_checked(tiny_llama, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"keeps must be shares in \(0, 1\), got \[1.0\]"):
        PriorText(tiny_llama, objective(tiny_llama).prior, keeps=[1.0], context=CONTEXT)
    with pytest.raises(ValueError, match="temperature must fall"):
        objective(tiny_llama, temperature=(0.1, 1.0))
    with pytest.raises(ValueError, match="ar must be a weight of at least 0, got -1"):
        Weights(ar=-1)
    config = TrainingConfig(steps=1, batch=1)
    with pytest.raises(ValueError, match=r"depths must lie in 1\.\.1, where slots are, got 0"):
        train_prior_text(
            tiny_llama, Windows(2), config, tmp_path, name="t", keeps=[0.4], layer=1, depths=[0], context=CONTEXT
        )
    with pytest.raises(QuickmergeError, match="at least one item"):
        train_prior_text(tiny_llama, Windows(0), config, tmp_path, name="t", keeps=[0.4], layer=1, context=CONTEXT)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path) -> None:
    """Without noise; the keeps that are drawn are those of the step, in every process."""
    script = str(Path(__file__).parents[2] / "samples" / "launched_prior.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    alone = [sys.executable, script, str(tmp_path / "one"), "4"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for command in (alone, [*launch, script, str(tmp_path / "two"), "2"]):
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)
