"""What an autoencoder of chunks is made of; stored as config.json beside its weights."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from quickmerge.calm.heads import HEADS, SamplingHead
from quickmerge.calm.heads.energy import check_alpha
from quickmerge.errors import near_match, number_at_least, whole_number
from quickmerge.models.part import HASH

__all__ = ["CALM_HEADS", "CalmAutoencoderConfig", "CalmConfig"]


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
        import_module("quickmerge.calm.autoencoder")  # so that AutoModel knows the model of what it has read
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


# What a continuous autoregressive language model (CALM) is made of; stored as config.json beside its weights.


CALM_HEADS = tuple(name for name, head in HEADS.items() if issubclass(head, SamplingHead))
"""Heads that can say what comes next: those that draw, and learn from draws."""


class CalmConfig(PretrainedConfig):  # type: ignore[misc]
    """Settings of a `CalmForCausalLM` (arXiv 2510.27688).

    Args:
        backbone: config of the causal language model of transformers that reads the chunks, or its dict with
            ``model_type``; a ``vocab_size`` that is left out is the autoencoder's. Its output matrix is not used.
        autoencoder: config of the autoencoder, or its dict: it says how many tokens a chunk has and how long its
            latent vector is.
        head: what draws the next latent vector: ``"energy"``, ``"flow"`` or ``"diffusion"``.
        head_settings: further arguments of that head. ``blocks`` is a quarter of the backbone's layers unless given.
        samples: N, draws of the energy head for each position in the loss, or noisy targets of the other heads.
        targets: M, draws of the autoencoder's posterior that they are compared with.
        alpha: exponent of the energy score, in (0, 2); the other heads have none.

    Raises:
        ValueError: naming the setting that is not allowed.
    """

    model_type = "quickmerge-calm"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone": AutoConfig, "autoencoder": CalmAutoencoderConfig}

    backbone: Any = None
    autoencoder: Any = None
    head: str = "energy"
    head_settings: dict[str, Any] | None = None
    samples: int = 8
    targets: int = 100
    alpha: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        import_module("quickmerge.calm.model")  # so that the Auto classes know the model of what they have read
        if isinstance(self.autoencoder, dict):
            self.autoencoder = CalmAutoencoderConfig(**self.autoencoder)
        if self.autoencoder is None:
            self.autoencoder = CalmAutoencoderConfig()  # transformers makes a config of nothing to compare with
        if self.backbone is None:
            self.backbone = {"model_type": "llama"}
        if isinstance(self.backbone, dict):
            self.backbone = _backbone(self.backbone, self.autoencoder.vocab_size)
        if self.backbone.vocab_size != self.autoencoder.vocab_size:
            raise ValueError(
                f"vocab_size of backbone must be that of the autoencoder, {self.autoencoder.vocab_size}, "
                f"got {self.backbone.vocab_size}"
            )
        if self.head not in CALM_HEADS:
            near = near_match(str(self.head), CALM_HEADS)
            raise ValueError(f"head must be one of {', '.join(CALM_HEADS)}, got {self.head!r}{near}")
        object.__setattr__(self, "samples", whole_number("samples", self.samples, 2 if self.head == "energy" else 1))
        object.__setattr__(self, "targets", whole_number("targets", self.targets))
        check_alpha(self.alpha)
        if clash := {"samples", "alpha"} & set(self.head_settings or {}):
            raise ValueError(f"head_settings must leave out {min(clash)}, which is a setting of its own")
        usual = {"blocks": max(1, self.backbone.num_hidden_layers // 4)}
        self.head_settings = {**usual, **(self.head_settings or {})}
        kwargs.pop(HASH, None)  # of the weights it was read beside; what is saved has its own
        super().__post_init__(**kwargs)

    @property
    def patch(self) -> int:
        """K, tokens of a chunk."""
        return int(self.autoencoder.patch)

    @property
    def latent(self) -> int:
        """Features of the vector that a chunk is drawn as."""
        return int(self.autoencoder.latent)

    @property
    def vocab_size(self) -> int:
        """Tokens that the autoencoder and the backbone know, padding among them."""
        return int(self.autoencoder.vocab_size)

    @property
    def hidden_size(self) -> int:
        """Features inside the backbone."""
        return int(self.backbone.hidden_size)

    @property
    def pad_token_id(self) -> int:
        """What fills up chunks, and stands in no text."""
        return int(self.autoencoder.pad_token_id)

    @property
    def eos_token_id(self) -> int:
        """What ends a text."""
        return int(self.autoencoder.eos_token_id)

    def all_head_settings(self) -> dict[str, Any]:
        """Arguments of `quickmerge.calm.heads.make_head` besides the sizes."""
        own = {"samples": self.samples, **({"alpha": self.alpha} if self.head == "energy" else {})}
        return {**(self.head_settings or {}), **own}


def _backbone(given: dict[str, Any], vocabulary: int) -> PretrainedConfig:
    settings = {"vocab_size": vocabulary, **given}
    kind = settings.pop("model_type", None)
    from quickmerge.models.compat import causal_lm_names

    if kind not in causal_lm_names():
        raise ValueError(
            "model_type of backbone must be one that transformers has a causal language model of, such as 'llama', "
            f"got {kind!r}{near_match(str(kind), causal_lm_names())}"
        )
    config: PretrainedConfig = AutoConfig.for_model(kind, **settings)
    return config


AutoConfig.register(CalmConfig.model_type, CalmConfig)
AutoConfig.register(CalmAutoencoderConfig.model_type, CalmAutoencoderConfig)
