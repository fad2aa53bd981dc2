"""Heads with large random weights, and their maths once more, slow and obvious."""

from __future__ import annotations

import math
from typing import Any

import torch
from decoding_samples import tiny
from torch import Tensor

from quickmerge.speculative.gumiho import Gumiho, GumihoNetwork
from quickmerge.speculative.gumiho.network import Ends

SHAPES = {
    "gumiho": {"serial": 2, "heads": 2},
    "one serial token": {"serial": 1, "serial_layers": 1, "heads": 3},
    "serial": {"serial": 3, "serial_layers": 1, "heads": 0},
    "parallel": {"serial": 0, "serial_layers": 0, "heads": 3},
    "three serial tokens": {"serial": 3, "heads": 1, "mlp_width": 24},
}
"""Of heads, the ends of the range among them."""


def heads(model: Any = None, seed: int = 0, *, size: float = 0.5, **shape: Any) -> Gumiho:
    """Heads in float64 whose weights are so large that they say something else at every place."""
    model = tiny() if model is None else model
    torch.manual_seed(seed)
    shape = {"mlp_depth": 3, "inner": 20, "feature_scale": 1.7, "embedding_scale": 0.4, **shape}
    made = Gumiho.new(model, **shape)
    made.network.double()
    for value in made.network.parameters():
        torch.nn.init.normal_(value, std=size)
    return made


def ends_of(made: Gumiho, model: Any = None) -> Ends:
    """The two ends of the target, in float64."""
    return Ends(tiny() if model is None else model, getattr(made.network, "drafted", None), torch.float64)


def literal_fuse(network: GumihoNetwork, embedded: Tensor, feature: Tensor) -> Tensor:
    """One pair: ``W [E(x) / e; h / s] + b``."""
    config, fc = network.config, network.fusion
    return fc.weight @ torch.cat([embedded / config.embedding_scale, feature / config.feature_scale]) + fc.bias


def literal_serial(network: GumihoNetwork, pairs: list[Tensor]) -> list[Tensor]:
    """The guess behind each of some pairs, token by token and head by head."""
    config = network.config
    rows = [pair.clone() for pair in pairs]
    for index, layer in enumerate(network.layers):
        attention = layer.self_attn
        into = [_norm(row, layer.input_layernorm) if index else row for row in rows]
        share = config.attention_heads // config.key_value_heads
        query, key, value = (
            [_heads(linear.weight @ row, config.head_width) for row in into]
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = _turned(query, config.rope_base), _turned(key, config.rope_base)
        after = []
        for t, row in enumerate(rows):
            read = []
            for head in range(config.attention_heads):
                of = head // share
                score = torch.stack([query[t][head] @ key[u][of] / math.sqrt(config.head_width) for u in range(t + 1)])
                read.append(sum(w * value[u][of] for u, w in enumerate(score.softmax(0))))
            row = row + attention.o_proj.weight @ torch.cat(read)
            inner = _norm(row, layer.post_attention_layernorm)
            gate = torch.nn.functional.silu(layer.mlp.gate_proj.weight @ inner) * (layer.mlp.up_proj.weight @ inner)
            after.append(row + layer.mlp.down_proj.weight @ gate)
        rows = after
    return [row * config.feature_scale for row in rows]


def _norm(x: Tensor, norm: Any) -> Tensor:
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight


def _heads(x: Tensor, width: int) -> list[Tensor]:
    return list(x.view(-1, width))


def _turned(rows: list[list[Tensor]], base: float) -> list[list[Tensor]]:
    """Rotary positions: pair (i, i + d/2) of position t by the angle ``t base^(-2i/d)``."""
    out = []
    for t, row in enumerate(rows):
        turned = []
        for x in row:
            half = len(x) // 2
            y = x.clone()
            for i in range(half):
                angle = t * base ** (-i / half)
                y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
                y[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
            turned.append(y)
        out.append(turned)
    return out


def literal_parallel(network: GumihoNetwork, earlier: Tensor, later: Tensor, head: int) -> Tensor:
    """The guess of one parallel head behind two fused pairs."""
    mlp, config = network.parallel, network.config
    act = {"silu": torch.nn.functional.silu, "relu": torch.relu}[config.activation]
    y = act(torch.cat([earlier, later]) @ mlp.first[head] + mlp.first_bias[head, 0])
    for weight, bias in zip(mlp.weight, mlp.bias, strict=True):
        y = y + act(y @ weight[head] + bias[head, 0])
    if mlp.last is not None:
        y = y @ mlp.last[head] + mlp.last_bias[head, 0]
    return y * config.feature_scale


class Literal:
    """What heads say behind a text and a path of drafted tokens, read anew as one plain sequence, without a cache.

    The network itself is held against plain loops in test_network.py.

    Args:
        made: the heads.
        model: their target.
        text: tokens x_0 .. x_n, the last one not read by the target yet.
    """

    def __init__(self, made: Gumiho, model: Any, text: list[int]) -> None:
        self.network, self.ends = made.network, ends_of(made, model)
        self.embedding = model.get_input_embeddings().weight
        features = model.base_model(torch.tensor([text[:-1]])).last_hidden_state[0]
        self.pairs = [self.pair(token, feature) for token, feature in zip(text[1:], features, strict=True)]

    def pair(self, token: int, feature: Tensor) -> Tensor:
        return self.network.fuse(self.embedding[token], feature)

    def guess(self, pairs: list[Tensor]) -> Tensor:
        """The serial head's, behind the last of some pairs."""
        return self.network.serial(torch.stack(pairs)[None], torch.arange(len(pairs))[None])[0, -1]

    @torch.no_grad()
    def next(self, path: list[int]) -> dict[int, float]:
        """Probabilities of the tokens that can be drafted behind a path."""
        serial, pairs = self.network.config.serial, list(self.pairs)
        for token in path[:serial]:
            pairs.append(self.pair(token, self.guess(pairs)))
        if len(path) < serial:
            guess = self.guess(pairs)
        else:
            guess = self.network.guess(pairs[-2][None], pairs[-1][None])[len(path) - serial, 0]
        chances = self.ends.logits(guess[None])[0].softmax(0)
        ids = self.ends.tokens(torch.arange(len(chances)))
        return dict(zip(ids.tolist(), chances.tolist(), strict=True))
