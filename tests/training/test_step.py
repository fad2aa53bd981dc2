from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from training_samples import NamedPoints, Points, Small, lines, same, saved, settings

from quickmerge.errors import QuickmergeError
from quickmerge.training import Objective, loop, train
from quickmerge.training.checkpoint import load
from quickmerge.training.metrics import Stream
from quickmerge.training.step import start


class Returning(Objective):
    """Returns what it is told to, times a parameter."""

    def __init__(self, **metrics: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.metrics = metrics

    def forward(self, batch: Any, progress: float) -> dict[str, Tensor]:
        return {name: value * self.weight for name, value in self.metrics.items()}


def test_a_step_is_adamws(tmp_path: Path) -> None:
    """Written out: mean gradient over the items, clipped, AdamW, no decay of the biases."""
    config = settings(steps=3, accumulate=2, weight_decay=0.2, clip=0.1, schedule="linear", final=0.0, betas=(0.8, 0.9))
    objective, slow = Small(dropout=0), Small(dropout=0)
    train(objective, Points(), config, tmp_path)
    dataset, stream = Points(), Stream(37, 0)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in slow.named_parameters()}
    for step, rate in enumerate([1e-2, 5e-3, 0.0]):
        items = [dataset[index] for index in stream.take(8 * step, 8 * step + 8)]
        loss = slow([torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])], 0.0)["loss"]
        names, parameters = zip(*slow.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        assert norm > 0.1
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
            gradient = gradient * 0.1 / norm
            first = 0.8 * moments[name][0] + 0.2 * gradient
            second = 0.9 * moments[name][1] + 0.1 * gradient**2
            moments[name] = first, second
            t = step + 1
            update = (first / (1 - 0.8**t)) / ((second / (1 - 0.9**t)).sqrt() + 1e-8)
            decay = 0.2 if parameter.ndim > 1 else 0.0
            with torch.no_grad():
                parameter.sub_(rate * (update + decay * parameter))
    for (name, one), (_, other) in zip(objective.named_parameters(), slow.named_parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5), name


def test_accumulation_equals_a_bigger_batch(tmp_path: Path) -> None:
    one, other = Small(dropout=0), Small(dropout=0)
    train(one, Points(), settings(batch=8), tmp_path / "one")
    train(other, Points(), settings(batch=2, accumulate=4), tmp_path / "other")
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    for first, second in zip(lines(tmp_path / "one"), lines(tmp_path / "other"), strict=True):
        assert first == pytest.approx(second, abs=1e-5)


def test_processes_exchange_gradients_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, real = [], Accelerator.no_sync
    monkeypatch.setattr(Accelerator, "no_sync", lambda self, model: quiet.append(model) or real(self, model))
    train(Small(), Points(), settings(accumulate=3), tmp_path)
    assert len(quiet) == 12 * 2


def test_without_a_limit_the_norm_is_measured_all_the_same(tmp_path: Path) -> None:
    train(Small(), Points(), settings(clip=None), tmp_path)
    assert all(line["grad_norm"] > 0 for line in lines(tmp_path))


def test_progress_goes_from_nothing_to_the_last_step(tmp_path: Path) -> None:
    objective = Small()
    train(objective, Points(), settings(steps=4), tmp_path)
    assert objective.progress == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(("dataset", "word"), [(NamedPoints, "point "), (Points, "")])
def test_a_loss_that_is_not_finite_stops_and_names_step_and_items(
    tmp_path: Path, dataset: type[Points], word: str
) -> None:
    micro = Stream(37, 0).micro_steps(6, batch=2, accumulate=2)
    objective = Small()
    with pytest.raises(QuickmergeError) as caught:
        train(objective, dataset(broken=micro[1][0]), settings(batch=2, accumulate=2), tmp_path)
    items = f"{word}{micro[1][0]}, {word}{micro[1][1]}"
    assert f"the loss is not finite (NaN or infinite) at step 7, on the items {items}:" in str(caught.value)
    assert saved(tmp_path) == ["step-000005"]
    assert all(value.isfinite().all() for value in objective.parameters())
    assert load(tmp_path / "checkpoints" / "step-000005").step == 5


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


class InfiniteGradient(Returning):
    def forward(self, batch: Any, progress: float) -> dict[str, Tensor]:
        return {"loss": _InfiniteGradient.apply(self.weight)}


def test_a_gradient_that_is_not_finite_stops_and_names_the_first_items(tmp_path: Path) -> None:
    objective = InfiniteGradient()
    with pytest.raises(QuickmergeError, match=r"the gradient is not finite .* at step 1, .* and 4 more:"):
        train(objective, Points(), settings(batch=20), tmp_path)
    assert objective.weight.item() == 1 and objective.weight.grad is None


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({"lose": torch.ones(())}, "must return a dict of tensors with 'loss' among them"),
        ({"loss": torch.ones(2)}, "scalar tensors, got .* for 'loss'"),
        ({"loss": torch.ones(()), "step": torch.ones(())}, "must not be called 'step'"),
    ],
)
def test_an_objective_that_returns_the_wrong_thing_is_told_so(tmp_path: Path, metrics: Any, told: str) -> None:
    with pytest.raises(QuickmergeError, match=told):
        train(Returning(**metrics), Points(), settings(), tmp_path)


def test_bf16_computes_in_bf16_and_keeps_float32_weights(tmp_path: Path) -> None:
    seen = set()

    class Watching(Small):
        def forward(self, batch: list[Tensor], progress: float) -> dict[str, Tensor]:
            seen.add(self.net(batch[0]).dtype)
            return super().forward(batch, progress)

    rounded, exact = Watching(), Small()
    train(rounded, Points(), settings(precision="bf16"), tmp_path / "bf16")
    train(exact, Points(), settings(), tmp_path / "no")
    assert seen == {torch.bfloat16}
    assert {value.dtype for value in rounded.parameters()} == {torch.float32}
    assert not same(rounded, exact)
    assert "forward" not in vars(rounded)
    assert rounded([torch.ones(2, 4), torch.ones(2, 1)], 0.0)["loss"].dtype == torch.float32
    assert lines(tmp_path / "bf16")[-1]["loss"] == pytest.approx(lines(tmp_path / "no")[-1]["loss"], rel=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is for GPUs")
def test_fp16_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match="precision must be no or bf16 on the device cpu, got fp16"):
        train(Small(), Points(), settings(precision="fp16"), tmp_path)


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 as on a GPU, but on whatever is here: accelerate refuses a CPU, torch does not."""

    def begin(precision: str, uses_every_parameter: bool, *trackers: Any) -> Accelerator:
        accelerator = start("no", uses_every_parameter, *trackers)
        AcceleratorState().__dict__["_mixed_precision"] = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=2.0**20, growth_interval=4)
        return accelerator

    monkeypatch.setattr(loop, "start", begin)


@pytest.mark.usefixtures("fp16")
def test_fp16_skips_steps_that_overflow_and_resumes_with_its_loss_scale(tmp_path: Path) -> None:
    config = settings(steps=20, save_every=4, precision="fp16", log_every=1)
    whole, stopped = Small(), Small()
    train(whole, Points(), config, tmp_path / "whole")
    norms = [line["grad_norm"] for line in lines(tmp_path / "whole")]
    assert norms[0] is None and norms[-1] is not None  # the first scale is too high, and halved until it fits
    train(stopped, Points(), replace(config, max_minutes=1e-9), tmp_path / "stopped")
    assert load(tmp_path / "stopped" / "checkpoints" / "step-000001").state["loss_scale"]["scale"] == 2.0**19
    train(stopped, Points(), config, tmp_path / "stopped", resume=True)
    assert same(whole, stopped) and lines(tmp_path / "whole") == lines(tmp_path / "stopped")


@pytest.mark.usefixtures("fp16")
def test_fp16_stops_when_the_loss_or_at_any_scale_the_gradient_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match="the loss is not finite"):
        train(Small(), Points(broken=0), settings(precision="fp16"), tmp_path / "loss")
    with pytest.raises(QuickmergeError, match=r"the gradient is not finite .* at step 35,"):
        train(InfiniteGradient(), Points(), settings(precision="fp16", steps=100), tmp_path / "gradient")
