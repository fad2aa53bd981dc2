"""Reducing visual tokens inside the language model, against its layers called by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import held as held_cache
from torch import Tensor
from vlm_zoo import EXACT, IMAGE, METHODS, ROWS, VIDEO, build, entering, model_of, prompt, row_of, text_of, write

import quickmerge as qm
from quickmerge.models.columns import stored

FAMILIES = ("idefics3", "llava", "llava_next", "paddleocr_vl", "qwen2_5_vl", "qwen3_vl")
LAYER = 2


@torch.no_grad()
def by_hand(model: Any, inputs: dict[str, Any], run: Any) -> Tensor:
    """Logits of one row whose visual tokens are merged in front of block LAYER by the run's plans."""
    given, text = entering(model, inputs), text_of(model)
    seen: list[Tensor] = []
    handle = text.layers[LAYER].register_forward_pre_hook(lambda m, a: seen.append(a[0].double()))
    text(**given)
    handle.remove()
    x, n = seen[0][0], seen[0].shape[1]
    place = given.get("position_ids")
    place = torch.arange(n)[None] if place is None else place
    tables = text.rotary_emb(seen[0].float(), place[1:] if place.shape[0] == 4 else place)
    new = dict(enumerate(x))
    for image in run.images:
        for column in image.columns.tolist():
            del new[column]
        for k in range(image.plan.slots):
            of = image.plan.slot[0] == k
            share = image.plan.weight[0][of].double()
            new[int(image.columns[image.plan.position[0, k]])] = share @ x[image.columns[of]]
    kept = torch.tensor(sorted(new))
    hidden = torch.stack([new[c] for c in kept.tolist()])[None].float()
    tables = tuple(t[..., kept, :] for t in tables)
    for block in text.layers[LAYER:]:
        hidden = block(hidden, attention_mask=None, position_embeddings=tables)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    logits: Tensor = model.lm_head(text.norm(hidden))
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["scope", "tome", "quickmerge"])
def test_a_merge_inside_equals_the_layers_called_by_hand(family: str, name: str) -> None:
    model = model_of(family)
    for i in range(2):
        inputs = row_of(model, ROWS, i)
        with qm.reduce(model, METHODS[name], layer=LAYER) as run, torch.no_grad():
            out = model(**inputs)
        hand = by_hand(model, inputs, run)
        n = inputs["input_ids"].shape[1]
        assert out.logits.shape == hand.shape
        assert hand.shape[1] < n
        assert torch.allclose(out.logits, hand, atol=EXACT, rtol=EXACT)
        held = [stored(layer) for layer in held_cache(out).layers]
        assert held == [n] * LAYER + [hand.shape[1]] * (len(held) - LAYER)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "paddleocr_vl"])
def test_reducers_are_told_what_the_block_below_computed(family: str) -> None:
    model, whole = model_of(family), build(family, attn="eager")
    inputs = row_of(model, ROWS, 1)
    given = entering(whole, inputs)
    maps: list[Tensor] = []
    below = text_of(whole).layers[LAYER - 1].self_attn
    handle = below.register_forward_hook(lambda m, a, out: maps.append(out[1]))
    with torch.no_grad():
        out = text_of(whole)(**given, use_cache=True, output_hidden_states=True)
    handle.remove()
    held = held_cache(out).layers[LAYER - 1]
    key, value = held.keys.mean(1)[0], held.values[0].double().norm(dim=-1).repeat_interleave(2, 0)
    visual = inputs["input_ids"][0] == IMAGE
    for name in ("attention", "scope", "quickmerge"):
        with qm.reduce(model, METHODS[name], layer=LAYER) as run, torch.no_grad():
            model(**inputs)
        for image in run.images:
            voters = ~visual & (torch.arange(len(visual)) > image.columns[-1])
            votes = maps[0][0][:, voters].double()
            expected = votes.mean((0, 1))
            if name == "quickmerge":
                expected = (votes.square().mean(1).sqrt() * value).mean(0)
                assert torch.allclose(image.view.evidence.key[0], key[image.columns], atol=EXACT)
            assert torch.allclose(image.view.evidence.saliency[0].double(), expected[image.columns], atol=EXACT)
            assert torch.allclose(image.view.hidden[0], out.hidden_states[LAYER][0, image.columns], atol=EXACT * 10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [LAYER, [0, LAYER]])
def test_generation_from_a_cache_equals_reading_everything_again(family: str, layer: Any) -> None:
    model = model_of(family)
    inputs = prompt(model, ROWS)
    # What follows the images must not change what is chosen.
    for reducer in (qm.SCOPE(keep=0.4, alpha=0), METHODS["random"]):
        with qm.reduce(model, reducer, layer=layer), torch.no_grad():
            cached = write(model, inputs, 4, suppress_tokens=[IMAGE, VIDEO])
            more, ids = dict(inputs), inputs["input_ids"]
            more["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
            if "mm_token_type_ids" in more:
                del more["position_ids"]
            for step in range(4):
                logits = model(**more).logits[:, -1]
                logits[:, [IMAGE, VIDEO]] = -torch.inf
                row = logits.argmax(-1)
                assert torch.equal(row, cached[:, step])
                ids = torch.cat([ids, row[:, None]], 1)
                mask = torch.cat([more["attention_mask"], torch.ones(len(ids), 1, dtype=torch.long)], 1)
                more |= {"input_ids": ids, "attention_mask": mask}
                if "mm_token_type_ids" in more:
                    more["mm_token_type_ids"] = torch.nn.functional.pad(more["mm_token_type_ids"], (0, 1))
                else:
                    more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)


def test_both_places_leave_the_share_and_its_square() -> None:
    model = model_of("llava")
    inputs = row_of(model, ROWS, 0)
    with qm.reduce(model, qm.ToMe(keep=0.5), layer=[0, 1, 3]) as run, torch.no_grad():
        cache = held_cache(model(**inputs))
    rest = inputs["input_ids"].shape[1] - 16
    assert [stored(layer) for layer in cache.layers] == [rest + 8, rest + 4, rest + 4, rest + 2]
    assert run.summary().tokens_per_layer == [rest + 8, rest + 4, rest + 4, rest + 2]
    assert int(run.images[0].plan.size.sum()) == 16
    assert run.plan is not None
    assert int(run.plan.size[0].sum()) == rest + 16
    assert run.main_plan is not None
    assert run.main_plan.slots == rest + 4


def test_features_that_are_added_lower_down_bar_merges_there() -> None:
    model = model_of("qwen3_vl")
    with pytest.raises(ValueError, match=r"layer must be 0 .* or rising blocks in 2..3, .* as qwen3_vl does, got 1"):
        qm.reduce(model, METHODS["scope"], layer=1)


def test_gradients_flow_through_both_merges() -> None:
    model = build("llava")
    inputs = row_of(model, ROWS, 0)
    with qm.reduce(model, METHODS["tome"], layer=[0, LAYER]):
        model(**inputs).logits[:, -1].square().sum().backward()
    for part in (model.model.multi_modal_projector.linear_1, model.model.language_model.layers[0].mlp.up_proj):
        assert float(part.weight.grad.abs().sum()) > 0
