"""Parameters that a loss does not depend on, kept in its graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PreTrainedModel

from quickmerge.calm.chunks import real_chunks
from quickmerge.calm.config import CalmAutoencoderConfig
from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.models.compat import ModelOutput, own_model
from quickmerge.models.kinds import KINDS
from quickmerge.models.part import Signed
from quickmerge.models.share import HubModel

__all__ = [
    "CalmAutoencoder",
    "CalmAutoencoderOutput",
    "Negatives",
    "free_bits",
    "kl_by_dimension",
    "linear_cross_entropy",
    "nothing_of",
    "sampled_cross_entropy",
]


def nothing_of(module: nn.Module) -> Tensor:
    """A scalar zero that every trained parameter of a module has its part in, with a gradient of zeros.

    Where processes train together (DDP) each waits for the gradient of every parameter, whatever its own batch holds.
    """
    trained = [value for value in module.parameters() if value.requires_grad]
    # The sum of nothing is zero whatever the values are, while 0 times a value need not be.
    return torch.stack([value.flatten()[:0].float().sum() for value in trained]).sum() if trained else torch.zeros(())


# The price of a latent vector, with so much of it free in each dimension that none collapses.


def kl_by_dimension(mean: Tensor, log_std: Tensor) -> Tensor:
    """``KL(N(mean, std^2) || N(0, 1)) = (mean^2 + std^2 - 1 - 2 log std) / 2`` in nats, elementwise."""
    # expm1 keeps what is left of std^2 - 1 near a std of 1, where a collapsed dimension is
    return 0.5 * (mean.square() + torch.expm1(2 * log_std) - 2 * log_std)


def free_bits(kl: Tensor, floor: float) -> Tensor:
    """``max(kl, floor)``: below the floor a dimension costs the same whatever it says, and has no gradient.

    Source: clipping of arXiv 2510.27688, after arXiv 1606.04934. A floor of 0 leaves the divergence as it is.
    """
    # torch.clamp lets the gradient through where both are equal, as it must be for a floor of 0
    return kl.clamp(min=floor)


# Cross-entropy over a large vocabulary: exact, a block of logits at a time, or from sampled words.


LOGITS = 1 << 24
"""Logits that are held at once: 64 MiB in float32."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, logits: int = LOGITS) -> tuple[Tensor, Tensor]:
    """``log sum_v exp(h . w_v) - h . w_y`` in nats for each row, and whether y is the first of the largest logits.

    Where not all logits may be held at once they are computed block by block, and once more for the gradient.

    Args:
        hidden: ``(n, d)``.
        weight: ``(V, d)``.
        labels: ``(n,)`` long.
        logits: how many may be held.

    Returns:
        ``(n,)`` in float32 at least, and ``(n,)`` bool.
    """
    rows = max(1, logits // len(weight))
    if len(hidden) <= rows:
        return _block(hidden, weight, labels)
    parts = [
        checkpoint(_block, h, weight, y, use_reentrant=False, preserve_rng_state=False)
        for h, y in zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True)
    ]
    return torch.cat([loss for loss, _ in parts]), torch.cat([hit for _, hit in parts])


def _block(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="none"), logits.detach().argmax(-1) == labels


class Negatives:
    """Words to hold against the right ones, drawn with replacement: half by how frequent they are, half evenly.

    Args:
        counts: ``(V,)``, how often each word is in the training text. What counts is the power 3/4 of it, as in
            arXiv 1310.4546.
        draws: words that are drawn at once.

    Raises:
        ValueError: for counts that are no frequencies, or draws below 1.
    """

    def __init__(self, counts: Tensor, draws: int) -> None:
        draws = whole_number("draws", draws)
        if counts.ndim != 1 or not len(counts) or bool((counts < 0).any()) or not bool(counts.sum() > 0):
            raise ValueError(f"counts must be a row of frequencies, got the shape {tuple(counts.shape)}")
        share = counts.double() ** 0.75
        self.draws = draws
        self.probability = 0.5 * share / share.sum() + 0.5 / len(counts)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Words ``(draws,)``, and the logarithms of their probabilities, from the global generator of the CPU."""
        words = torch.multinomial(self.probability, self.draws, replacement=True)
        return words, self.probability[words].log().float()


def sampled_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, negatives: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy with the sum over the vocabulary estimated from a few words, for each row.

    ``log Z - h . w_y`` with ``Z = exp(h . w_y) + 1/N sum_j [c_j != y] exp(h . w_(c_j)) / q(c_j)``. The mean of Z over
    draws of the words c from q is the true sum; its logarithm is below the true one on average, the less so the more
    words there are.

    Args:
        hidden: ``(n, d)``.
        weight: ``(V, d)``.
        labels: ``(n,)`` long.
        negatives: words ``(N,)`` and the logarithms of their probabilities ``(N,)``, the same for all rows.

    Returns:
        ``(n,)`` nats.
    """
    words, log_q = (part.to(hidden.device) for part in negatives)
    right = (hidden * weight[labels]).sum(-1).float()
    others = F.linear(hidden, weight[words]).float() - log_q - torch.tensor(float(len(words))).log()
    others = others.masked_fill(words == labels[:, None], -torch.inf)
    return torch.cat([right[:, None], others], 1).logsumexp(1) - right


# An autoencoder between K tokens and one vector, for each chunk alone.


@dataclass
class CalmAutoencoderOutput(ModelOutput):  # type: ignore[misc]
    """What `CalmAutoencoder` says of a batch; all are scalars.

    Args:
        loss: what is minimised.
        cross_entropy: nats per token; an estimate where words were sampled.
        kl: nats per chunk, nothing free.
        clipped_kl: nats per chunk, as it enters the loss.
        accuracy: share of tokens that are found again; None where words were sampled.
    """

    loss: Tensor | None = None
    cross_entropy: Tensor | None = None
    kl: Tensor | None = None
    clipped_kl: Tensor | None = None
    accuracy: Tensor | None = None


class GatedLayer(nn.Module):
    """``x + W_down(silu(W_gate n) * W_up n)`` with ``n = RMSNorm(x)``."""

    def __init__(self, config: CalmAutoencoderConfig) -> None:
        super().__init__()
        width, inner = config.width, config.inner
        assert inner is not None  # the config fills it in
        self.norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d)`` to ``(..., d)``."""
        n = self.norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(n)) * self.up(n))
        return out


class Encoder(nn.Module):
    """Embedded tokens ``(..., K, d)`` to mean and log standard deviation, ``(..., 2 l)``."""

    def __init__(self, config: CalmAutoencoderConfig) -> None:
        super().__init__()
        self.tokens = GatedLayer(config)
        self.squeeze = nn.Linear(config.patch * config.width, config.width)
        self.chunk = GatedLayer(config)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.out = nn.Linear(config.width, 2 * config.latent)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.out(self.norm(self.chunk(self.squeeze(self.tokens(x).flatten(-2)))))
        return out


class Decoder(nn.Module):
    """A vector ``(..., l)`` to what its K tokens are read off by the output matrix, ``(..., K, d)``."""

    def __init__(self, config: CalmAutoencoderConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.into = nn.Linear(config.latent, config.width)
        self.chunk = GatedLayer(config)
        self.expand = nn.Linear(config.width, config.patch * config.width)
        self.tokens = GatedLayer(config)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        x = self.expand(self.chunk(self.into(z))).unflatten(-1, (self.patch, -1))
        out: Tensor = self.norm(self.tokens(x))
        return out


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    # Each map keeps the scale of what it reads, so that small widths learn as readily as large ones.
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    elif isinstance(module, nn.RMSNorm):
        nn.init.ones_(module.weight)
    elif isinstance(module, CalmAutoencoder):
        nn.init.normal_(module.hidden_token, std=module.config.width**-0.5)


@own_model(_initialise)
class CalmAutoencoder(HubModel, Signed, PreTrainedModel):  # type: ignore[misc]
    """Autoencoder of CALM (arXiv 2510.27688): K tokens to one vector and back, whatever stands around them.

    The embeddings of the tokens are the output matrix too. A token that training hides from the encoder is
    represented by a vector of its own, not by another token.
    """

    hub_kind = KINDS["calm_autoencoder"]
    config_class = CalmAutoencoderConfig
    base_model_prefix = "calm_autoencoder"
    main_input_name = "input_ids"

    def __init__(self, config: CalmAutoencoderConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.hidden_token = nn.Parameter(torch.empty(config.width))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings, which are the output matrix too."""
        return self.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace them."""
        self.embed = value

    # Between tokens and vectors -----------------------------------------------------------------------------------

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation of a chunk's vector; nothing is hidden or random.

        Args:
            ids: ``(..., K)`` long.

        Returns:
            Two tensors ``(..., l)``, in float32 at least.

        Raises:
            ValueError: if the last dimension is not K.
        """
        if ids.ndim < 1 or ids.shape[-1] != self.config.patch:
            raise ValueError(f"ids must have shape (..., {self.config.patch}), got {tuple(ids.shape)}")
        return self._posterior(self.embed(ids))

    def draw(self, mean: Tensor, log_std: Tensor, count: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """``count`` vectors of each chunk's distribution: two tensors ``(..., l)`` to ``(count, ..., l)``."""
        origin = mean.device if generator is None else generator.device
        noise = torch.randn((count, *mean.shape), generator=generator, dtype=mean.dtype, device=origin)
        return mean + log_std.exp() * noise.to(mean.device)

    def decode(self, z: Tensor) -> Tensor:
        """Logits ``(..., K, V)`` of the tokens of vectors ``(..., l)``.

        Raises:
            ValueError: if the last dimension is not l.
        """
        return F.linear(self.read(z), self.embed.weight)

    def read(self, z: Tensor) -> Tensor:
        """What the output matrix reads, ``(..., K, d)``, of vectors ``(..., l)``; ValueError as for `decode`."""
        if z.ndim < 1 or z.shape[-1] != self.config.latent:
            raise ValueError(f"z must have shape (..., {self.config.latent}), got {tuple(z.shape)}")
        out: Tensor = self.decoder(z.to(self.embed.weight.dtype))
        return out

    def _posterior(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        both = self.encoder(embedded)
        mean, log_std = both.to(torch.promote_types(both.dtype, torch.float32)).chunk(2, -1)
        return mean, log_std

    # Learning -----------------------------------------------------------------------------------------------------

    def forward(
        self, input_ids: Tensor, *, noise: bool = True, negatives: Negatives | None = None
    ) -> CalmAutoencoderOutput:
        """The loss of some chunks; whole pad chunks have no part in it.

        ``K CE + kl_weight sum_l max(KL_l, kl_floor)`` with CE a mean over tokens and the sum a mean over chunks. In
        training mode tokens are hidden from the encoder, and features of the vector dropped.

        Args:
            input_ids: ``(n, N K)`` long, rows of chunks.
            noise: decode a draw of each chunk's distribution, in evaluation too; False decodes its mean.
            negatives: draws words anew in each call for a sampled cross-entropy; None computes the exact one.

        Raises:
            ValueError: if rows are no multiple of K tokens long, or all chunks are pads.
        """
        config = self.config
        if input_ids.ndim < 1 or input_ids.shape[-1] % config.patch or not input_ids.numel():
            raise ValueError(
                f"input_ids must be rows of a multiple of {config.patch} tokens, got the shape {tuple(input_ids.shape)}"
            )
        chunks = input_ids.reshape(-1, config.patch)
        chunks = chunks[real_chunks(chunks, config.pad_token_id)]
        if not len(chunks):
            raise ValueError("input_ids must hold a chunk that is not all pads, got none")
        x = self.embed(chunks)
        if self.training and config.token_dropout:
            hidden = torch.rand(chunks.shape, device=x.device) < config.token_dropout
            x = torch.where(hidden[..., None], self.hidden_token, x)
        elif self.training:
            x = x + nothing_of(self).to(x.dtype)  # the hidden token keeps its place in the graph
        mean, log_std = self._posterior(x)
        z = self.draw(mean, log_std)[0] if noise else mean
        rows = self.read(F.dropout(z, config.latent_dropout, self.training)).flatten(0, 1)
        accuracy = None
        if negatives is None:
            nats, hits = linear_cross_entropy(rows, self.embed.weight, chunks.flatten())
            accuracy = hits.float().mean()
        else:
            nats = sampled_cross_entropy(rows, self.embed.weight, chunks.flatten(), negatives.draw())
        kl = kl_by_dimension(mean, log_std)
        clipped = free_bits(kl, config.kl_floor).sum(-1).mean()
        cross_entropy = nats.mean()
        return CalmAutoencoderOutput(
            loss=config.patch * cross_entropy + config.kl_weight * clipped,
            cross_entropy=cross_entropy.detach(),
            kl=kl.detach().sum(-1).mean(),
            clipped_kl=clipped.detach(),
            accuracy=accuracy,
        )

    def load_pretrained_embeddings(self, weight: Tensor, seed: int = 0) -> None:
        """Begin from a language model's embeddings, brought to this width by a random orthogonal map.

        Distances are kept as well as a random map can, and exactly where the width is no smaller. Ids that the model
        has no row for, such as the pad, stay as they are.

        Args:
            weight: ``(V', D)``, of a model with the same tokenizer.
            seed: of the map.

        Raises:
            QuickmergeError: if there are fewer rows than a text may use ids.
        """
        rows = self.config.vocab_size - 1  # all but the pad
        if len(weight) < rows:
            raise QuickmergeError(
                f"embeddings must be of a model with the same tokenizer, of {rows} tokens; it has only {len(weight)}"
            )
        given = weight[:rows].detach().float().cpu()
        given = given - given.mean(0)
        turn = torch.empty(given.shape[1], self.config.width)
        nn.init.orthogonal_(turn, generator=torch.Generator().manual_seed(seed))
        projected = given @ turn
        scale = self.config.width**-0.5 / projected.square().mean().sqrt()
        with torch.no_grad():
            self.embed.weight[:rows] = (projected * scale).to(self.embed.weight)


# Down here, since loading these may make transformers look for the class above.

AutoConfig.register(CalmAutoencoderConfig.model_type, CalmAutoencoderConfig, exist_ok=True)
AutoModel.register(CalmAutoencoderConfig, CalmAutoencoder, exist_ok=True)
