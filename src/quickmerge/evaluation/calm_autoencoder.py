"""What an autoencoder of chunks keeps: tokens found again, clean and under noise, and dimensions in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quickmerge.continuous.autoencoder import CalmAutoencoder
from quickmerge.continuous.chunks import real_chunks
from quickmerge.continuous.cross_entropy import linear_cross_entropy
from quickmerge.continuous.free_bits import kl_by_dimension
from quickmerge.errors import QuickmergeError, number_at_least

__all__ = ["SIGMAS", "AutoencoderScores", "autoencoder_scores"]

SIGMAS = (0.0, 0.3, 0.6, 1.0)
ACTIVE_VARIANCE = 0.01
"""A dimension whose mean varies less than this over chunks says nothing (arXiv 1509.00519)."""


@dataclass(frozen=True)
class AutoencoderScores:
    """What `autoencoder_scores` measured, on tokens that are no pads.

    Args:
        tokens: how many.
        accuracy: share of the tokens that are found again, by the standard deviation of the noise on the mean vector.
        chunk_accuracy: share of the chunks of which every token is, likewise.
        posterior_accuracy: share of the tokens, with noise as wide as the encoder says: what training saw.
        cross_entropy: nats per token with that noise.
        kl: nats per chunk.
        latent: l, dimensions of a vector.
        above_floor: dimensions whose divergence is above the free part on average.
        active: dimensions whose mean has a variance above 0.01 over chunks.
        std: of the encoder's distributions, mean over chunks and dimensions.
    """

    tokens: int
    accuracy: dict[float, float]
    chunk_accuracy: dict[float, float]
    posterior_accuracy: float
    cross_entropy: float
    kl: float
    latent: int
    above_floor: int
    active: int
    std: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        told = asdict(self)
        for name in ("accuracy", "chunk_accuracy"):
            told[name] = {f"{sigma:g}": share for sigma, share in told[name].items()}
        return told


@torch.no_grad()
def autoencoder_scores(
    model: CalmAutoencoder, chunks: Tensor, *, sigmas: Sequence[float] = SIGMAS, batch: int = 1024, seed: int = 0
) -> AutoencoderScores:
    """Measure an autoencoder on chunks that it was not trained on; whole pad chunks are left out.

    Args:
        model: it runs in evaluation mode and is left as it was.
        chunks: ``(n, K)`` long, as `quickmerge.training.calm_texts.document_chunks` gives them.
        sigmas: standard deviations of the noise that is added to each chunk's mean vector.
        batch: chunks read at once.
        seed: of the noise.

    Raises:
        QuickmergeError: there is no chunk with a token.
        ValueError: for a negative sigma.
    """
    for sigma in sigmas:
        number_at_least("each of sigmas", sigma, 0)
    config, device = model.config, model.embed.weight.device
    chunks = chunks[real_chunks(chunks, config.pad_token_id)]
    if not len(chunks):
        raise QuickmergeError("chunks must hold at least one token to measure on, got none")
    training = model.training
    model.eval()
    draws = torch.Generator().manual_seed(seed)
    sums: dict[Any, float] = {}

    def add(name: Any, value: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + float(value.double().sum())

    moments = torch.zeros(3, config.latent, dtype=torch.float64)  # sums of the mean, of its square and of the KL
    try:
        for part in torch.split(chunks, batch):
            ids = part.to(device)
            token = ids != config.pad_token_id
            mean, log_std = model.encode(ids)
            moments += torch.stack([mean, mean.square(), kl_by_dimension(mean, log_std)]).double().sum(1).cpu()
            add("std", log_std.exp())
            levels: list[float | None] = [*sigmas, None]  # None: as wide as the encoder says
            for level in levels:
                noise = torch.randn(mean.shape, generator=draws, dtype=mean.dtype).to(device)
                rows = model.read(mean + noise * (log_std.exp() if level is None else level)).flatten(0, 1)
                nats, hits = linear_cross_entropy(rows, model.embed.weight, ids.flatten())
                right = hits.view_as(ids)
                add(("token", level), right & token)
                add(("chunk", level), (right | ~token).all(-1))
                if level is None:
                    add("nats", nats.view_as(ids)[token])
            add("tokens", token)
    finally:
        model.train(training)
    mean, square, kl = moments / len(chunks)
    tokens = sums["tokens"]
    return AutoencoderScores(
        tokens=int(tokens),
        accuracy={sigma: sums["token", sigma] / tokens for sigma in sigmas},
        chunk_accuracy={sigma: sums["chunk", sigma] / len(chunks) for sigma in sigmas},
        posterior_accuracy=sums["token", None] / tokens,
        cross_entropy=sums["nats"] / tokens,
        kl=float(kl.sum()),
        latent=config.latent,
        above_floor=int((kl > config.kl_floor).sum()),
        active=int((square - mean.square() > ACTIVE_VARIANCE).sum()),
        std=sums["std"] / (len(chunks) * config.latent),
    )
