"""The slot transformer: causal to the bit, the same step by step, padding read by nobody."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds, valid_masks

from quickmerge.merge.prior.network import ROTARY_BASE, SlotCache, SlotTransformer, rotate


def build(dtype: torch.dtype = torch.float64, layers: int = 2, seed: int = 0) -> SlotTransformer:
    torch.manual_seed(seed)
    return SlotTransformer(16, layers, 2).to(dtype).eval()


def inputs(batch: int, k: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    draws = generator(seed)
    x = torch.randn(batch, k, 16, generator=draws, dtype=torch.float64).to(dtype)
    return x, torch.randint(1, 9, (batch, k), generator=draws).cumsum(-1)


def by_hand(net: SlotTransformer, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """One row, one slot and one pair of channels at a time, in float64."""

    def norm(v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return v * scale / (v.square().mean() + torch.finfo(v.dtype).eps).sqrt()

    def turn(v: torch.Tensor, p: float) -> torch.Tensor:
        out, half = v.clone(), len(v) // 2
        for i in range(half):
            a = p * ROTARY_BASE ** (-i / half)
            out[i] = v[i] * math.cos(a) - v[i + half] * math.sin(a)
            out[i + half] = v[i + half] * math.cos(a) + v[i] * math.sin(a)
        return out

    rows = list(x.detach())
    for block in net.blocks:
        parts = [(block.qkv.weight @ norm(r, block.attention_norm.weight)).chunk(3) for r in rows]
        new = []
        for k, row in enumerate(rows):
            read = []
            for head in range(block.heads):
                d = len(row) // block.heads
                cut = slice(head * d, head * d + d)
                q = turn(parts[k][0][cut], float(position[k]))
                keys = [turn(parts[j][1][cut], float(position[j])) for j in range(k + 1)]
                scores = [(q @ key).item() / math.sqrt(d) for key in keys]
                p = torch.tensor(scores, dtype=x.dtype).softmax(-1)
                read.append(sum(p[j] * parts[j][2][cut] for j in range(k + 1)))
            row = row + block.out.weight @ torch.cat(read)
            inner = block.up.weight @ norm(row, block.mlp_norm.weight) + block.up.bias
            new.append(row + block.down.weight @ torch.nn.functional.gelu(inner) + block.down.bias)
        rows = new
    return torch.stack([norm(r, net.norm.weight) for r in rows])


@given(k=st.integers(1, 7), seed=seeds)
@prop(10)
def test_equals_a_slow_statement(k: int, seed: int) -> None:
    net = build()
    x, position = inputs(2, k, seed)
    got = net(x, position, torch.ones(2, k, dtype=torch.bool))
    for row in range(2):
        torch.testing.assert_close(got[row], by_hand(net, x[row], position[row]), atol=1e-6, rtol=1e-5)


@given(k=st.integers(2, 12), seed=seeds, data=st.data())
@prop(20)
def test_no_slot_is_influenced_by_a_later_one(k: int, seed: int, data: st.DataObject) -> None:
    net, (x, position) = build(), inputs(2, k, seed)
    valid = data.draw(valid_masks(2, k, "left"))
    cut = data.draw(st.integers(1, k - 1))
    x.requires_grad_()
    out = net(x, position, valid)
    (grad,) = torch.autograd.grad(out[:, :cut].square().sum(), x)
    assert bool((grad[:, cut:] == 0).all())
    other = x.detach().clone()
    other[:, cut:] = torch.randn(other[:, cut:].shape, dtype=other.dtype)
    torch.testing.assert_close(net(other, position, valid)[:, :cut], out[:, :cut], rtol=0, atol=0)


@given(k=st.integers(1, 12), seed=seeds, data=st.data())
@prop(20)
def test_reading_in_pieces_is_reading_at_once(k: int, seed: int, data: st.DataObject) -> None:
    net, (x, position) = build(), inputs(2, k, seed)
    valid = data.draw(valid_masks(2, k, "left"))
    whole, cache, parts, done = net(x, position, valid), SlotCache(), [], 0
    while done < k:
        step = slice(done, done + data.draw(st.integers(1, k - done)))
        parts.append(net(x[:, step], position[:, step], valid[:, step], cache))
        done = step.stop
    assert len(cache) == k
    torch.testing.assert_close(torch.cat(parts, 1)[valid], whole[valid], atol=1e-10, rtol=1e-10)


@given(k=st.integers(1, 10), seed=seeds, data=st.data())
@prop(20)
def test_padding_is_read_by_nobody(k: int, seed: int, data: st.DataObject) -> None:
    net, (x, position) = build(), inputs(3, k, seed)
    valid = data.draw(valid_masks(3, k, data.draw(st.sampled_from(["left", "right"]))))
    noisy = torch.where(valid[..., None], x, 1e6)
    out = net(noisy, torch.where(valid, position, 10**6), valid)
    assert bool(out.isfinite().all())
    for row in range(3):
        here = valid[row]
        alone = net(x[row : row + 1, here], position[row : row + 1, here], valid[row : row + 1, here])
        torch.testing.assert_close(out[row, here], alone[0], atol=1e-9, rtol=1e-9)


def test_bf16_is_close_to_float32() -> None:
    (x, position), valid = inputs(2, 9, 1, torch.float32), torch.ones(2, 9, dtype=torch.bool)
    exact, rough = build(torch.float32), build(torch.bfloat16)
    torch.testing.assert_close(
        rough(x.bfloat16(), position, valid).float(), exact(x, position, valid), atol=0.1, rtol=0.1
    )


@pytest.mark.parametrize("shift", [1, 1000])
def test_rotary_scores_depend_on_distance_only(shift: int) -> None:
    x = torch.randn(1, 2, 5, 8, generator=generator(0), dtype=torch.float64)
    place = torch.tensor([[0, 3, 4, 9, 30]])
    one = rotate(x, place) @ rotate(x, place).transpose(-1, -2)
    two = rotate(x, place + shift) @ rotate(x, place + shift).transpose(-1, -2)
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)  # angles are float32
