"""The autoencoder against slow statements of its maths in float64; each chunk alone; saved and loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModel

from quickmerge.calm import CalmAutoencoder, CalmAutoencoderConfig
from quickmerge.calm.autoencoder import Negatives
from quickmerge.errors import QuickmergeError

SHAPES = [{"patch": 1, "latent": 3, "width": 8}, {"patch": 3, "latent": 5, "width": 7, "inner": 9},
          {"patch": 4, "latent": 8, "width": 16}]  # fmt: skip


def made(vocab_size: int = 21, seed: int = 0, **more: Any) -> CalmAutoencoder:
    torch.manual_seed(seed)
    return CalmAutoencoder(CalmAutoencoderConfig(vocab_size=vocab_size, **{**SHAPES[2], **more})).eval()


def ids_of(model: CalmAutoencoder, *shape: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size - 1, (*shape, model.config.patch), generator=draws)


# The maths, a token at a time in float64 ---------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (sum(v * v for v in x) / len(x) + eps).sqrt() * weight


def layer(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    n = norm(x, state[f"{name}.norm.weight"], eps)
    gate, up = state[f"{name}.gate.weight"] @ n, state[f"{name}.up.weight"] @ n
    return x + state[f"{name}.down.weight"] @ (gate / (1 + (-gate).exp()) * up)


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def slow_encode(model: CalmAutoencoder, chunk: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of the embedded tokens of one chunk."""
    s, eps = {name: v.double() for name, v in model.state_dict().items()}, model.config.norm_eps
    x = torch.cat([layer(token.double(), s, "encoder.tokens", eps) for token in chunk])
    x = layer(linear(x, s, "encoder.squeeze"), s, "encoder.chunk", eps)
    out = linear(norm(x, s["encoder.norm.weight"], eps), s, "encoder.out")
    return out[: model.config.latent], out[model.config.latent :]


def slow_decode(model: CalmAutoencoder, z: Tensor) -> list[Tensor]:
    """Logits of the tokens of one vector."""
    s, eps, d = {name: v.double() for name, v in model.state_dict().items()}, model.config.norm_eps, model.config.width
    x = linear(layer(linear(z.double(), s, "decoder.into"), s, "decoder.chunk", eps), s, "decoder.expand")
    tokens = [layer(x[k * d : (k + 1) * d], s, "decoder.tokens", eps) for k in range(model.config.patch)]
    return [s["embed.weight"] @ norm(token, s["decoder.norm.weight"], eps) for token in tokens]


@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_are_the_slow_ones(shape: dict[str, int]) -> None:
    model = made(**shape)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too are then no ones and zeros
            parameter.add_(0.3 * torch.randn(parameter.shape))
        ids = ids_of(model, 2, 3)
        mean, log_std = model.encode(ids)
        logits = model.decode(mean)
    assert mean.shape == log_std.shape == (2, 3, shape["latent"]) and logits.shape == (2, 3, shape["patch"], 21)
    for b in range(2):
        for n in range(3):
            chunk = [model.embed.weight[i].detach() for i in ids[b, n]]
            expected = slow_encode(model, chunk)
            torch.testing.assert_close(mean[b, n].double(), expected[0], atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(log_std[b, n].double(), expected[1], atol=2e-5, rtol=2e-5)
            slow = torch.stack(slow_decode(model, mean[b, n]))
            torch.testing.assert_close(logits[b, n].double(), slow, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [False, True])
def test_the_loss_is_the_slow_one(shape: dict[str, int], training: bool) -> None:
    """With its random numbers drawn again: hidden tokens, noise and dropped features."""
    settings_ = {"token_dropout": 0.4, "latent_dropout": 0.3, "kl_weight": 0.05, "kl_floor": 0.4}
    model = made(**shape, **settings_).train(training)
    patch, latent, pad = model.config.patch, model.config.latent, model.config.pad_token_id
    ids = ids_of(model, 2, 3).flatten(1)
    ids[1, -patch:] = pad  # a whole pad chunk has no part in the loss
    if patch > 1:
        ids[0, 0] = pad  # one pad in a chunk is a token like others
    torch.manual_seed(5)
    told = model(ids)
    torch.manual_seed(5)
    chunks = ids.view(-1, patch)[:5]
    hide = torch.rand(5, patch) < 0.4 if training else torch.zeros(5, patch, dtype=torch.bool)
    noise = torch.randn(1, 5, latent)[0]
    keep = torch.nn.functional.dropout(torch.ones(5, latent), 0.3, training)
    nats, kls, free, hits = [], [], [], []
    for row, chunk in enumerate(chunks):
        embedded = [
            (model.hidden_token if hide[row, k] else model.embed.weight[i]).detach() for k, i in enumerate(chunk)
        ]
        mean, log_std = slow_encode(model, embedded)
        z = (mean + log_std.exp() * noise[row]) * keep[row]
        for k, logits in enumerate(slow_decode(model, z)):
            nats.append(logits.exp().sum().log() - logits[chunk[k]])
            hits.append(float(logits.argmax() == chunk[k]))
        each = [
            0.5 * (m**2 + math.exp(2 * s) - 1 - 2 * s) for m, s in zip(mean.tolist(), log_std.tolist(), strict=True)
        ]
        kls.append(sum(each))
        free.append(sum(max(value, 0.4) for value in each))
    cross_entropy = float(sum(nats) / len(nats))
    expected = {"cross_entropy": cross_entropy, "kl": sum(kls) / 5, "clipped_kl": sum(free) / 5,
                "accuracy": sum(hits) / len(hits), "loss": patch * cross_entropy + 0.05 * sum(free) / 5}  # fmt: skip
    assert {name: float(value.detach()) for name, value in told.items()} == pytest.approx(expected, rel=1e-4)


def test_without_noise_the_mean_is_decoded() -> None:
    model = made()
    ids = ids_of(model, 4)
    one, two = model(ids, noise=False), model(ids, noise=False)
    assert float(one.loss) == float(two.loss)
    assert float(model(ids).loss) != float(model(ids).loss)  # evaluation draws too, unless it is told not to
    logits = model.decode(model.encode(ids)[0]).flatten(0, 1)
    torch.testing.assert_close(one.cross_entropy, torch.nn.functional.cross_entropy(logits, ids.flatten()))


# Laws ------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_a_chunk_has_the_same_vector_wherever_it_stands(shape: dict[str, int], b: int, n: int, seed: int) -> None:
    model = made(**shape)
    ids = ids_of(model, b, n, seed=seed)
    with torch.no_grad():
        mean, log_std = model.encode(ids)
        alone = [model.encode(chunk) for chunk in ids.flatten(0, 1)]
        pads = torch.full_like(ids, model.config.pad_token_id)
        padded = model.encode(torch.cat([pads, ids, pads], 1))
    for at, (one_mean, one_std) in enumerate(alone):
        torch.testing.assert_close(mean.flatten(0, 1)[at], one_mean, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(log_std.flatten(0, 1)[at], one_std, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(padded[0][:, n : 2 * n], mean, atol=1e-6, rtol=1e-5)


def test_other_tokens_of_a_chunk_do_matter() -> None:
    model = made()
    ids = ids_of(model, 1)
    for k in range(4):
        other = ids.clone()
        other[0, k] = (other[0, k] + 1) % 20
        assert not torch.allclose(model.encode(ids)[0], model.encode(other)[0], atol=1e-3)


def test_whole_pad_chunks_change_nothing() -> None:
    model = made()
    ids = ids_of(model, 3).flatten()[None]
    pads = torch.full((1, 8), model.config.pad_token_id)
    one, two = model(ids, noise=False), model(torch.cat([pads, ids, pads], 1), noise=False)
    assert float(one.loss) == pytest.approx(float(two.loss), rel=1e-6)
    with pytest.raises(ValueError, match="a chunk that is not all pads, got none"):
        model(pads)


def test_a_free_dimension_gets_no_gradient_from_the_divergence() -> None:
    """With a floor above everything the divergence moves nothing; with none it does."""
    ids = ids_of(made(), 6)

    def gradient(weight: float, floor: float) -> Tensor:
        model = made(kl_weight=weight, kl_floor=floor)
        model(ids, noise=False).loss.backward()
        grad = model.encoder.out.weight.grad
        assert grad is not None
        return grad

    plain = gradient(0.0, 0.0)
    assert torch.equal(gradient(1.0, 1e6), plain)
    assert not torch.allclose(gradient(1.0, 0.0), plain, atol=1e-3)


def test_draws_are_those_of_the_posterior() -> None:
    model = made()
    mean, log_std = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, -1.0]])
    draws = model.draw(mean, log_std, 20_000, torch.Generator().manual_seed(0))
    assert draws.shape == (20_000, 1, 2)
    torch.testing.assert_close(draws.mean(0), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(draws.std(0), log_std.exp(), atol=0.03, rtol=0)


def test_it_learns_to_tell_chunks_apart(tmp_path: Path) -> None:
    """Every token of random chunks is found again after a few hundred steps, and bfloat16 finds them too."""
    model = made(vocab_size=13, patch=2, latent=8, width=32, token_dropout=0.0, latent_dropout=0.0).train()
    ids = ids_of(model, 100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(ids).loss.backward()
        optimizer.step()
    model.eval()
    assert float(model(ids).accuracy) > 0.99
    assert float(model(ids, noise=False).accuracy) == 1.0
    negatives = Negatives(torch.ones(13), 64)
    sampled = model(ids, noise=False, negatives=negatives)
    assert sampled.accuracy is None
    assert abs(float(sampled.cross_entropy) - float(model(ids, noise=False).cross_entropy)) < 0.02
    half = CalmAutoencoder(model.config).to(torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    mean, log_std = half.encode(ids)
    assert mean.dtype == log_std.dtype == torch.float32
    found = half.decode(mean).argmax(-1)
    assert float((found == ids).float().mean()) > 0.99


# Files and refusals ----------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = made(patch=3, kl_floor=0.25)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is CalmAutoencoder and not again.training
    assert type(AutoConfig.from_pretrained(tmp_path)) is CalmAutoencoderConfig
    assert again.config.kl_floor == 0.25 and again.config.inner == model.config.inner
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    ids = ids_of(model, 5)
    assert torch.equal(again.encode(ids)[0], model.encode(ids)[0])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"patch": 0}, "patch must be a whole number of at least 1, got 0"),
        ({"latent": 1.5}, "latent must be a whole number of at least 1, got 1.5"),
        ({"token_dropout": 1.0}, r"token_dropout must be a number in \[0, 1\), got 1.0"),
        ({"kl_floor": -0.1}, "kl_floor must be a number of at least 0, got -0.1"),
        ({"eos_token_id": 21}, r"eos_token_id must be below vocab_size \(21\), got 21"),
        ({"eos_token_id": 20}, "pad_token_id must be an id of its own"),
        ({"inner": 0}, "inner must be a whole number of at least 1, got 0"),
    ],
)
def test_settings_out_of_range(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalmAutoencoderConfig(**{"vocab_size": 21, **setting})


def test_shapes_that_do_not_fit() -> None:
    model = made()
    with pytest.raises(ValueError, match=r"ids must have shape \(..., 4\), got \(2, 3\)"):
        model.encode(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"z must have shape \(..., 8\), got \(2, 4\)"):
        model.decode(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="input_ids must be rows of a multiple of 4 tokens"):
        model(torch.zeros(2, 6, dtype=torch.long))


@pytest.mark.parametrize("features", [8, 40])
def test_it_may_begin_from_embeddings(features: int) -> None:
    """Their directions stay: exactly where they fit in, nearly where they do not."""
    model = made(vocab_size=60, width=16)
    pad = model.embed.weight[-1].clone()
    given_ = torch.randn(59, features, generator=torch.Generator().manual_seed(1)) + 3
    model.load_pretrained_embeddings(given_)
    rows = model.embed.weight[:59].detach()
    assert torch.equal(model.embed.weight[-1], pad)
    assert float(rows.square().mean().sqrt()) == pytest.approx(16**-0.5, rel=1e-4)
    before, after = torch.pdist(given_ - given_.mean(0)), torch.pdist(rows)
    ratio = after / before
    if features == 8:
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), atol=1e-5, rtol=1e-4)
    else:
        assert float(torch.corrcoef(torch.stack([before, after]))[0, 1]) > 0.4
    with pytest.raises(QuickmergeError, match="of 59 tokens; it has only 30"):
        model.load_pretrained_embeddings(given_[:30])
