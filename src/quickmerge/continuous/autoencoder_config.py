"""What an autoencoder of chunks is made of; stored as config.json beside its weights."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers import PretrainedConfig

from quickmerge.errors import number_at_least, whole_number
from quickmerge.models.part import HASH

__all__ = ["CalmAutoencoderConfig"]


class CalmAutoencoderConfig(PretrainedConfig):  # type: ignore[misc]
    """Settings of a `CalmAutoencoder` (arXiv 2510.27688).

    Args:
        vocab_size: token ids, the pad included.
        patch: K, tokens of a chunk.
        latent: l, features of the vector that a chunk becomes.
        width: d, features inside.
        inner: features inside a gated layer; None for 5/2 of the width.
        token_dropout: probability that training hides a token from the encoder, in [0, 1).
        latent_dropout: probability that training sets a feature of the vector to zero, in [0, 1).
        kl_weight: of the divergence from the standard normal distribution, per chunk.
        kl_floor: nats of it that are free in each dimension; 0 for none.
        pad_token_id: an id that no text uses; None for the last one.
        eos_token_id: closes a document.
        norm_eps: of the norms.

    Raises:
        ValueError: naming the setting that is out of range.
    """

    model_type = "quickmerge-calm-autoencoder"

    vocab_size: int = 49153
    patch: int = 4
    latent: int = 128
    width: int = 512
    inner: int | None = None
    token_dropout: float = 0.15
    latent_dropout: float = 0.15
    kl_weight: float = 1e-3
    kl_floor: float = 0.5
    pad_token_id: int | None = None
    eos_token_id: int = 0
    norm_eps: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        import_module("quickmerge.continuous.autoencoder")  # so that AutoModel knows the model of what it has read
        for name in ("patch", "latent", "width"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        object.__setattr__(self, "vocab_size", whole_number("vocab_size", self.vocab_size, 2))
        if self.inner is None:
            self.inner = max(1, 5 * self.width // 2)
        object.__setattr__(self, "inner", whole_number("inner", self.inner))
        if self.pad_token_id is None:
            self.pad_token_id = self.vocab_size - 1
        for name in ("pad_token_id", "eos_token_id"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 0))
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name} must be below vocab_size ({self.vocab_size}), got {getattr(self, name)}")
        if self.pad_token_id == self.eos_token_id:
            raise ValueError(f"pad_token_id must be an id of its own, got that of the end token, {self.eos_token_id}")
        for name in ("token_dropout", "latent_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
        for name in ("kl_weight", "kl_floor", "norm_eps"):
            number_at_least(name, getattr(self, name), 0)
        kwargs.pop(HASH, None)  # of the weights it was read beside; what is saved has its own
        super().__post_init__(**kwargs)
