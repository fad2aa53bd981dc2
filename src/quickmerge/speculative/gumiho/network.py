"""Keys and values of the serial head: rows of any length side by side, without holes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedModel

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.models.compat import LlamaDecoderLayer, cache_argument
from quickmerge.models.moved import onto
from quickmerge.speculative.gumiho.config import GumihoConfig

__all__ = ["Ends", "GumihoNetwork", "ParallelHeads", "RowCache", "check_fit", "check_target"]


GROWTH = 256
"""Columns that are added at least when there is no more room."""


class RowCache:
    """What the serial head has read of each row, and behind it what it drafts at the moment.

    Row b holds its pairs in the columns 0 .. length[b] - 1. Columns behind them are scratch: whatever is written there
    is overwritten when the row grows. So rows that accept different numbers of tokens never leave holes, and a draft
    needs no undoing.

    It is given to transformers' decoder layers in the place of their own cache, of which they only call `update`.
    """

    def __init__(self, rows: int) -> None:
        self.length = [0] * rows
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._at = torch.zeros(rows, 0, dtype=torch.long)
        self._width = 0
        self._first: int | None = None

    def aim(self, at: Tensor, width: int, first: int | None = None) -> None:
        """Say where the next pairs go, and how far the layers shall see.

        Args:
            at: ``(B, K)`` long, the column of each pair.
            width: how many columns the layers are given; all of ``at`` lie in them.
            first: the first of the columns, where all rows have the same K columns in a row.
        """
        self._at, self._width, self._first = at, width, first

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values ``(B, heads, K, d)`` of a layer in; returns all that it holds, in `aim`'s width."""
        if layer == len(self._keys):
            self._keys.append(key[:, :, :0])
            self._values.append(value[:, :, :0])
        for held, new in ((self._keys, key), (self._values, value)):
            held[layer] = self._with_room(held[layer])
            if self._first is not None:
                held[layer][:, :, self._first : self._first + new.shape[2]] = new
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]
                held[layer][rows, :, self._at] = new.transpose(1, 2)
        return self._keys[layer][:, :, : self._width], self._values[layer][:, :, : self._width]

    def _with_room(self, x: Tensor) -> Tensor:
        if x.shape[2] >= self._width:
            return x
        size = max(self._width, x.shape[2] + max(GROWTH, x.shape[2] // 2))
        # Zeros, not whatever was in memory: a hidden column counts nothing times its value, which must be a number.
        wider = x.new_zeros(x.shape[0], x.shape[1], size, x.shape[3])
        wider[:, :, : x.shape[2]] = x
        return wider

    def rows(self, index: Tensor) -> None:
        """Go on with the rows ``index (R,)`` alone, in this order."""
        self.length = [self.length[row] for row in index.tolist()]
        index = onto(index, self._keys[0].device) if self._keys else index
        self._keys, self._values = [x[index] for x in self._keys], [x[index] for x in self._values]


# The two ends of the target that its draft heads share: token embeddings, and the matrix that makes logits.


class Ends:
    """Embeddings and output matrix of a target, frozen, as its draft heads use them.

    Args:
        model: the target.
        drafted: ``(D,)`` ids of the tokens that can be drafted; None for all. Of the output matrix only their rows
            are used, and copied.
        dtype: what the heads compute in.
    """

    def __init__(self, model: PreTrainedModel, drafted: Tensor | None, dtype: torch.dtype) -> None:
        head = model.get_output_embeddings()
        weight, bias = head.weight.detach(), getattr(head, "bias", None)
        self.drafted = None if drafted is None else drafted.to(weight.device)
        if self.drafted is not None:
            weight, bias = weight[self.drafted], None if bias is None else bias[self.drafted]
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self._embedding = [model.get_input_embeddings()]
        self._scale, self._cap = _scaling(model)
        self.dtype = dtype

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings ``(..., E)`` of token ids ``(...)``."""
        out: Tensor = self._embedding[0](tokens).to(self.dtype)
        return out

    def logits(self, features: Tensor) -> Tensor:
        """What the target's output matrix makes of features ``(..., H)``: ``(..., D)``, in float32 at least."""
        # As one matrix, since torch multiplies a view of several dimensions piece by piece.
        out = F.linear(features.reshape(-1, features.shape[-1]), self.weight, self.bias)
        out = out.view(*features.shape[:-1], len(self.weight))
        out = out.to(torch.promote_types(out.dtype, torch.float32)) * self._scale
        return out if self._cap is None else self._cap * torch.tanh(out / self._cap)

    def tokens(self, index: Tensor) -> Tensor:
        """The token ids of places ``(...)`` in the logits."""
        return index if self.drafted is None else self.drafted[index]


def _scaling(model: PreTrainedModel) -> tuple[float, float | None]:
    """What some families do with logits behind the output matrix: a factor, and the height they are bent to."""
    config = model.config.get_text_config(decoder=True)
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return float(factor), getattr(config, "final_logit_softcapping", None)


def check_target(model: object) -> None:
    """Raise UnsupportedModelError unless ``model`` is a causal LM with an output matrix that draft heads can share."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"model must be a transformers PreTrainedModel, got a {name}")
    head = model.get_output_embeddings()
    if model.base_model is model or head is None or getattr(head, "weight", None) is None:
        raise UnsupportedModelError(f"{name} has no language-model head on a base decoder, which draft heads share")
    if not head.weight.is_floating_point():
        raise UnsupportedModelError(
            f"{name} has an output matrix of {head.weight.dtype}: draft heads need one of floating-point numbers"
        )


def check_fit(model: PreTrainedModel, config: GumihoConfig) -> None:
    """Raise an error unless heads of this shape can draft for ``model``.

    Raises:
        UnsupportedModelError: see `check_target`.
        QuickmergeError: the model's vocabulary or widths are others than those that the heads were made for.
    """
    check_target(model)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    for what, wanted, given in (
        ("tokens in its vocabulary", config.vocabulary, head.shape[0]),
        ("features in its last hidden state", config.features, head.shape[1]),
        ("features in its embeddings", config.embedding, embedding.shape[1]),
    ):
        if wanted != given:
            raise QuickmergeError(
                f"model must have {wanted} {what}, as the one that the draft heads were made for, "
                f"got a {type(model).__name__} with {given}"
            )


# The draft heads as a network: fusion of token and feature, the serial layers, the parallel heads.


ACTIVATION = {"silu": F.silu, "relu": F.relu}


class ParallelHeads(nn.Module):
    """M networks of the same shape, computed together.

    ``y_1 = a(W_1 u + b_1)``, ``y_j = y_(j-1) + a(W_j y_(j-1) + b_j)`` for j = 2 .. depth, where a is the activation;
    and ``W y_depth + b`` if the width is not H. The residual layers begin as the identity.

    Args:
        config: their shape.
    """

    def __init__(self, config: GumihoConfig) -> None:
        super().__init__()
        features, width, heads = config.features, config.mlp_width, config.heads
        self.heads, self.activation = heads, ACTIVATION[config.activation]
        self.first = nn.Parameter(_drawn(heads, 2 * features, width))
        self.first_bias = nn.Parameter(torch.zeros(heads, 1, width))
        self.weight = nn.Parameter(torch.zeros(config.mlp_depth - 1, heads, width, width))
        self.bias = nn.Parameter(torch.zeros(config.mlp_depth - 1, heads, 1, width))
        self.last: nn.Parameter | None = None
        if width != features:
            self.last = nn.Parameter(_drawn(heads, width, features))
            self.last_bias = nn.Parameter(torch.zeros(heads, 1, features))

    def forward(self, u: Tensor) -> Tensor:
        """``u (R, 2H)``, two fused pairs side by side, or ``(M, R, 2H)``, others for each head: to ``(M, R, H)``."""
        y = self.activation(torch.baddbmm(self.first_bias, u.expand(self.heads, -1, -1), self.first))
        for weight, bias in zip(self.weight, self.bias, strict=True):
            y = y + self.activation(torch.baddbmm(bias, y, weight))
        return y if self.last is None else torch.baddbmm(self.last_bias, y, self.last)


class GumihoNetwork(nn.Module):
    """What is trained of Gumiho (arXiv 2503.10135). Embeddings and output matrix are the target's.

    A *pair* is a token x_(t+1) and the feature h_t that predicted it: the target's last hidden state behind its final
    norm, or a guess of it. Features are in the target's scale on both sides.

    Args:
        config: its shape.
    """

    def __init__(self, config: GumihoConfig) -> None:
        super().__init__()
        self.config = config
        self.fusion = nn.Linear(config.embedding + config.features, config.features)
        self.layers = nn.ModuleList(_layer(config, index) for index in range(config.serial_layers))
        self.parallel = ParallelHeads(config) if config.heads else None
        if config.draft_vocabulary is not None:
            self.register_buffer("drafted", torch.arange(config.draft_vocabulary))

    drafted: Tensor
    """``(draft_vocabulary,)`` token ids that can be drafted, rising; only where there are fewer than the target's."""

    def fuse(self, embedded: Tensor, features: Tensor) -> Tensor:
        """``f(x, h) = W [E(x); h] + b`` of pairs: embeddings ``(..., E)`` and features ``(..., H)`` to ``(..., H)``."""
        config = self.config
        pair = torch.cat([embedded / config.embedding_scale, features / config.feature_scale], -1)
        out: Tensor = self.fusion(pair)
        return out

    def serial(
        self, fused: Tensor, position: Tensor, mask: Tensor | None = None, cache: RowCache | None = None
    ) -> Tensor:
        """The serial head's guess of the next feature behind each pair.

        Args:
            fused: ``(B, K, H)``, see `fuse`.
            position: ``(B, K)``, the place of each pair in its row.
            mask: ``(B, 1, K, n)`` bool, which of the n columns of the cache each pair sees; None for causal order.
            cache: keys and values of pairs; it takes these in.

        Returns:
            ``(B, K, H)``, features.
        """
        config = self.config
        turn = _rotation(position, config.head_width, config.rope_base, fused.dtype)
        x = fused
        for layer in self.layers:
            x = layer(x, attention_mask=mask, position_embeddings=turn, **cache_argument(layer, cache))
        out: Tensor = x * config.feature_scale
        return out

    def guess(self, before: Tensor, pair: Tensor) -> Tensor:
        """The parallel heads' guesses ``(M, R, H)`` of the features behind two successive fused pairs.

        Args:
            before: ``(R, H)`` the earlier pair of each row, or ``(M, R, H)``, another one for each head.
            pair: the later one, of the same shape.
        """
        assert self.parallel is not None
        out: Tensor = self.parallel(torch.cat([before, pair], -1)) * self.config.feature_scale
        return out


def _drawn(heads: int, width: int, out: int) -> Tensor:
    """Matrices ``(heads, width, out)`` of random weights, as large as torch's own linear layers have them."""
    drawn = torch.rand(heads, width, out) * 2 - 1
    return drawn / math.sqrt(width)


def _layer(config: GumihoConfig, index: int) -> LlamaDecoderLayer:
    shape = LlamaConfig(
        hidden_size=config.features,
        intermediate_size=config.inner,
        num_attention_heads=config.attention_heads,
        num_key_value_heads=config.key_value_heads,
        head_dim=config.head_width,
        attn_implementation="sdpa",
    )
    layer = LlamaDecoderLayer(shape, index)
    # The first layer reads the fusion as it is.
    layer.input_layernorm = _Norm(config.features, config.epsilon) if index else nn.Identity()
    layer.post_attention_layernorm = _Norm(config.features, config.epsilon)
    return layer


class _Norm(nn.RMSNorm):
    """Computes in the type of its input, float64 too, and with it under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        return out


def _rotation(position: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(B, K, width)`` of rotary positions; both halves hold the same angles."""
    exact = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(0, width, 2, device=position.device, dtype=exact) / width
    angle = (position[..., None].to(exact) * base**-steps).repeat(1, 1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)
