"""What the vision tower tells of its tokens, against whole attention maps and the model's own projectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vlm_zoo import GRIDS, METHODS, ROWS, build, model_of, pictures, prompt, row_of

import quickmerge as qm
from quickmerge.merge.tokens.saliency import AttentionTrace
from quickmerge.merge.visual.tower import received, window_order

EXACT = 1e-6


def views(model: Any, reducer: Any, inputs: dict[str, Any]) -> list[qm.TokenView]:
    with qm.reduce(model, reducer) as run, torch.no_grad():
        model(**inputs)
    return [image.view for image in run.images]


def close(a: Any, b: Tensor) -> None:
    scale = float(b.detach().abs().max().clamp_min(1))
    assert torch.allclose(a.double(), b.double(), atol=EXACT * scale, rtol=0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("tower", "layer"), [("clip", -2), ("clip", 1), ("dinov2", -1), ("dinov2", [1, 2]), ("siglip", -2)]
)
def test_saliency_and_features_are_those_of_the_selected_layer(attn: str, tower: str, layer: Any) -> None:
    model = build("llava", attn=attn, tower=tower, layer=layer)
    whole = build("llava", attn="eager", tower=tower, layer=layer)
    inputs = prompt(model, [[0], [1, 2]])
    with torch.no_grad():
        out = whole.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    first = 0 if tower == "siglip" else 1
    listed = [layer] if isinstance(layer, int) else layer
    features = torch.cat([out.hidden_states[i] for i in listed], -1)[:, first:]
    maps = out.attentions[listed[-1] if listed[-1] < 0 else listed[-1] - 1]
    saliency = maps[:, :, 0, 1:].sum(1) if first else maps.mean(1).sum(1)
    seen = views(model, METHODS["scope"], inputs)
    assert len(seen) == 3
    for i, view in enumerate(seen):
        close(view.hidden[0], features[i])
        close(view.evidence.saliency[0], saliency[i])
        assert view.grid == (1, 4, 4)


def test_keys_and_norms_are_those_of_the_selected_layer() -> None:
    model = build("llava")
    inputs = prompt(model, [[0], [1, 2]])
    block, seen = model.model.vision_tower.encoder.layers[1], {}
    handle = block.layer_norm1.register_forward_hook(lambda m, a, out: seen.update(x=out.detach()))
    found = views(model, METHODS["quickmerge"], inputs)
    handle.remove()
    q, k, v = (
        getattr(block.self_attn, f"{n}_proj")(seen["x"]).detach().view(3, 17, 3, 8).transpose(1, 2) for n in "qkv"
    )
    share = (q.double() @ k.double().transpose(-1, -2) * 8**-0.5).softmax(-1)[:, :, 0, 1:]
    norm = (share * v.double().norm(dim=-1)[:, :, 1:]).mean(1)
    for i, view in enumerate(found):
        close(view.evidence.key[0], k.mean(1)[i, 1:])
        close(view.evidence.saliency[0], norm[i])


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_tiles_pool_the_squares_that_the_connector_shuffles(family: str) -> None:
    model, whole = model_of(family), build(family, attn="eager")
    inputs = row_of(model, ROWS, 1)
    pixels = inputs["pixel_values"][0]
    with torch.no_grad():
        out = whole.model.vision_model(pixels, output_attentions=True)
    shuffle = model.model.connector.pixel_shuffle
    features = shuffle(out.last_hidden_state, 2).unflatten(-1, (4, -1)).mean(-2)
    saliency = shuffle(out.attentions[-1].mean(1).sum(1)[..., None], 2).sum(-1)
    for i, view in enumerate(views(model, METHODS["scope"], inputs)):
        close(view.hidden[0], features[i])
        close(view.evidence.saliency[0], saliency[i])
        assert view.grid == (1, 4, 4)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_packed_towers_tell_of_the_squares_that_the_merger_reads(family: str, kind: str) -> None:
    model = model_of(family)
    inputs = row_of(model, [[0], [1, 2]], 1, kind)
    tower, seen = model.model.visual, {}
    block = tower.blocks[1 if family == "qwen2_5_vl" else 2]
    handles = [
        block.attn.register_forward_pre_hook(lambda m, a, k: seen.update(k, x=a[0]), with_kwargs=True),
        tower.merger.register_forward_pre_hook(lambda m, a: seen.update(last=a[0])),
    ]
    found = views(model, METHODS["scope"], inputs)
    for handle in handles:
        handle.remove()
    n = len(seen["x"])
    q, k, _ = block.attn.qkv(seen["x"]).detach().view(n, 3, 2, 8).double().unbind(1)

    def turn(x: Tensor) -> Tensor:
        cos, sin = (t.double()[:, None] for t in seen["position_embeddings"])
        half = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * cos + half * sin

    scores = torch.einsum("ihd,jhd->hij", turn(q), turn(k)) * 8**-0.5
    frame = torch.bucketize(torch.arange(n), seen["cu_seqlens"][1:], right=True)
    maps = scores.masked_fill(frame[:, None] != frame, -torch.inf).softmax(-1)
    saliency = maps.mean(0).sum(0).view(-1, 4).sum(-1)
    features = seen["last"].view(-1, 4, 16)
    grids = [((3 if kind == "video" else 1), h // 2, w // 2) for _, h, w in (GRIDS[1], GRIDS[2])]
    start = 0
    for view, grid in zip(found, grids, strict=True):
        size = grid[0] * grid[1] * grid[2]
        order = torch.arange(size)
        if family == "qwen2_5_vl":
            order = window_order((grid[0], 2 * grid[1], 2 * grid[2]), 2, 2)
        mine = slice(start, start + size)
        close(view.hidden[0], features[mine].mean(1)[order])
        close(view.evidence.saliency[0], saliency[mine][order])
        assert view.grid == grid
        # What the merger makes of these squares is what stands at these places.
        given = {k: v for k, v in inputs.items() if k.startswith(("pixel_values", "image_grid", "video_grid"))}
        with torch.no_grad():
            made = getattr(model.model, f"get_{kind}_features")(*given.values()).pooler_output
            squares = features[mine][order].flatten(0, 1)
            close(tower.merger(squares), torch.cat(made)[mine])
        start += size


def test_images_in_lines_pool_the_squares_that_the_projector_reads() -> None:
    model = model_of("paddleocr_vl")
    inputs = row_of(model, ROWS, 1)
    with torch.no_grad():
        out = model.model.visual(inputs["pixel_values"][None], grid_thw=inputs["image_grid_thw"]).last_hidden_state
    start = 0
    for view, (_, h, w) in zip(views(model, METHODS["scope"], inputs), (GRIDS[1], GRIDS[2]), strict=True):
        mine = out.flatten(0, -2)[start : start + h * w].view(h // 2, 2, w // 2, 2, -1)
        close(view.hidden[0], mine.mean((1, 3)).flatten(0, 1))
        assert float(view.evidence.saliency.sum()) == pytest.approx(h * w, rel=1e-5)
        start += h * w


def test_mosaics_tell_of_each_token_what_its_crop_told() -> None:
    model = model_of("llava_next")
    inputs = row_of(model, [[0]], 0)
    view = views(model, METHODS["scope"], inputs)[0]
    with torch.no_grad():
        out = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True)
        states = out.hidden_states[-2][:, 1:]
        projected = model.model.multi_modal_projector(view.hidden[0])
        packed = model.get_image_features(**pictures(model, [0])).pooler_output[0]
    close(view.hidden[0, :16], states[0])
    # The projector makes of these features just what fills the placeholders, newlines left out.
    close(projected, packed[~(packed == model.model.image_newline).all(-1)])


def test_nothing_is_measured_that_nobody_asks_for() -> None:
    model = model_of("qwen2_5_vl")
    inputs = row_of(model, ROWS, 1)
    for reducer in (METHODS["random"], METHODS["trimtokenator"], qm.Uniform(keep=0.4)):
        for view in views(model, reducer, inputs):
            assert view.evidence.saliency is None
            assert view.evidence.key is None
            assert view.hidden.shape[-1] == 32
    with qm.reduce(model, METHODS["random"]) as run, torch.no_grad():
        model(**inputs)
        assert all(each.parts() == (None, None, None) for each in run.tower.seen)


@pytest.mark.parametrize("kind", ["attention", "norm"])
@pytest.mark.parametrize("as_bool", [True, False])
def test_padded_patches_neither_vote_nor_count(kind: str, as_bool: bool) -> None:
    noise = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 6, 4, generator=noise)
    there = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    mask: Tensor = there[:, None, None].expand(2, 1, 6, 6)
    if not as_bool:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    both = received(AttentionTrace(q, k, v, 0.5), kind, class_token=False, mask=mask)
    short = received(AttentionTrace(q[:1, :, :4], k[:1, :, :4], v[:1, :, :4], 0.5), kind, class_token=False)
    full = received(AttentionTrace(q[1:], k[1:], v[1:], 0.5), kind, class_token=False)
    close(both[0, :4], short[0])
    close(both[1], full[0])
    assert float(both[0, 4:].abs().max()) == 0
    if kind == "attention":
        assert float(short.sum()) == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize("grid", [(1, 4, 8), (2, 6, 10), (1, 8, 8), (3, 2, 6)])
def test_window_order_is_the_way_back_from_the_model_s_own(grid: tuple[int, int, int]) -> None:
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(torch.tensor([grid]), spatial_merge_size=2, window_size=16, patch_size=4)
    assert torch.equal(window_order(grid, 2, 2), index.argsort())
