"""Objectives that promise a gradient for every parameter keep the promise, whatever a batch holds.

Processes that train together wait for the gradient of every parameter, and one whose batch has nothing to learn from
would let all of them wait, or die.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calm_samples import BACKBONES, HEADS, PAD, small_calm, some_ids, words_tokenizer
from torch import Tensor

from quickmerge.calm.autoencoder import nothing_of
from quickmerge.calm.texts import CalmTexts
from quickmerge.calm.train import CalmAutoencoderTexts, CalmText, DiscreteTexts, new_autoencoder, new_discrete
from quickmerge.merge.prior import Prior, PriorConfig
from quickmerge.merge.prior.train_patches import PriorPatches
from quickmerge.training.objective import Objective


def one_chunk(rows: int = 2) -> Tensor:
    """Texts of one chunk, and pads: a CALM has nothing to predict."""
    return torch.cat([some_ids(rows, 3), torch.full((rows, 9), PAD)], 1)


def calm(head: str = "energy", backbone: str = "llama") -> Objective:
    return CalmText(small_calm(3, backbone, head).train())


def coder(**shape: Any) -> Objective:
    texts = CalmTexts(words_tokenizer(), ["w2 w3 w4 w5"] * 2, 3, 4)
    return CalmAutoencoderTexts(new_autoencoder(texts, latent=6, width=16, **shape).train())


def discrete() -> Objective:
    texts = CalmTexts(words_tokenizer(), ["w2 w3 w4 w5"] * 2, 3, 4)
    return DiscreteTexts(new_discrete(texts, dict(BACKBONES["llama"])), texts.pad)


def patches(directions: str, keep: float) -> Objective:
    torch.manual_seed(0)
    prior = Prior(
        PriorConfig(features=12, axes=2, pool=0, saliency=False, width=16, layers=1, heads=2, directions=directions)
    )
    return PriorPatches(prior, patch=2, keeps=[keep])


pictures = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[Callable[[], Objective], Tensor]] = {
    **{f"calm {head}": ((lambda head=head: calm(head)), one_chunk()) for head in HEADS},
    "calm gpt2": (lambda: calm(backbone="gpt2"), one_chunk()),
    "calm full": (calm, some_ids(2, 12)),
    "autoencoder": (coder, some_ids(2, 12)),
    "autoencoder without hidden tokens": (lambda: coder(token_dropout=0.0), some_ids(2, 12)),
    "discrete": (discrete, torch.cat([some_ids(2, 1), torch.full((2, 11), PAD)], 1)),
    **{f"prior {way}": ((lambda way=way: patches(way, 0.5)), pictures) for way in ("forward", "both")},
    "prior of one slot": (lambda: patches("both", 0.01), torch.full_like(pictures, 0.5)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_a_gradient(name: str) -> None:
    make, batch = CASES[name]
    torch.manual_seed(1)
    objective = make()
    assert objective.uses_every_parameter
    loss = objective(batch, 0.0)["loss"]
    loss.backward()
    missing = [name for name, value in objective.named_parameters() if value.requires_grad and value.grad is None]
    assert not missing and bool(loss.isfinite())


def test_nothing_is_zero_whatever_the_parameters_are() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias.data.fill_(torch.inf)
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    zero = nothing_of(torch.nn.ModuleList([module, frozen]))
    zero.backward()
    assert float(zero.detach()) == 0
    assert all(value.grad is not None and not value.grad.any() for value in module.parameters())
    assert all(value.grad is None for value in frozen.parameters())
    assert float(nothing_of(frozen)) == 0
