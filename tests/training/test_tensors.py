import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training_samples import Small, same

from quickmerge.errors import QuickmergeError
from quickmerge.training.checkpoint import (
    load_model,
    load_optimizer,
    model_tensors,
    optimizer_tensors,
    trained_parameters,
)


def stepped() -> tuple[Small, torch.optim.AdamW]:
    objective = Small()
    optimizer = torch.optim.AdamW(objective.parameters())
    objective([torch.ones(2, 4), torch.ones(2, 1)], 0.0)["loss"].backward()
    optimizer.step()
    return objective, optimizer


def test_only_what_is_trained_and_buffers_are_saved() -> None:
    objective = Small()
    objective.net[0].weight.requires_grad_(False)
    assert sorted(model_tensors(objective)) == ["net.0.bias", "net.3.bias", "net.3.weight", "seen"]


def test_tied_and_viewed_tensors_are_saved_once_and_apart() -> None:
    objective = Small()
    objective.again = objective.net
    objective.register_buffer("part", torch.arange(6)[2:4])
    tensors = model_tensors(objective)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == len(tensors)
    assert sum("weight" in name for name in tensors if name in trained_parameters(objective)) == 2


def test_model_and_optimizer_come_back() -> None:
    objective, optimizer = stepped()
    other = Small()
    load_model(other, model_tensors(objective), "here")
    assert same(other, objective)
    adamw = torch.optim.AdamW(other.parameters())
    tensors = optimizer_tensors(optimizer, trained_parameters(objective))
    load_optimizer(adamw, trained_parameters(other), tensors, "here")
    again = optimizer_tensors(adamw, trained_parameters(other))
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items()) and len(again) == 12


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", [{}, {"fused": True}, {"capturable": True}])
def test_the_state_lies_where_torchs_own_loader_puts_it(device: str, kind: dict[str, bool]) -> None:
    """A pretended GPU: shapes, types and devices are as there, and torch refuses there what lies on another one."""
    if device == "cpu" and "capturable" in kind:
        pytest.skip("torch captures on accelerators only")
    with FakeTensorMode(allow_non_fake_inputs=True):

        def made() -> tuple[nn.Parameter, torch.optim.AdamW]:
            parameter = nn.Parameter(torch.zeros(3, 3, device=device))
            return parameter, torch.optim.AdamW([{"params": [parameter], "group": "all"}], **kind)

        (first, before), (second, after), (third, theirs) = made(), made(), made()
        first.grad = torch.ones_like(first)
        before.step()
        load_optimizer(after, {"p": second}, optimizer_tensors(before, {"p": first}), "here")
        theirs.load_state_dict(before.state_dict())
        for key, value in theirs.state[third].items():
            assert after.state[second][key].device == value.device == before.state[first][key].device, key
            assert after.state[second][key].dtype == value.dtype
        assert after.param_groups[0]["group"] == "all"
        second.grad = torch.ones_like(second)
        after.step()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop("net.0.bias"), "it has no net.0.bias"),
        (lambda tensors: tensors.update(more=torch.ones(1)), "it holds more, which the objective has not"),
        (
            lambda tensors: tensors.update({"net.0.bias": torch.ones(3)}),
            r"net.0.bias is float32 \(3,\) there and float32 \(16,\) in the objective",
        ),
        (lambda tensors: tensors.update({"net.0.bias": torch.ones(16).half()}), r"net.0.bias is float16 \(16,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_change_nothing(change: object, told: str) -> None:
    objective, _ = stepped()
    tensors = model_tensors(objective)
    change(tensors)  # type: ignore[operator]
    other = Small()
    with pytest.raises(QuickmergeError, match=f"here does not fit the objective: {told}"):
        load_model(other, tensors, "here")
    assert same(other, Small())


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("net.0.bias.exp_avg", None, "it has no net.0.bias.exp_avg"),
        ("net.0.bias.step", None, "it holds net.0.bias.exp_avg"),
        ("net.0.bias.exp_avg_sq", torch.ones(2), "net.0.bias.exp_avg_sq is float32"),
        ("other.step", torch.ones(()), "it holds other.step"),
    ],
)
def test_optimizer_tensors_that_do_not_fit_are_named(name: str, tensor: torch.Tensor | None, told: str) -> None:
    objective, optimizer = stepped()
    tensors = optimizer_tensors(optimizer, trained_parameters(objective))
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    with pytest.raises(QuickmergeError, match=told):
        load_optimizer(torch.optim.AdamW(objective.parameters()), trained_parameters(objective), tensors, "here")
