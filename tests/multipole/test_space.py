from __future__ import annotations

import pytest
import torch
from hosts_zoo import build
from strategies import generator
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quickmerge.errors import QuickmergeError
from quickmerge.models.rotary import Rotary
from quickmerge.multipole import MultipoleLayer
from quickmerge.multipole.positions import Space


def case() -> tuple[MultipoleLayer, Space, Tensor, Tensor]:
    """A layer with keys that Llama rotated at places of its own, these keys before, and a query before."""
    model = build("llama")
    base, draws = model.model, generator(0)
    bare, query = torch.randn(2, 2, 9, 8, generator=draws), torch.randn(2, 4, 9, 8, generator=draws)
    place = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5, 40], [0, 1, 2, 5, 6, 7, 8, 30, 31]])
    turned, keys = apply_rotary_pos_emb(query, bare, *base.rotary_emb(bare, place))
    layer = MultipoleLayer()
    space = Space(Rotary.of(base, base.layers[0].self_attn, 0, wanted=""), 20)
    for part in (slice(0, 6), slice(6, 9)):
        layer.update(keys[:, :, part], keys[:, :, part])
        space.note(layer, place[:, part])
    assert torch.equal(layer.position, place)
    moved = apply_rotary_pos_emb(query, query, *base.rotary_emb(bare, torch.full_like(place, 20)))[0]
    found = space.query(layer, turned[:, :, -2:])
    torch.testing.assert_close(found, moved[:, :, -2:], rtol=0, atol=1e-5)
    return layer, space, bare, turned


def test_keys_are_turned_back_where_they_are_asked_for() -> None:
    layer, space, bare, _ = case()
    columns = space.keys(layer)
    assert callable(columns)
    for heads in (slice(None), slice(1, 2)):
        found = columns([1, 0], [2, 5], 4, heads)
        wanted = torch.stack([bare[1, heads, 2:6], bare[0, heads, 5:9]])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_in_the_rotated_space_all_is_as_it_is() -> None:
    layer, _, _, turned = case()
    space = Space(None, 20)
    space.note(layer, None)
    assert space.keys(layer) is layer.keys and space.query(layer, turned) is None


def test_places_must_be_told() -> None:
    layer, space, _, _ = case()
    for given in (None, torch.zeros(3, 2, 9, dtype=torch.long)):
        with pytest.raises(QuickmergeError, match="position_ids must be given to attention as"):
            space.note(layer, given)
