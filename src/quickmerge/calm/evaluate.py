"""BrierLM of CALMs and of ordinary language models at the same places of the same texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quickmerge.calm.autoencoder import CalmAutoencoder, kl_by_dimension, linear_cross_entropy
from quickmerge.calm.brier import GRAMS, BrierScore, brier_gap, brier_score
from quickmerge.calm.chunks import real_chunks
from quickmerge.calm.rollout import calm_terms, discrete_terms
from quickmerge.errors import QuickmergeError, number_at_least, whole_number

__all__ = [
    "SIGMAS",
    "AutoencoderScores",
    "BrierText",
    "autoencoder_scores",
    "brier_text",
    "compare",
    "is_calm",
    "text_terms",
]


Row = dict[str, Any]
Advance = Callable[[int], None]

FEW = 10
"""With fewer documents than these, windows are what the interval is over."""


@dataclass(frozen=True)
class BrierText:
    """What BrierLM is measured on.

    Attributes:
        windows: ``(W, L)`` token ids, cut from documents from their start.
        places: ``(P, 2)``: the window and the place in it where an outcome of four tokens begins.
        groups: ``(P,)``: the document of each place, or its window where there are few documents.
        unit: which of the two, ``"documents"`` or ``"windows"``.
        step: all places are multiples of it.
    """

    windows: Tensor
    places: Tensor
    groups: Tensor
    unit: str
    step: int


def brier_text(
    tokenizer: Any,
    texts: Sequence[str],
    patches: Sequence[int] = (4,),
    *,
    length: int = 256,
    context: int = 32,
    limit: int = 2000,
    seed: int = 0,
) -> BrierText:
    """Choose places where a chunk begins for every chunk size, so that models of all of them are asked the same.

    Args:
        tokenizer: of all models.
        texts: documents, which no model was trained on.
        patches: K of every CALM that is measured; leave out ordinary models.
        length: L, tokens of a window.
        context: tokens that stand before a place at least.
        limit: places, drawn from all there are.
        seed: of that draw.

    Raises:
        QuickmergeError: no document is long enough for one place.
        ValueError: a number is out of range.
    """
    length, context, limit = (
        whole_number(name, value) for name, value in (("length", length), ("context", context), ("limit", limit))
    )
    patches = [whole_number("patch", patch) for patch in patches]
    step = math.lcm(GRAMS, *patches)  # outcomes of different places have no token in common
    reach = max([GRAMS, *(-(-GRAMS // patch) * patch for patch in patches)])
    begin = -(-context // step) * step
    offsets = list(range(begin, length - reach + 1, step))
    windows: list[list[int]] = []
    places: list[tuple[int, int]] = []
    documents: list[int] = []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), length):
            part = ids[start : start + length]
            here = [offset for offset in offsets if offset + reach <= len(part)]
            if here:
                places += [(len(windows), offset) for offset in here]
                documents += [number] * len(here)
                # What fills up a short window stands behind every outcome in it, and is read by nobody.
                windows.append(part + part[:1] * (length - len(part)))
    if not places:
        raise QuickmergeError(
            f"texts must hold a document of at least {begin + reach} tokens to be measured, in windows of as many; got "
            f"{len(texts)} documents in windows of {length}"
        )
    chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    found, document = torch.tensor(places)[chosen], torch.tensor(documents)[chosen]
    few = len(set(document.tolist())) < FEW
    return BrierText(
        torch.tensor(windows), found, found[:, 0] if few else document, "windows" if few else "documents", step
    )


def is_calm(model: Any) -> bool:
    """Whether a model draws chunks, instead of giving probabilities of tokens."""
    return bool(getattr(model.config, "model_type", None) == "quickmerge-calm")


def text_terms(
    model: Any,
    text: BrierText,
    *,
    samples: int = 16,
    paths: int = 4,
    seed: int = 0,
    advance: Advance = lambda _: None,
) -> Tensor:
    """Brier-1 to Brier-4 of a model at every place, ``(P, 4)`` float64.

    Args:
        model: a CALM or a causal LM of transformers, in eval mode.
        text: where.
        samples: draws of a CALM at each place and chunk.
        paths: of colliding chunks or tokens at each place.
        seed: of all that is random; each window has its own stream, so that the others do not matter.
        advance: called with the places done, window by window.

    Raises:
        QuickmergeError: a place does not fit the model.
    """
    if model.training:
        raise QuickmergeError("model must be in eval mode to be measured: call model.eval()")
    parts = []
    for window in sorted(set(text.places[:, 0].tolist())):
        here = text.places[text.places[:, 0] == window, 1]
        # torch's generator on a CPU reads 32 bits of its seed
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, window]).generate_state(1)[0]))
        if is_calm(model):
            found = calm_terms(model, text.windows[window], here, samples=samples, paths=paths, generator=generator)
        else:
            found = discrete_terms(model, text.windows[window], here, paths=paths, generator=generator)
        parts.append(found)
        advance(len(here))
    return torch.cat(parts)


def compare(
    terms: dict[str, Tensor], text: BrierText, *, against: str | None = None, resamples: int = 2000, seed: int = 0
) -> list[Row]:
    """A row for each model: BrierLM and its interval, and the paired difference from one of the models.

    Args:
        terms: of every model, by its name, at all places of the text.
        text: where they were measured.
        against: the model that the others are set beside; None for the first.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    other = against if against is not None else next(iter(terms))
    rows = []
    for name, mine in terms.items():
        score: BrierScore = brier_score(mine, text.groups, resamples=resamples, seed=seed)
        row: Row = {"method": name, "brier_lm": score.value, "brier_lm_low": score.low, "brier_lm_high": score.high}
        row |= {key: value for key, value in score.as_dict().items() if key not in ("value", "low", "high")}
        if name != other:
            gap = brier_gap(mine, terms[other], text.groups, resamples=resamples, seed=seed)
            row |= {"against": other, "gap": gap.value, "gap_low": gap.low, "gap_high": gap.high}
        rows.append({**row, "unit": text.unit})
    return rows


# What an autoencoder of chunks keeps: tokens found again, clean and under noise, and dimensions in use.


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
        chunks: ``(n, K)`` long, as `quickmerge.calm.texts.document_chunks` gives them.
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
