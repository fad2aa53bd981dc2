"""Heads that are known by their draws, inside a prior: it learns with them, draws from them, and comes back whole."""

from __future__ import annotations

import json

import pytest
import torch
from strategies import generator
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from quickmerge.merge.prior import Prior, PriorConfig
from quickmerge.merge.prior.layout import sample
from quickmerge.merge.prior.model import FORWARD
from quickmerge.merge.prior.train_patches import images_of, train_prior_patches, view_of
from quickmerge.merge.prior.train_text import train_prior_text
from quickmerge.merge.reducers import Uniform
from quickmerge.merge.tokens import TokenView
from quickmerge.training import TrainingConfig

DRAWING = ["energy", "flow", "diffusion"]


class Shades:
    """Images of one shade each, with a little noise: after its first patch an image is known."""

    def __init__(self, count: int, seed: int = 0) -> None:
        draws = generator(seed)
        shade = torch.rand(count, 1, 1, 1, generator=draws).expand(count, 1, 8, 8)
        self.items = (shade + 0.02 * torch.randn(count, 1, 8, 8, generator=draws)).clamp(0, 1)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        return self.items[index]

    def fingerprint(self) -> str:
        return str(float(self.items.sum()))


@pytest.mark.parametrize("head", ["flow", "diffusion"])  # of energy's slow start there docs/methods tells
def test_a_prior_of_images_learns_and_draws(head: str, tmp_path) -> None:
    config = TrainingConfig(steps=120, batch=32, learning_rate=5e-3, save_every=120)
    done = train_prior_patches(
        Shades(256), config, tmp_path, keeps=[1.0], patch=4, kind="images", width=32, layers=1, heads=2, head=head,
        directions="forward",
    )  # fmt: skip
    assert done.finished
    prior = Prior.from_pretrained(tmp_path)
    assert prior.config.head == head and prior.config.generates
    pictures = Shades(64, seed=1).items
    view = view_of(pictures, 4)
    plan = Uniform(keep=1.0).plan(view)
    drawn = sample(prior, view, plan, start=1, generator=generator(2))
    again = sample(prior, view, plan, start=1, generator=generator(2))
    other = sample(prior, view, plan, start=1, generator=generator(3))
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)
    assert torch.equal(drawn[:, 0], view.hidden[:, 0])
    # Three patches are drawn given the first: their shade is its own.
    shade = images_of(drawn, 4, (8, 8)).mean((1, 2, 3))
    error = (shade - pictures.mean((1, 2, 3))).square().mean()
    assert float(error) < 0.2 * float(pictures.mean((1, 2, 3)).var())
    with pytest.raises(ValueError, match=f"temperature must be 1 for the {head} head"):
        sample(prior, view, plan, start=1, temperature=0.5)


@pytest.mark.parametrize("head", DRAWING)
def test_a_prior_of_a_language_model_learns_with_it(head: str, tmp_path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.3, **shape)).eval()

    class Repeated:
        ids = torch.randint(2, 32, (16, 5), generator=generator(0)).repeat(1, 9)[:, :42]

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, index: int) -> Tensor:
            return self.ids[index]

    config = TrainingConfig(steps=60, batch=8, learning_rate=5e-3, log_every=1, save_every=60)
    done = train_prior_text(
        model, Repeated(), config, tmp_path, name="tiny", keeps=[0.5], layer=1, context=36, width=16, layers=1,
        heads=2, head=head,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert done.finished and len(lines) == 60
    for name in ("ar", "ar_back"):
        values = [line[name] for line in lines]
        assert sum(values[-10:]) < 0.95 * sum(values[:10]), name
    assert Prior.from_pretrained(tmp_path).config.head == head


@pytest.mark.parametrize("head", DRAWING)
def test_what_is_predicted_hangs_on_what_was_read(head: str) -> None:
    """The loss of each slot has a gradient to slots before it, and to none behind."""
    torch.manual_seed(0)
    prior = Prior(PriorConfig(features=6, width=16, heads=2, head=head)).double().eval()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    view = TokenView(hidden=torch.randn(2, 12, 6, generator=generator(1), dtype=torch.float64).requires_grad_())
    plan = Uniform(keep=0.5).plan(view)
    encoded = prior.encode(view, plan)
    _, each = prior.next_loss(encoded, prior.read(encoded, plan.position, plan.valid), view, plan, FORWARD)
    assert bool(torch.isfinite(each).all())
    for k in range(plan.slots - 1):
        (grad,) = torch.autograd.grad(each[:, k].sum(), view.hidden, retain_graph=True)
        assert bool((grad[plan.slot > k] == 0).all()) and bool((grad[plan.slot == k] != 0).any())
