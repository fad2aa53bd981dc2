"""What a set of draft heads is made of and which model it drafts for; stored as config.json beside its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError, first_sentence, near_match, whole_number
from quickmerge.models.part import read_settings

__all__ = ["ACTIVATIONS", "GumihoConfig"]

KIND = "quickmerge-gumiho"
ACTIVATIONS = ("silu", "relu")


@dataclass(frozen=True)
class GumihoConfig:
    """Shape of the draft heads.

    ``serial`` tokens are drafted one after the other by ``serial_layers`` transformer layers, and ``heads`` more at
    once by one small network each. Two ends of the range are methods of their own: ``heads=0`` is a serial drafter as
    in EAGLE, ``serial=0`` with ``serial_layers=0`` a parallel one as in Medusa.

    The paper's heads for a target of width H are ``mlp_depth=2, activation="relu"``; those that were published with
    it are the defaults here.

    Args:
        features: width H of the target's last hidden state.
        embedding: width E of its token embeddings.
        vocabulary: number V of tokens that its head knows.
        draft_vocabulary: how many tokens can be drafted; None for all of them.
        serial: tokens that the serial head drafts.
        serial_layers: its transformer layers.
        attention_heads: of such a layer; 0 if there is none.
        key_value_heads: of such a layer, a divisor of ``attention_heads``; 0 if there is none.
        head_width: features of an attention head, even; 0 if there is none.
        inner: width of the gated network in such a layer; 0 if there is none.
        rope_base: of its rotary positions.
        heads: parallel heads.
        mlp_depth: linear layers of one, at least 2: the first reads, the others are residual.
        mlp_width: their width; another one than ``features`` needs one more linear layer at the end.
        activation: ``"silu"`` or ``"relu"``.
        feature_scale: what the target's features are divided by on the way in and multiplied with on the way out.
        embedding_scale: what its embeddings are divided by.
        epsilon: of the norms in the serial layers.
        trained_for: the target's name and hash, and how the heads were trained.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    features: int
    embedding: int
    vocabulary: int
    draft_vocabulary: int | None = None
    serial: int = 2
    serial_layers: int = 2
    attention_heads: int = 0
    key_value_heads: int = 0
    head_width: int = 0
    inner: int = 0
    rope_base: float = 10_000.0
    heads: int = 5
    mlp_depth: int = 6
    mlp_width: int = 0
    activation: str = "silu"
    feature_scale: float = 1.0
    embedding_scale: float = 1.0
    epsilon: float = 1e-6
    trained_for: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("features", "embedding", "vocabulary"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        for name in ("serial", "serial_layers", "heads"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 0))
        if self.draft_vocabulary is not None:
            object.__setattr__(self, "draft_vocabulary", whole_number("draft_vocabulary", self.draft_vocabulary))
            if self.draft_vocabulary > self.vocabulary:
                raise ValueError(
                    f"draft_vocabulary must be at most the {self.vocabulary} tokens of the model, "
                    f"got {self.draft_vocabulary}"
                )
        if not self.depth:
            raise ValueError("serial and heads must draft a token at least, got 0 and 0")
        if bool(self.serial) != bool(self.serial_layers):
            raise ValueError(
                "serial and serial_layers must both be 0 or both be more, "
                f"got serial={self.serial} and serial_layers={self.serial_layers}"
            )
        if self.serial:
            self._check_layers()
        if self.heads:
            object.__setattr__(self, "mlp_depth", whole_number("mlp_depth", self.mlp_depth, 2))
            object.__setattr__(self, "mlp_width", whole_number("mlp_width", self.mlp_width))
        if self.activation not in ACTIVATIONS:
            known = near_match(str(self.activation), ACTIVATIONS)
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}{known}")
        for name in ("rope_base", "feature_scale", "embedding_scale", "epsilon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0, got {value!r}")

    def _check_layers(self) -> None:
        for name in ("attention_heads", "key_value_heads", "head_width", "inner"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.attention_heads % self.key_value_heads:
            raise ValueError(
                f"key_value_heads must divide attention_heads ({self.attention_heads}), got {self.key_value_heads}"
            )
        if self.head_width % 2:
            raise ValueError(f"head_width must be even, since rotary positions turn pairs, got {self.head_width}")

    @property
    def depth(self) -> int:
        """How many tokens ahead can be drafted."""
        return self.serial + self.heads

    @property
    def drafted(self) -> int:
        """How many tokens of the vocabulary can be drafted."""
        return self.draft_vocabulary or self.vocabulary

    @classmethod
    def of(cls, model: Any, **shape: Any) -> GumihoConfig:
        """Heads for a causal language model: what ``shape`` leaves open is as in one of the model's own layers.

        Args:
            model: a transformers causal LM.
            **shape: fields of `GumihoConfig`.

        Raises:
            ValueError: a field is unknown or out of range.
        """
        known = [f.name for f in fields(cls)]
        for name in shape:
            if name not in known:
                raise ValueError(f"unknown setting {name!r} of the draft heads{near_match(name, known)}")
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        usual: dict[str, Any] = {
            "features": head.weight.shape[1], "embedding": embedding.weight.shape[1],
            "vocabulary": head.weight.shape[0], **shape,
        }  # fmt: skip
        if usual.get("serial_layers", cls.serial_layers) and usual.get("serial", cls.serial):
            text = model.config.get_text_config(decoder=True)
            heads = shape.get("attention_heads") or getattr(text, "num_attention_heads", 1)
            usual.setdefault("attention_heads", heads)
            usual.setdefault("key_value_heads", getattr(text, "num_key_value_heads", None) or heads)
            # half of a pair turns nothing
            usual.setdefault("head_width", max(2, usual["features"] // heads // 2 * 2))
            usual.setdefault("inner", getattr(text, "intermediate_size", None) or 4 * usual["features"])
        if usual.get("heads", cls.heads):
            usual.setdefault("mlp_width", usual["features"])
        return cls(**usual)

    def to_json(self) -> str:
        """As text for config.json."""
        return json.dumps({"kind": KIND, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> GumihoConfig:
        """Read a config.json.

        Raises:
            QuickmergeError: if the file is not there, or is not that of draft heads.
        """
        return cls.from_data(read_settings(path), path)

    @classmethod
    def from_data(cls, data: dict[str, Any], path: Path) -> GumihoConfig:
        """From the content of a config.json; ``path`` is named in errors, which are those of `read`."""
        data = dict(data)
        if data.pop("kind", None) != KIND:
            raise QuickmergeError(
                f'{path} must belong to draft heads ("kind": "{KIND}"), got the config of something else'
            )
        known = {f.name for f in fields(cls)}
        if not isinstance(data.get("trained_for", {}), dict):
            raise QuickmergeError(f"{path}: trained_for must be an object, got {data['trained_for']!r}")
        if unknown := sorted(set(data) - known):
            raise QuickmergeError(f"{path} has the unknown entry {unknown[0]!r}{near_match(unknown[0], known)}")
        try:
            return cls(**data)
        except Exception as error:  # a value of the wrong kind leads to errors of any kind
            raise QuickmergeError(f"{path}: {first_sentence(error)}") from error
