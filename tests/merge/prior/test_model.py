"""The prior as a whole: what it predicts from, what it corrects, how it is stored."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import generator, prop, seeds

from quickmerge.errors import QuickmergeError
from quickmerge.merge.prior import Prior, PriorConfig
from quickmerge.merge.prior.model import BACKWARD, FORWARD
from quickmerge.merge.reducers import Uniform
from quickmerge.merge.tokens import TokenView


def build(seed: int = 0, dtype: torch.dtype = torch.float64, **more) -> Prior:
    """A small prior with every weight drawn, the zero ones too."""
    torch.manual_seed(seed)
    prior = Prior(PriorConfig(**{"features": 6, "width": 16, "layers": 2, "heads": 2, "depths": (1, 3), **more}))
    for parameter in prior.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.3)
    return prior.to(dtype).eval()


def tokens(n: int, seed: int, batch: int = 2) -> TokenView:
    return TokenView(hidden=torch.randn(batch, n, 6, generator=generator(seed), dtype=torch.float64))


@given(n=st.integers(6, 24), seed=seeds, head=st.sampled_from(["gaussian", "mixture"]))
@prop(20)
def test_a_slot_is_predicted_from_those_before_it_only(n: int, seed: int, head: str) -> None:
    prior, view = build(head=head), tokens(n, seed)
    view.hidden.requires_grad_()
    plan = Uniform(keep=0.5).plan(view)
    encoded = prior.encode(view, plan)
    _, ahead = prior.next_loss(encoded, prior.read(encoded, plan.position, plan.valid), view, plan, FORWARD)
    _, back = prior.next_loss(encoded, prior.read(encoded, plan.position, plan.valid, BACKWARD), view, plan, BACKWARD)
    for k in range(plan.slots - 1):
        # Targets are detached, so what gradient there is comes through what was read.
        (grad,) = torch.autograd.grad(ahead[:, k].sum(), view.hidden, retain_graph=True)
        assert bool((grad[plan.slot > k] == 0).all()) and bool((grad[plan.slot == k] != 0).any())
        (grad,) = torch.autograd.grad(back[:, k].sum(), view.hidden, retain_graph=True)
        assert bool((grad[plan.slot <= k] == 0).all()) and bool((grad[plan.slot == k + 1] != 0).any())


def test_corrections_are_causal_and_of_the_tokens_type() -> None:
    prior, view = build(), tokens(20, 1)
    plan = Uniform(keep=0.5).plan(view)
    added = prior.align(view, plan)
    assert set(added) == {1, 3} and added[1].shape == (2, plan.slots, 6)
    later = view.hidden.clone()
    later[:, 12:] += 1
    changed = prior.align(TokenView(hidden=later), plan)
    before = plan.position[0] < 10
    for depth in added:
        assert torch.equal(added[depth][:, before], changed[depth][:, before])
        assert not torch.equal(added[depth], changed[depth])
    half = prior.float().align(TokenView(hidden=view.hidden.bfloat16()), plan)
    assert half[1].dtype == torch.bfloat16


def test_a_new_prior_corrects_nothing() -> None:
    torch.manual_seed(0)
    prior = Prior(PriorConfig(features=6, width=16, heads=2, depths=(2,)))
    view = TokenView(hidden=torch.randn(1, 10, 6))
    assert not bool(prior.align(view, Uniform(keep=0.5).plan(view))[2].any())


def test_targets_have_scale_one_after_calibration() -> None:
    prior = build(dtype=torch.float32)
    slots = torch.randn(500, 6, generator=generator(0)) * torch.tensor([1.0, 5, 0.1, 1, 2, 3]) + 2
    prior.calibrate(slots)
    target = prior.target(slots)
    torch.testing.assert_close(target.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(target.std(0), torch.ones(6), atol=1e-3, rtol=0)


def test_stored_and_loaded_is_the_same(tmp_path) -> None:
    prior = build(dtype=torch.float32, head="mixture", head_settings={"components": 3})
    prior.save_pretrained(tmp_path / "p")
    again = Prior.from_pretrained(tmp_path / "p")
    assert again.config == prior.config and not again.training
    for name, tensor in prior.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["config.json", "model.safetensors"]
    prior.save_pretrained(tmp_path / "p", dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "p" / "model.safetensors").values()} == {torch.float16}
    assert next(Prior.from_pretrained(tmp_path / "p").parameters()).dtype == torch.float32


def test_what_is_wrong_with_a_folder_is_said(tmp_path) -> None:
    with pytest.raises(QuickmergeError, match=r"prior must be a folder with config.json and model.safetensors, got"):
        Prior.from_pretrained(tmp_path / "nothing")
    build(dtype=torch.float32).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    first = sorted(weights)[0]

    def store(**changed: torch.Tensor | None) -> None:
        state = {**weights, **changed}
        save_file({k: v for k, v in state.items() if v is not None}, tmp_path / "model.safetensors")

    for change, message in [
        ({first: None}, f"does not fit its config.json: it lacks {first}"),
        ({"more": torch.zeros(1)}, "does not fit its config.json: it has the unknown entry more"),
        ({first: torch.zeros(3, 5)}, rf"{first} must have shape .*, got \(3, 5\)"),
        ({first: torch.full_like(weights[first], torch.nan)}, f"{first} holds values that are not finite"),
    ]:
        store(**change)
        with pytest.raises(QuickmergeError, match=message):
            Prior.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(QuickmergeError, match="is damaged"):
        Prior.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(QuickmergeError, match="is missing"):
        Prior.from_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"kind": "llama"}, "must belong to a prior"),
        ({"widht": 3}, "unknown entry 'widht' .did you mean 'width'"),
        ({"width": 15}, "width must be a multiple of pool and of twice heads, got width=15"),
        ({"head": "gausian"}, "did you mean 'gaussian'"),
        ({"axes": 4}, "axes must be 1 .text., 2 .images. or 3 .video., got 4"),
        ({"directions": "up"}, "directions must be one of forward, both, got 'up'"),
        ({"depths": [3, 1]}, "depths must be rising whole numbers"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(QuickmergeError, match=message):
            Prior.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(QuickmergeError, match="must be JSON"):
        Prior.from_pretrained(tmp_path)


def test_other_widths_are_refused() -> None:
    view = TokenView(hidden=torch.randn(1, 10, 5))
    with pytest.raises(ValueError, match="hidden must have 6 features for this prior, got 5"):
        build(dtype=torch.float32).align(view, Uniform(keep=0.5).plan(view))
