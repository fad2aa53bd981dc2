"""The CALM model: what it reads, what it draws, its loss said slowly, its frozen autoencoder and its files."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from calm_samples import BACKBONES, EOS, HEADS, PAD, generators, small_calm, small_config, some_ids
from hypothesis import given
from strategies import prop, seeds
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from quickmerge.calm.config import CALM_HEADS, CalmConfig
from quickmerge.calm.model import CalmForCausalLM, ChunkEmbedding
from quickmerge.errors import QuickmergeError

patches = pytest.mark.parametrize("patch", [1, 3, 4])


# Reading --------------------------------------------------------------------------------------------------------


def test_the_embedding_said_slowly() -> None:
    torch.manual_seed(0)
    layer = ChunkEmbedding(3, 4, 5).double()
    torch.nn.init.normal_(layer.norm.weight)
    tokens = torch.randn(2, 6, 4, dtype=torch.float64)
    got = layer(tokens)
    assert got.shape == (2, 2, 5)
    for row in range(2):
        for chunk in range(2):
            joined = [v for token in tokens[row, 3 * chunk : 3 * chunk + 3].tolist() for v in token]
            inner = [
                math.fsum(w * v for w, v in zip(line, joined, strict=True)) + b
                for line, b in zip(layer.up.weight.tolist(), layer.up.bias.tolist(), strict=True)
            ]
            inner = [v / (1 + math.exp(-v)) for v in inner]
            out = [
                math.fsum(w * v for w, v in zip(line, inner, strict=True)) + b
                for line, b in zip(layer.down.weight.tolist(), layer.down.bias.tolist(), strict=True)
            ]
            mean = math.fsum(out) / 5
            size = math.sqrt(math.fsum((v - mean) ** 2 for v in out) / 5 + 1e-6)
            scale = zip(out, layer.norm.weight.tolist(), layer.norm.bias.tolist(), strict=True)
            assert got[row, chunk].tolist() == pytest.approx([(v - mean) / size * w + b for v, w, b in scale])


@pytest.mark.parametrize("backbone", BACKBONES)
@patches
def test_later_chunks_change_nothing_before(backbone: str, patch: int) -> None:
    model = small_calm(patch, backbone)
    ids = some_ids(2, 5 * patch)
    other = ids.clone()
    other[:, 3 * patch :] = some_ids(2, 2 * patch, seed=1)
    with torch.no_grad():
        one, two = model.hidden(ids)[0], model.hidden(other)[0]
    assert one.shape == (2, 5, 32)
    torch.testing.assert_close(one[:, :3], two[:, :3])
    assert (one[:, 3:] - two[:, 3:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("backbone", BACKBONES)
def test_chunks_of_padding_are_not_there(backbone: str) -> None:
    """In front, behind, and however the mask says it; a chunk that is padded in part is read."""
    model = small_calm(3, backbone)
    ids = some_ids(1, 9)
    ids[0, :2] = PAD
    padding = torch.full((1, 6), PAD)
    with torch.no_grad():
        alone = model.hidden(ids)[0]
        torch.testing.assert_close(model.hidden(torch.cat([padding, ids], 1))[0][:, 2:], alone)
        torch.testing.assert_close(model.hidden(torch.cat([ids, padding], 1))[0][:, :3], alone)
        masked = torch.cat([some_ids(1, 6), ids], 1)
        masked[0, 6:8] = 5
        mask = torch.ones_like(masked)
        mask[:, :8] = 0
        torch.testing.assert_close(model.hidden(masked, mask)[0][:, 2:], alone)
        other = ids.clone()
        other[0, :2] = 7
        assert (model.hidden(other)[0] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_cache_changes_nothing(backbone: str) -> None:
    model = small_calm(3, backbone)
    ids = some_ids(3, 15)
    ids[1, :7] = PAD
    mask = ids != PAD
    with torch.no_grad():
        whole, none = model.hidden(ids)
        assert none is None
        parts, cache = [], None
        for start, stop in ((0, 9), (9, 12), (12, 15)):
            states, cache = model.hidden(ids[:, start:stop], mask[:, :stop], cache, True)
            parts.append(states)
    there = mask.view(3, 5, 3).any(-1)
    torch.testing.assert_close(torch.cat(parts, 1)[there], whole[there], atol=2e-5, rtol=1e-4)
    with pytest.raises(QuickmergeError, match="attention_mask must be given with a cache"):
        model.hidden(ids[:, :3], None, cache, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": some_ids(2, 7)}, r"input_ids must be \(batch, chunks \* 3\) token ids, got shape \(2, 7\)"),
        ({"ids": some_ids(2, 0)}, r"got shape \(2, 0\)"),
        ({"ids": some_ids(6)}, r"got shape \(6,\)"),
        ({"ids": some_ids(2, 6) + 19}, "input_ids must be of the 21 tokens of the vocabulary, got 2"),
        ({"ids": some_ids(2, 6), "mask": torch.ones(2, 2)}, r"attention_mask must have shape \(2, 6\), got \(2, 2\)"),
    ],
)
def test_wrong_inputs(change: dict[str, Tensor], words: str) -> None:
    with pytest.raises(QuickmergeError, match=words):
        small_calm().hidden(change["ids"], change.get("mask"))


# Drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_draws_are_the_heads_and_decoded_by_the_autoencoder(head: str) -> None:
    model = small_calm(3, head=head)
    states = torch.randn(2, 4, 32)
    latents = model.sample(states, 5, generator=torch.Generator().manual_seed(3))
    assert latents.shape == (5, 2, 4, 6)
    chunks = model.sample_chunks(states, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(chunks, model.autoencoder.decode(latents).argmax(-1))
    assert chunks.shape == (5, 2, 4, 3) and chunks.dtype == torch.long
    assert len(chunks.view(-1, 3).unique(dim=0)) > 3
    assert not torch.equal(model.sample(states, 5), model.sample(states, 5))


def test_decoding_some_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_calm(3)
    latents = torch.randn(7, 2, 6)
    whole = model.decode(latents)
    monkeypatch.setattr("quickmerge.calm.model.LOGITS", 4 * 3 * 21)
    assert torch.equal(model.decode(latents), whole)


@pytest.mark.parametrize("head", HEADS)
def test_with_a_generator_for_each_row_a_row_is_the_same_alone(head: str) -> None:
    model = small_calm(3, head=head)
    states = torch.randn(3, 32)
    together = model.sample(states, 4, generator=generators(3))
    for row in range(3):
        alone = model.sample(states[row : row + 1], 4, generator=generators(1, row))
        torch.testing.assert_close(together[:, row : row + 1], alone)
    with pytest.raises(QuickmergeError, match="generator must be one, or one for each of 3 rows, got a list of 2"):
        model.sample(states, 4, generator=generators(2))


def test_draws_of_a_bfloat16_model_are_near() -> None:
    model = small_calm(3)
    states = torch.randn(50, 32)
    exact = model.sample(states, generator=torch.Generator().manual_seed(0))
    rough = model.bfloat16().sample(states.bfloat16(), generator=torch.Generator().manual_seed(0))
    assert rough.dtype == torch.float32
    assert (exact - rough).abs().mean() < 0.1 * exact.abs().mean()
    ids = some_ids(2, 9)
    assert model(ids, labels=ids).loss.isfinite()


# Learning -------------------------------------------------------------------------------------------------------


@prop(12)
@given(seed=seeds)
def test_the_loss_said_slowly(seed: int) -> None:
    """Energy scores of the draws against the posterior's, over the chunks that count, one by one in float64."""
    rng = Random(seed)
    patch, alpha = rng.choice((1, 3)), rng.choice((0.5, 1.0, 1.5))
    model = small_calm(patch, alpha=alpha).double()
    chunks = rng.choice((2, 5))
    ids = some_ids(3, chunks * patch, seed=seed)
    ids[0, : rng.randrange(chunks * patch)] = PAD
    ids[1, -patch:] = PAD
    labels = ids.clone()
    labels[2, : rng.randrange(chunks * patch)] = -100
    torch.manual_seed(seed)
    got = model(ids, labels=labels)
    with torch.no_grad():
        states = model.hidden(ids)[0]
    pieces = ids.view(3, chunks, patch)
    counted = [
        (row, at)
        for row in range(3)
        for at in range(1, chunks)
        if (pieces[row, at] != PAD).any()
        and (pieces[row, at - 1] != PAD).any()
        and (labels.view(3, chunks, patch)[row, at] != -100).any()
    ]
    assert int(got.chunks) == len(counted)
    if not counted:
        assert float(got.loss.detach()) == 0
        return
    torch.manual_seed(seed)
    targets = model.draw_targets(torch.stack([pieces[place] for place in counted]), 4)
    draws = model.head.draws(torch.stack([states[row, at - 1] for row, at in counted]), 3).detach()
    scores = []
    for place in range(len(counted)):
        x, y = draws[:, place].tolist(), targets[:, place].tolist()
        across = math.fsum(math.dist(a, b) ** alpha for a in x for b in y)
        within = math.fsum(math.dist(a, b) ** alpha for i, a in enumerate(x) for j, b in enumerate(x) if i != j)
        scores.append(2 / 12 * across - within / 6)
    assert float(got.loss.detach()) == pytest.approx(math.fsum(scores) / len(scores), rel=1e-6)


def test_targets_are_draws_of_the_posterior() -> None:
    model = small_calm(3)
    chunks = some_ids(2, 3)
    mean, log_std = model.autoencoder.encode(chunks)
    torch.manual_seed(0)
    draws = model.draw_targets(chunks, 4000)
    assert draws.shape == (4000, 2, 6) and not draws.requires_grad
    assert ((draws.mean(0) - mean).abs() < 5 * log_std.exp() / 4000**0.5).all()
    torch.testing.assert_close(draws.std(0).log(), log_std, atol=0.06, rtol=0)


def test_the_latent_of_a_chunk_does_not_hang_on_its_neighbours() -> None:
    model = small_calm(3)
    ids = some_ids(2, 9)
    ids[1, 3:6] = ids[0, 3:6]
    mean, _ = model.autoencoder.encode(ids.view(2, 3, 3))
    torch.testing.assert_close(mean[0, 1], mean[1, 1])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_all_but_the_autoencoder_learns(backbone: str, head: str) -> None:
    model = small_calm(3, backbone, head).train()
    ids = some_ids(4, 12)
    model(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        if name.startswith("autoencoder."):
            assert weight.grad is None and not weight.requires_grad
        else:
            assert weight.grad is not None and weight.grad.isfinite().all(), name


def test_the_autoencoder_stays_for_inference_and_frozen() -> None:
    model = small_calm().train()
    assert model.training and model.backbone.training and model.head.training
    assert not any(part.training for part in model.autoencoder.modules())
    model.requires_grad_(True)
    assert not any(weight.requires_grad for weight in model.train().autoencoder.parameters())
    assert not model.eval().training


def test_a_text_with_nothing_to_predict_has_no_loss() -> None:
    model = small_calm()
    out = model(some_ids(2, 3), labels=some_ids(2, 3))
    assert float(out.loss.detach()) == 0 and int(out.chunks) == 0
    out.loss.backward()
    assert model(some_ids(2, 6)).loss is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"labels": some_ids(2, 9, seed=4)}, "labels must be input_ids, with -100 in the place of tokens"),
        ({"labels": some_ids(2, 6)}, r"got other tokens or shape \(2, 6\) for \(2, 9\)"),
        ({"return_dict": False}, "return_dict must be True"),
    ],
)
def test_wrong_calls(given: dict[str, Any], words: str) -> None:
    with pytest.raises((QuickmergeError, RuntimeError), match=words):
        small_calm()(some_ids(2, 9), **given)


# Settings and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head": "gaussian"}, "head must be one of energy, flow, diffusion, got 'gaussian'"),
        ({"head": "flwo"}, r"got 'flwo' \(did you mean 'flow'\?\)"),
        ({"alpha": 2}, "alpha must be a number strictly between 0 and 2"),
        ({"samples": 1}, "samples must be a whole number of at least 2, got 1"),
        ({"targets": 0}, "targets must be a whole number of at least 1, got 0"),
        ({"head_settings": {"alpha": 1.0}}, "head_settings must leave out alpha, which is a setting of its own"),
        ({"backbone": {"model_type": "llamma"}}, r"got 'llamma' \(did you mean 'llama'\?\)"),
        ({"backbone": {"model_type": "llama", "vocab_size": 30}}, "must be that of the autoencoder, 21, got 30"),
    ],
)
def test_wrong_settings(change: dict[str, Any], words: str) -> None:
    config = small_config()
    given = {"backbone": config.backbone.to_dict(), "autoencoder": config.autoencoder.to_dict()}
    with pytest.raises(ValueError, match=words):
        CalmConfig(**{**given, **change})


def test_a_config_knows_its_sizes() -> None:
    config = small_config(4, head_settings={})
    assert CALM_HEADS == ("energy", "flow", "diffusion")
    assert (config.patch, config.latent, config.hidden_size, config.vocab_size) == (4, 6, 32, 21)
    assert (config.pad_token_id, config.eos_token_id) == (PAD, EOS)
    assert config.head_settings == {"blocks": 1}
    with pytest.raises(QuickmergeError, match=r"settings of the energy head must be of .*, got 'nois'"):
        CalmForCausalLM(small_config(4, head_settings={"nois": 3}))


@pytest.mark.parametrize("head", HEADS)
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, head: str) -> None:
    model = small_calm(4, head=head)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CalmConfig and config.head == head and config.head_settings == model.config.head_settings
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is CalmForCausalLM and not loaded.training
    assert not any(weight.requires_grad for weight in loaded.autoencoder.parameters())
    one, two = model.state_dict(), loaded.state_dict()
    assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)
    ids = some_ids(2, 8)
    assert torch.equal(model.hidden(ids)[0], loaded.hidden(ids)[0])
    assert torch.equal(model.generate(ids, seed=3, max_new_tokens=9), loaded.generate(ids, seed=3, max_new_tokens=9))
