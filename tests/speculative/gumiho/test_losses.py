"""Losses against a loop over every position, and which pair each head reads for which feature."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding_samples import tiny
from gumiho_samples import SHAPES, ends_of, heads
from torch import Tensor

from quickmerge.speculative.gumiho import GumihoNetwork, LossWeights, gumiho_losses
from quickmerge.speculative.gumiho.losses import guesses_at


class Telling(torch.nn.Module):
    """A network whose features say where they come from: a pair is (token, feature), the guess of h_j is 100 + j."""

    def __init__(self, serial: int, heads: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(serial=serial, heads=heads)
        self.read: list[tuple[Tensor, Tensor]] = []

    def fuse(self, embedded: Tensor, features: Tensor) -> Tensor:
        return torch.cat([embedded, features], -1)

    def serial(self, fused: Tensor, position: Tensor) -> Tensor:
        assert position.tolist() == [list(range(fused.shape[1]))] * len(fused)
        return 101.0 + torch.arange(fused.shape[1])[None, :, None].expand(len(fused), -1, 1)

    def guess(self, before: Tensor, pair: Tensor) -> Tensor:
        self.read.append((before, pair))
        return pair[..., :1]


@pytest.mark.parametrize("serial", [0, 1, 2, 3])
def test_each_head_reads_the_right_pairs(serial: int) -> None:
    """Token x_j is j and feature h_j is 10 + j, so what is read tells its place."""
    n, count = 9, 3
    network: Any = Telling(serial, count)
    tokens = torch.arange(n)[None, :, None].float().expand(2, -1, -1)
    at = torch.tensor([[row, j] for row in range(2) for j in range(1, n)])
    found, ahead = guesses_at(network, tokens, tokens + 10, at)
    if serial:
        assert ahead[0, :, 0].tolist() == [100.0 + j for j in range(1, n)]
        assert found.features[0, :, 0].tolist() == [100.0 + j for j in range(1, n)] * 2
        assert bool(found.there[0].all())
    (before, pair) = network.read[0]
    for head in range(count):
        there = found.there[head + (serial > 0)]
        for index, j in enumerate(at[:, 1].tolist()):
            s = j - 1 - head  # the later pair holds the feature of token s, the feature that predicted token s + 1
            assert bool(there[index]) == (s >= (2 if serial > 1 else 1))
            if not there[index]:
                continue
            feature = {0: (10.0 + s - 1, 10.0 + s), 1: (10.0 + s - 1, 100.0 + s)}.get(serial, (99.0 + s, 100.0 + s))
            assert before[head, index].tolist() == [s, feature[0]]
            assert pair[head, index].tolist() == [s + 1, feature[1]]


def literal_losses(
    network: GumihoNetwork, ends: Any, ids: Tensor, features: Tensor, counts: Tensor, weights: LossWeights
) -> dict[str, float]:
    """Every text, position and head in turn."""
    config, embedding = network.config, tiny().get_input_embeddings().weight
    distance: dict[int, list[Tensor]] = {i: [] for i in range(-1, config.heads)}
    entropy: dict[int, list[Tensor]] = {i: [] for i in range(-1, config.heads)}
    agree: dict[int, list[float]] = {i: [] for i in range(-1, config.heads)}

    def add(which: int, guess: Tensor, truth: Tensor) -> None:
        gap = (guess - truth).abs() / config.feature_scale
        distance[which].append(torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean())
        p, q = ends.logits(truth[None])[0].softmax(0), ends.logits(guess[None])[0].log_softmax(0)
        entropy[which].append(-(p * q).sum())
        agree[which].append(float(p.argmax() == q.argmax()))

    for x, h, count in zip(ids, features, counts, strict=True):
        n = len(x)
        pairs = [network.fuse(embedding[x[t + 1]], h[t]) for t in range(n - 1)]  # (x_(t+1), h_t)
        guess: dict[int, Tensor] = {}
        if config.serial:
            for t in range(n - 1):
                whole = torch.stack(pairs[: t + 1])[None]
                guess[t + 1] = network.serial(whole, torch.arange(t + 1)[None])[0, -1]
                if count[t + 1]:
                    add(-1, guess[t + 1], h[t + 1])
        drafted = {s: network.fuse(embedding[x[s + 1]], guess[s]) for s in guess if s + 1 < n}  # (x_(s+1), h^_s)
        for s in range(1, n - 1):
            later = drafted[s] if config.serial else pairs[s]
            if config.serial > 1 and s == 1:
                continue  # there is no guess of h_0
            earlier = drafted[s - 1] if config.serial > 1 else pairs[s - 1]
            for i in range(config.heads):
                if s + 1 + i < n and count[s + 1 + i]:
                    add(i, network.guess(earlier[None], later[None])[i, 0], h[s + 1 + i])

    def mean(values: list[Any]) -> float:
        return float(sum(values) / len(values)) if values else 0.0

    total = 0.0
    out = {}
    for i in distance:
        if i < 0 and not config.serial:
            continue
        weight = 1.0 if i < 0 else weights.heads * weights.decay ** (i + 1)
        total += weight * (weights.feature * mean(distance[i]) + weights.token * mean(entropy[i]))
        name = "" if i < 0 else f"_{i + 1}"
        out |= {f"feature{name}": mean(distance[i]), f"token{name}": mean(entropy[i]), f"agree{name}": mean(agree[i])}
    return {"loss": total, **out}


def batch(seed: int = 0, vocabulary: int = 97) -> tuple[Tensor, Tensor, Tensor]:
    """Three texts, padded on the right; features stand far from one another, so that both sides of the bend are met."""
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (3, 8), generator=draws)
    features = 3 * torch.randn(3, 8, 16, generator=draws, dtype=torch.float64)
    counts = torch.rand(3, 8, generator=draws) < 0.7
    counts[1, 5:] = False
    counts[:, 0] = False
    return ids, features, counts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("drafted", [None, torch.arange(0, 97, 4)])
@torch.no_grad()
def test_losses_are_those_of_a_loop(shape: str, drafted: Tensor | None) -> None:
    made = heads(drafted=drafted, size=0.3, **SHAPES[shape])
    ids, features, counts = batch()
    weights = LossWeights(feature=0.9, token=0.3, heads=0.4, decay=0.7, wait=0.5)
    wanted = literal_losses(made.network, ends_of(made), ids, features, counts, weights)
    given = gumiho_losses(made.network, ends_of(made), ids, features, counts, weights=weights, noise=0.0, progress=0.5)
    assert given.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(given[name]) == pytest.approx(value, rel=1e-9), name


def test_the_papers_weights() -> None:
    assert LossWeights() == LossWeights(feature=1.0, token=0.1, heads=1 / 9, decay=0.8, wait=0.2)


@torch.no_grad()
def test_heads_learn_features_alone_at_first() -> None:
    made = heads(size=0.3)
    ids, features, counts = batch()
    weights = LossWeights(token=0.5, wait=0.3)
    told = {}
    for progress in (0.29, 0.3):
        out = gumiho_losses(
            made.network, ends_of(made), ids, features, counts, weights=weights, noise=0.0, progress=progress
        )
        told[progress] = out
    later = sum(float(told[0.3][f"token_{i}"]) * 0.5 / 9 * 0.8**i for i in range(1, 6))
    assert float(told[0.3]["loss"] - told[0.29]["loss"]) == pytest.approx(later)


def test_gradients_reach_the_heads_and_not_the_target() -> None:
    made, model = heads(size=0.3, drafted=torch.arange(0, 97, 2)), tiny()
    ids, features, counts = batch()
    gumiho_losses(made.network, ends_of(made), ids, features, counts, weights=LossWeights())["loss"].backward()
    for name, value in made.network.named_parameters():
        assert value.grad is not None and bool(value.grad.any()), name
    assert all(value.grad is None for value in model.parameters())


def test_a_share_is_an_unbiased_draw() -> None:
    """The mean over many draws is the loss at all features, and the serial head's distance is always that."""
    made = heads(size=0.2)
    ids, features, counts = batch()

    @torch.no_grad()
    def losses(share: float) -> dict[str, float]:
        return {name: float(value) for name, value in gumiho_losses(
            made.network, ends_of(made), ids, features, counts, weights=LossWeights(), noise=0.0, share=share
        ).items()}  # fmt: skip

    whole = losses(1.0)
    torch.manual_seed(0)
    drawn = [losses(0.6) for _ in range(300)]
    assert {one["feature"] for one in drawn} == {whole["feature"]}
    for name in ("token", "token_1", "feature_2"):
        values = torch.tensor([one[name] for one in drawn])
        error = float(values.std()) / len(values) ** 0.5
        assert float(values.std()) > 0 and abs(float(values.mean()) - whole[name]) < 4 * error + 0.02 * whole[name]


def test_noise_is_on_what_is_read_alone() -> None:
    made = heads(size=0.3)
    ids, features, counts = batch()
    seen: list[Tensor] = []
    fuse = made.network.fuse
    made.network.fuse = lambda embedded, h: seen.append(h) or fuse(embedded, h)  # type: ignore[method-assign]
    torch.manual_seed(0)
    gumiho_losses(made.network, ends_of(made), ids, features, counts, weights=LossWeights(), noise=0.2)
    added = seen[0] - features[:, :-1]
    most = 0.2 * 512 / 8 * 1.7 / 2  # half the width, for texts of 8 tokens, in units of the feature scale
    assert 0.9 * most < float(added.abs().max()) <= most and abs(float(added.mean())) < 0.1 * most


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    made = heads(size=0.3)
    ids, features, counts = batch()
    wide = [torch.cat([x, x.new_full((3, 4, *x.shape[2:]), 1)], 1) for x in (ids, features)]
    more = torch.cat([counts, counts.new_zeros(3, 4)], 1)
    kwargs = {"weights": LossWeights(), "noise": 0.0}
    one = gumiho_losses(made.network, ends_of(made), ids, features, counts, **kwargs)
    two = gumiho_losses(made.network, ends_of(made), *wide, more, **kwargs)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value)


def test_texts_in_which_nothing_counts_have_a_gradient_of_zero() -> None:
    made = heads(size=0.3)
    ids, features, counts = batch()
    out = gumiho_losses(made.network, ends_of(made), ids, features, counts & False, weights=LossWeights())
    out["loss"].backward()
    assert float(out["loss"].detach()) == 0.0
    assert all(value.grad is not None and not bool(value.grad.any()) for value in made.network.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"feature": 0.0, "token": 0.0}, "feature and token must not both be 0"),
        ({"decay": -0.1}, "decay must be a number of at least 0, got -0.1"),
        ({"wait": float("nan")}, "wait must be a number of at least 0, got nan"),
    ],
)
def test_limits(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossWeights(**wrong)
