"""Scores of an autoencoder against counting by hand."""

from __future__ import annotations

import pytest
import torch

from quickmerge.calm import CalmAutoencoder, CalmAutoencoderConfig
from quickmerge.calm.evaluate import autoencoder_scores
from quickmerge.errors import QuickmergeError


def made(**more: float) -> CalmAutoencoder:
    torch.manual_seed(0)
    return CalmAutoencoder(CalmAutoencoderConfig(vocab_size=12, patch=3, latent=6, width=16, **more))


def chunks_of(count: int) -> torch.Tensor:
    chunks = torch.randint(11, (count, 3), generator=torch.Generator().manual_seed(1))
    chunks[::4, 2] = 11  # a pad at the end of a document
    return chunks


def test_scores_are_what_counting_gives() -> None:
    model, chunks = made().train(), chunks_of(41)
    empty = torch.full((2, 3), 11)
    scores = autoencoder_scores(model, torch.cat([empty, chunks]), sigmas=(0.0,), batch=7)
    assert model.training  # left as it was
    model.eval()
    right = tokens = whole = 0
    with torch.no_grad():
        mean, log_std = model.encode(chunks)
        for chunk, logits in zip(chunks.tolist(), model.decode(mean), strict=True):
            hits = [int(row.argmax()) == token for row, token in zip(logits, chunk, strict=True) if token != 11]
            right, tokens, whole = right + sum(hits), tokens + len(hits), whole + all(hits)
    assert scores.tokens == tokens == 41 * 3 - 11
    assert scores.accuracy == {0.0: pytest.approx(right / tokens)}
    assert scores.chunk_accuracy == {0.0: pytest.approx(whole / 41)}
    kl = 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std)
    assert scores.kl == pytest.approx(float(kl.sum(1).mean()), rel=1e-5)
    assert scores.above_floor == int((kl.mean(0) > 0.5).sum())
    assert scores.active == int((mean.var(0, correction=0) > 0.01).sum())
    assert scores.std == pytest.approx(float(log_std.exp().mean()), rel=1e-5) and scores.latent == 6


def test_dimensions_that_say_nothing_are_not_counted() -> None:
    model = made()
    with torch.no_grad():
        model.encoder.out.weight[[0, 2]] = 0  # means that never vary
        model.encoder.out.weight[6:] = 0  # standard deviations of 1
        model.encoder.out.bias.zero_()
    scores = autoencoder_scores(model, chunks_of(30), sigmas=())
    assert scores.active == 4 and scores.above_floor <= 4 and scores.std == pytest.approx(1)


def test_noise_does_harm_and_is_the_same_again() -> None:
    """On an autoencoder that has learnt the chunks by heart."""
    model, chunks = made(token_dropout=0.0, latent_dropout=0.0, kl_weight=0.0), chunks_of(60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(chunks).loss.backward()
        optimizer.step()
    scores = autoencoder_scores(model, chunks, sigmas=(0, 30))
    assert scores.accuracy[0] > 0.99 and scores.accuracy[30] < 0.9
    assert scores.posterior_accuracy > 0.95 and scores.cross_entropy < 0.5
    assert scores == autoencoder_scores(model, chunks, sigmas=(0, 30), batch=1024)
    assert scores.to_dict()["accuracy"].keys() == {"0", "30"}


def test_nothing_to_measure_on() -> None:
    with pytest.raises(QuickmergeError, match="chunks must hold at least one token"):
        autoencoder_scores(made(), torch.full((2, 3), 11))
    with pytest.raises(ValueError, match="each of sigmas must be a number of at least 0, got -1"):
        autoencoder_scores(made(), chunks_of(3), sigmas=(-1,))
