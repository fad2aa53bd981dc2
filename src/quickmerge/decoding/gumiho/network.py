"""The draft heads as a network: fusion of token and feature, the serial layers, the parallel heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig

from quickmerge.decoding.gumiho.cache import RowCache
from quickmerge.decoding.gumiho.config import GumihoConfig
from quickmerge.models.compat import LlamaDecoderLayer, cache_argument

__all__ = ["GumihoNetwork", "ParallelHeads"]

EPSILON = 1e-6
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
    layer.input_layernorm = _Norm(config.features, EPSILON) if index else nn.Identity()
    layer.post_attention_layernorm = _Norm(config.features, EPSILON)
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
