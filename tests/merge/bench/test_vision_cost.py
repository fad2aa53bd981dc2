from __future__ import annotations

import pytest
import torch
import transformers

from quickmerge.merge.bench.vision_cost import once_at, removal_at, vision_shape
from quickmerge.merge.tokens.removal import Removal
from quickmerge.models.encoder import find_encoder


def shape_of(model_class: str, config: object) -> object:
    with torch.device("meta"):
        model = getattr(transformers, model_class)._from_config(config, attn_implementation="sdpa")
    return vision_shape(find_encoder(model))


@pytest.fixture(scope="module")
def small():  # type: ignore[no-untyped-def]
    """ViT-S/16."""
    return shape_of(
        "ViTModel",
        transformers.ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536),
    )


def test_operations_of_vit_small_are_those_of_the_paper(small) -> None:  # type: ignore[no-untyped-def]
    """4.6 GMAC (arXiv 2012.12877), of which the patch embedding 0.058; and what ToMe saves (arXiv 2210.09461)."""
    full = small.macs([197] * 12, [197] * 12)
    assert full / 1e9 == pytest.approx(4.60 - 196 * 384 * 768 / 1e9, rel=2e-3)
    for r, gain in ((8, 1.35), (13, 1.71), (16, 2.03), (20, 2.49)):
        assert 1 / small.removal_ratio(Removal(r), 197, 1) == pytest.approx(gain, rel=0.01)


def test_operations_count_every_matrix_once() -> None:
    config = transformers.VideoMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    shape = shape_of("VideoMAEModel", config)
    assert shape.attention == (4 * 32 * 32,) * 2 and shape.feed_forward == (2 * 32 * 48,) * 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("ratio", [0.8, 0.5, 0.35])
def test_shares_of_the_operations_are_met(small, ratio: float) -> None:  # type: ignore[no-untyped-def]
    assert small.removal_ratio(removal_at(small, ratio, 197, 1), 197, 1) == pytest.approx(ratio, abs=0.005)
    block, kept = once_at(small, ratio, 197)
    leaving = [197] * block + [kept] * (12 - block)
    assert small.ratio(197, [197, *leaving[:-1]], leaving) == pytest.approx(ratio, abs=0.01)
    assert block == 3 or ratio < 0.4


@pytest.mark.parametrize("ratio", [0.0, 1.5, 0.05])
def test_impossible_shares_are_told(small, ratio: float) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="ratio must be"):
        removal_at(small, ratio, 197, 1)
    if ratio != 0.05:
        with pytest.raises(ValueError, match="ratio must be"):
            once_at(small, ratio, 197)
