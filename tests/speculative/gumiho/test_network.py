"""The draft heads' network against its maths in plain loops."""

from __future__ import annotations

import pytest
import torch
from gumiho_samples import heads, literal_fuse, literal_parallel, literal_serial
from hypothesis import given, settings
from hypothesis import strategies as st

from quickmerge.speculative.gumiho import GumihoNetwork
from quickmerge.speculative.gumiho.network import RowCache

EXACT = {"atol": 1e-10, "rtol": 1e-10}


def positions(start: int, count: int, rows: int = 2) -> torch.Tensor:
    return torch.arange(start, start + count).expand(rows, -1)


def test_fusion_is_one_linear_layer_of_scaled_parts() -> None:
    network = heads().network
    embedded, features = torch.randn(3, 5, 16).double(), torch.randn(3, 5, 16).double()
    out = network.fuse(embedded, features)
    for row in range(3):
        for t in range(5):
            torch.testing.assert_close(out[row, t], literal_fuse(network, embedded[row, t], features[row, t]), **EXACT)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_serial_head_is_a_decoder_without_a_first_norm(layers: int) -> None:
    network = heads(serial_layers=layers, heads=0, attention_heads=4, key_value_heads=2, head_width=6).network
    x = torch.randn(2, 7, 16).double()
    out = network.serial(x, positions(0, 7))
    for row in range(2):
        torch.testing.assert_close(out[row], torch.stack(literal_serial(network, list(x[row]))), **EXACT)


@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_with_a_cache_as_without(seed: int, sizes: list[int]) -> None:
    network = heads(seed=seed).network
    x = torch.randn(2, sum(sizes), 16).double()
    whole = network.serial(x, positions(0, sum(sizes)))
    cache, done = RowCache(2), 0
    for size in sizes:
        at = positions(done, size)
        cache.aim(at, done + size, done)
        see = torch.arange(done + size) <= at[..., None]
        part = network.serial(x[:, done : done + size], at, see[:, None], cache)
        torch.testing.assert_close(part, whole[:, done : done + size], **EXACT)
        done += size
        cache.length = [done, done]


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("width", [16, 24])
def test_parallel_heads_are_networks_of_their_own(activation: str, width: int) -> None:
    network = heads(heads=3, activation=activation, mlp_width=width, mlp_depth=4).network
    earlier, later = torch.randn(5, 16).double(), torch.randn(5, 16).double()
    out = network.guess(earlier, later)

    def alone(a: torch.Tensor, b: torch.Tensor, head: int) -> torch.Tensor:
        return torch.stack([literal_parallel(network, *rows, head) for rows in zip(a, b, strict=True)])

    torch.testing.assert_close(out, torch.stack([alone(earlier, later, head) for head in range(3)]), **EXACT)
    own = network.guess(torch.stack([earlier, later, earlier]), torch.stack([later, earlier, later]))
    torch.testing.assert_close(own[0], out[0], **EXACT)
    torch.testing.assert_close(own[1], alone(later, earlier, 1), **EXACT)


def test_residual_layers_begin_as_the_identity() -> None:
    torch.manual_seed(0)
    config = heads(mlp_depth=6).config
    network = GumihoNetwork(config)
    u = torch.randn(4, 2 * 16)
    first = torch.nn.functional.silu(torch.einsum("ri,mio->mro", u, network.parallel.first))
    torch.testing.assert_close(network.parallel(u), first)


def test_bfloat16_is_near_float64() -> None:
    network = heads(size=0.2).network.requires_grad_(False)
    x = torch.randn(2, 9, 16).double()
    exact = network.serial(x, positions(0, 9)), network.guess(x[:, 0], x[:, 1])
    network.bfloat16()
    near = network.serial(x.bfloat16(), positions(0, 9)), network.guess(x[:, 0].bfloat16(), x[:, 1].bfloat16())
    for one, other in zip(exact, near, strict=True):
        assert other.dtype == torch.bfloat16
        assert float((one - other).norm() / one.norm()) < 0.03
