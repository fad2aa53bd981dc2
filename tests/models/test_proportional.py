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


def bounded(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """Attention written out, whose scores may be bounded before the mask is added, as Gemma 2's are."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.mT * kwargs["scaling"]
    if kwargs.get("softcap") is not None:
        scores = kwargs["softcap"] * (scores / kwargs["softcap"]).tanh()
    if mask is not None:
        scores = scores + (torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@given(
    seeds, st.sampled_from((1, 3)), st.integers(1, 3), st.sampled_from((None, "bool", "added")), st.booleans(),
    st.sampled_from((None, 0.7)),
)  # fmt: skip
@prop(80)
def test_a_key_counts_as_often_as_it_stands_for_tokens(
    seed: int, new: int, group: int, kind: str | None, own: bool, cap: float | None
) -> None:
    """Against keys and values that are there so many times; a token that is alone has nothing copied for it."""
    draws = generator(seed)
    rows, heads, n = 2, 2, 9
    query = torch.randn(rows, heads * group, new, 4, generator=draws, dtype=torch.float64)
    key, value = (torch.randn(rows, heads, n, 4, generator=draws, dtype=torch.float64) for _ in range(2))
    size = torch.randint(1, 4, (rows, heads, n) if own else (rows, n), generator=draws)
    size[..., n - new :] = 1
    seen = torch.ones(new, n, dtype=torch.bool).tril(n - new).expand(rows, 1, -1, -1).clone()
    if kind is not None:
        seen[1, :, :, 0] = False
    mask: Tensor | None = seen if kind == "bool" or new > 1 else None
    if kind == "added":
        mask = torch.zeros((), dtype=torch.float64).where(seen, torch.finfo(torch.float64).min)
    handed: list[Tensor] = []

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        handed.extend(args[1:3])
        return (sdpa_attention_forward if cap is None else bounded)(module, *args, **kwargs)

    module: Any = SimpleNamespace(num_key_value_groups=group, is_causal=True)
    settings = {"scaling": 0.3} if cap is None else {"scaling": 0.3, "softcap": cap}
    found, _ = proportional_attention(call, module, (query, key, value, mask), settings, size)
    for row in range(rows):
        for head in range(heads * group):
            of = head // group
            times = size[row, of] if own else size[row]
            k, v = (x[row, of].repeat_interleave(times, 0) for x in (key, value))
            logits = query[row, head] @ k.mT * 0.3
            logits = logits if cap is None else cap * (logits / cap).tanh()
            hidden = ~seen[row, 0].repeat_interleave(times, 1)
            wanted = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v
            torch.testing.assert_close(found[row, :, head], wanted, rtol=0, atol=1e-9)
    copied = handed[0] is not key or handed[1] is not value
    assert copied == (cap is None and (new > 1 or own))
