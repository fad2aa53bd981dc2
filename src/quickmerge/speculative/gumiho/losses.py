"""What the draft heads are trained for: the target's next features, and the tokens that it makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quickmerge.errors import number_at_least
from quickmerge.speculative.gumiho.network import Ends, GumihoNetwork

__all__ = ["Guesses", "LossWeights", "guesses_at", "gumiho_losses"]


@dataclass(frozen=True)
class LossWeights:
    """How the losses are added.

    ``feature v + token p + heads sum_i decay^(i+1) (feature v_i + token p_i)`` for i = 0 .. M - 1, where v is the
    smooth L1 distance of features and p the cross-entropy to the target's distribution, of the serial head and of
    each parallel head. The defaults are those of the paper's code.

    Args:
        feature: of the distances.
        token: of the cross-entropies.
        heads: of all parallel heads together.
        decay: from one parallel head to the next.
        wait: share of the training in which the parallel heads learn features alone.
    """

    feature: float = 1.0
    token: float = 0.1
    heads: float = 1 / 9
    decay: float = 0.8
    wait: float = 0.2

    def __post_init__(self) -> None:
        for name in ("feature", "token", "heads", "decay", "wait"):
            number_at_least(name, getattr(self, name), 0)
        if self.feature == self.token == 0:
            raise ValueError("feature and token must not both be 0: nothing would be learnt")


@dataclass(frozen=True)
class Guesses:
    """What the heads make of chosen features of the target.

    Attributes:
        features: ``(1 + M, R, H)`` guesses of R features: the serial head's, where there is one, then the parallel
            heads'.
        there: ``(1 + M, R)`` bool, False where a text begins too late for that head to have something to read.
    """

    features: Tensor
    there: Tensor


def guesses_at(network: GumihoNetwork, embedded: Tensor, features: Tensor, at: Tensor) -> tuple[Guesses, Tensor]:
    """All heads' guesses of some of the target's features, with the true tokens given up to where each head reads.

    A serial guess of h_j comes from the pairs up to ``(x_j, h_(j-1))``. Parallel head i guesses h_j from the two pairs
    that end with s = j - 1 - i: ``(x_s, h^_(s-1))`` and ``(x_(s+1), h^_s)``, where h^ is the serial head's guess one
    step ahead. With one serial token the earlier pair holds h_(s-1) itself, and without a serial head both do.

    Args:
        network: the heads.
        embedded: ``(B, n, E)`` embeddings of the tokens x.
        features: ``(B, n, H)`` the target's features h, as the heads may read them.
        at: ``(R, 2)`` long, row and j of each feature that is wanted.

    Returns:
        The guesses, and the serial head's of h_1 .. h_(n-1) everywhere, ``(B, n - 1, H)`` (no column without one).
    """
    config = network.config
    pairs = network.fuse(embedded[:, 1:], features[:, :-1])
    row, j = at.unbind(-1)
    found: list[Tensor] = []
    there: list[Tensor] = []
    ahead = pairs[:, :0]
    drafted = pairs  # index s: the pair (x_(s+1), h_s), or with the guess of h_s in its place
    first = 0
    if config.serial:
        place = torch.arange(pairs.shape[1], device=pairs.device).expand(pairs.shape[:2])
        ahead = network.serial(pairs, place)
        found.append(ahead[row, (j - 1).clamp_min(0)][None])
        there.append((j >= 1)[None])
        # There is no guess of h_0, so the pair at s = 0 only fills the place.
        drafted = torch.cat([pairs[:, :1], network.fuse(embedded[:, 2:], ahead[:, :-1])], 1)
        first = 1
    if config.heads:
        before, least = (drafted, first + 1) if config.serial > 1 else (pairs, 1)
        s = j - 1 - torch.arange(config.heads, device=j.device)[:, None]
        earlier, later = before[row, (s - 1).clamp_min(0)], drafted[row, s.clamp_min(0)]
        found.append(network.guess(earlier, later))
        there.append(s >= least)
    return Guesses(torch.cat(found), torch.cat(there)), ahead


def gumiho_losses(
    network: GumihoNetwork,
    ends: Ends,
    ids: Tensor,
    features: Tensor,
    counts: Tensor,
    *,
    weights: LossWeights,
    share: float = 1.0,
    noise: float = 0.2,
    progress: float = 1.0,
) -> dict[str, Tensor]:
    """The losses of a batch of texts, padded on the right (Gumiho, arXiv 2503.10135, as its code adds them up).

    Features are compared in units of the network's ``feature_scale``.

    Args:
        network: the heads.
        ends: of their target.
        ids: ``(B, n)`` tokens x.
        features: ``(B, n, H)`` the target's features h; h_j is what it predicts x_(j+1) from.
        counts: ``(B, n)`` bool, which features are to be guessed; never padding, and j = 0 does not count anyway.
        weights: of the losses.
        share: of these features, how many are drawn for the cross-entropies and the parallel heads. The serial head's
            distance is taken at all of them.
        noise: features are read with ``(U(0, 1) - 1/2) * noise * 512 / n`` added, in units of the scale.
        progress: share of the training that is done.

    Returns:
        ``loss``; ``feature``, ``token`` and ``agree`` of the serial head, and ``feature_i``, ``token_i``, ``agree_i``
        of each parallel head, counted from 1. ``agree`` is the share of features of which guess and truth have the
        same likeliest token among those that can be drafted.
    """
    config = network.config
    counts = counts.clone()
    counts[:, 0] = False
    scale = noise * 512 / ids.shape[1] * config.feature_scale
    read = features + (torch.rand_like(features) - 0.5) * scale if noise else features
    at = (counts & (torch.rand(counts.shape, device=counts.device) < share)).nonzero()
    guesses, ahead = guesses_at(network, ends.embed(ids), read, at)
    truth = features[at[:, 0], at[:, 1]]
    with torch.no_grad():
        wanted = ends.logits(truth).softmax(-1)
        likeliest = wanted.argmax(-1)
    out: dict[str, Tensor] = {}
    loss = guesses.features.sum() * 0.0  # an empty choice has a gradient too, for those who wait for it
    for index, (guess, there) in enumerate(zip(guesses.features, guesses.there, strict=True)):
        serial = config.serial > 0 and index == 0
        head = index - (config.serial > 0)
        name = "" if serial else f"_{head + 1}"
        if serial:
            distance = _mean(_distance(ahead, features[:, 1:], config.feature_scale), counts[:, 1:])
        else:
            distance = _mean(_distance(guess, truth, config.feature_scale), there)
        token = weights.token if serial or progress >= weights.wait else 0.0
        with torch.set_grad_enabled(torch.is_grad_enabled() and token > 0):
            logits = ends.logits(guess)
            entropy = _mean(-(wanted * logits.log_softmax(-1)).sum(-1), there)
        weight = 1.0 if serial else weights.heads * weights.decay ** (head + 1)
        loss = loss + weight * (weights.feature * distance + token * entropy)
        agree = _mean((logits.detach().argmax(-1) == likeliest).to(entropy.dtype), there)
        out |= {f"feature{name}": distance.detach(), f"token{name}": entropy.detach(), f"agree{name}": agree}
    return {"loss": loss, **out}


def _distance(guess: Tensor, truth: Tensor, scale: float) -> Tensor:
    """Smooth L1 distance with its bend at 1, mean over features: ``(..., H)`` to ``(...)``."""
    exact = torch.promote_types(guess.dtype, torch.float32)
    return F.smooth_l1_loss(guess.to(exact) / scale, truth.to(exact) / scale, reduction="none").mean(-1)


def _mean(x: Tensor, counts: Tensor) -> Tensor:
    """Mean of what counts, 0 if nothing does."""
    return torch.where(counts, x, 0.0).sum() / counts.sum().clamp_min(1)
