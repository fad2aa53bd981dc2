"""log(size) in attention, for one new token and for several."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from quickmerge.models.decoder import proportional_attention


@given(seeds, st.sampled_from((1, 3)), st.integers(1, 3), st.sampled_from((None, "bool", "added")))
@prop(40)
def test_a_key_counts_as_often_as_it_stands_for_tokens(seed: int, new: int, group: int, kind: str | None) -> None:
    """Against keys and values that are there so many times; a token that is alone has nothing copied for it."""
    draws = generator(seed)
    rows, heads, n = 2, 2, 9
    query = torch.randn(rows, heads * group, new, 4, generator=draws, dtype=torch.float64)
    key, value = (torch.randn(rows, heads, n, 4, generator=draws, dtype=torch.float64) for _ in range(2))
    size = torch.randint(1, 4, (rows, n), generator=draws)
    size[:, n - new :] = 1
    seen = torch.ones(new, n, dtype=torch.bool).tril(n - new).expand(rows, 1, -1, -1).clone()
    if kind is not None:
        seen[1, :, :, 0] = False
    mask: Tensor | None = seen if kind == "bool" or new > 1 else None
    if kind == "added":
        mask = torch.zeros((), dtype=torch.float64).where(seen, torch.finfo(torch.float64).min)
    handed: list[Tensor] = []

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        handed.extend(args[1:3])
        return sdpa_attention_forward(module, *args, **kwargs)

    module: Any = SimpleNamespace(num_key_value_groups=group, is_causal=True)
    found, _ = proportional_attention(call, module, (query, key, value, mask), {"scaling": 0.3}, size)
    for row in range(rows):
        times = size[row]
        k, v = (x[row].repeat_interleave(times, 1).repeat_interleave(group, 0) for x in (key, value))
        hidden = ~seen[row, 0].repeat_interleave(times, 1)
        logits = (query[row] @ k.mT * 0.3).masked_fill(hidden, -torch.inf)
        wanted = (logits.softmax(-1) @ v).transpose(0, 1)
        torch.testing.assert_close(found[row], wanted, rtol=0, atol=1e-9)
    assert (handed[0] is key and handed[1] is value) == (new == 1)
