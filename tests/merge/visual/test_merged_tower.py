"""Patches merged inside the vision tower of a vision-language model, alone and with its other places."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from caches import held, past
from places_samples import by_hand, double, doubled, merge_of
from torch import Tensor
from vlm_zoo import DEPTH, EXACT, FAMILIES, FLAT, IMAGE, ROWS, build, entering, model_of, prompt, row_of, write

import quickmerge as qm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.attach import reduce_places
from quickmerge.merge.place import Merge
from quickmerge.merge.run import VisualStats

EXTRA = torch.tensor([[5, 6, 7, 8]])
TILES = ("idefics3", "smolvlm")
LLAVA: dict[str, dict[str, Any]] = {
    "clip": {},
    "siglip": {"tower": "siglip"},
    "dinov2, last layer": {"tower": "dinov2", "layer": -1},
    "class token too": {"strategy": "full"},
    "two layers": {"layer": [-3, -1]},
}


def tower(name: str = "tome", keep: float = 0.6, *, unmerge: bool = False, **more: Any) -> Merge:
    methods = {"tome": qm.ToMe, "topnorm": qm.TopNorm, "random": qm.Random}
    return Merge(methods[name](keep=keep), unmerge=unmerge, **more)


@torch.no_grad()
def slots_by_hand(model: Any, pixels: Tensor, merge: Merge) -> list[list[tuple[int, list[int], Tensor]]]:
    """For every image its slots: the patch where each stands, its members, and what the projector makes of it.

    By the tower alone, inside a run of its own, and sums written out.
    """
    vit, config, images = model.model.vision_tower, model.config, []
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    gone = 1 if config.vision_feature_select_strategy == "default" else 0
    with qm.reduce(vit, merge.reducer, merge.layer) as run:
        states = vit(pixels, output_hidden_states=True).hidden_states
        levels = run.call.levels
    at = [layer % len(states) for layer in layers]
    for row in range(len(pixels)):
        tops, slots = levels[max(at)], []
        for k in range(tops.size.shape[1]):
            members = (tops.slot[row] == k).nonzero().flatten().tolist()
            if members and members[0] < gone:
                continue
            parts = []
            for index in at:
                own = range(states[index].shape[1]) if levels[index] is None else levels[index].slot[row].tolist()
                whole = [states[index][row, own[member]] for member in members]
                parts.append(whole[0] if index == max(at) else torch.stack(whole).mean(0))
            vector = model.model.multi_modal_projector(torch.cat(parts)[None, None])[0, 0]
            slots.append((int(tops.position[row, k]) - gone, [member - gone for member in members], vector))
        images.append(slots)
    return images


def with_class_tokens(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same prompt for a model that keeps the class token: 17 placeholders for each of two images."""
    ids = inputs["input_ids"][0].tolist()
    at = [i for i, token in enumerate(ids) if token == IMAGE]
    ids = [*ids[: at[0]], IMAGE, *ids[at[0] : at[16]], IMAGE, *ids[at[16] :]]
    return {**inputs, "input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


@pytest.mark.parametrize("kind", LLAVA)
@pytest.mark.parametrize("name", ["tome", "topnorm"])
def test_the_language_model_reads_the_slots_of_the_tower(kind: str, name: str) -> None:
    model = double("llava", **LLAVA[kind])
    inputs, merge = doubled(row_of(model, ROWS, 1)), tower(name)
    inputs = with_class_tokens(inputs) if kind == "class token too" else inputs
    n = inputs["input_ids"].shape[1]
    with reduce_places(model, tower=merge) as run, torch.no_grad():
        out = model(**inputs)
        images, stats = run.images, run.summary()
        mask = torch.ones(1, n + 4, dtype=torch.long)
        found = torch.cat([out.logits, model(input_ids=EXTRA, **past(held(out)), attention_mask=mask).logits], 1)
    visual: dict[int, Tensor] = {}
    for image, slots in zip(images, slots_by_hand(model, inputs["pixel_values"], merge), strict=True):
        assert image.plan is not None and image.count > image.plan.slots == len(slots)
        assert image.plan.position[0].tolist() == [place for place, _, _ in slots]
        for k, (_, members, vector) in enumerate(slots):
            assert (image.plan.slot[0] == k).nonzero().flatten().tolist() == members
            visual |= {int(image.columns[member]): vector for member in members}
    wanted = by_hand(model, inputs, run, {"tower": merge}, EXTRA, visual)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    left = n - sum(image.count - image.left for image in images)
    assert stats.tokens_per_layer == [left] * DEPTH
    assert stats.tower_tokens[-1] < 17 and "after block" in str(stats)


@pytest.mark.parametrize("visual", [Merge(qm.SCOPE(keep=0.4)), Merge(qm.ToMe(keep=0.4))])
def test_visual_tokens_become_fewer_still_behind_a_merged_tower(visual: Merge) -> None:
    model = double("llava")
    inputs, merges = doubled(row_of(model, ROWS, 1)), {"tower": tower(), "visual": visual}
    merges["text"] = merge_of("quickmerge", 2)
    with reduce_places(model, **merges) as run, torch.no_grad():
        out, images = model(**inputs), run.images
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 4, dtype=torch.long)
        found = torch.cat([out.logits, model(input_ids=EXTRA, **past(held(out)), attention_mask=mask).logits], 1)
    features: dict[int, Tensor] = {}
    for image, slots in zip(images, slots_by_hand(model, inputs["pixel_values"], merges["tower"]), strict=True):
        assert image.left == 6 < len(slots)
        # What the method saw is the slots that the tower left, each as large as it is.
        assert image.view.size[0].tolist() == [len(members) for _, members, _ in slots]
        for _, members, vector in slots:
            features |= {int(image.columns[member]): vector for member in members}
    if isinstance(visual.reducer, qm.ToMe):
        # Slots weigh the same in a mean, whatever their size; the plan's shares are of single tokens.
        shares = torch.cat([image.plan.weight[0] for image in images])
        assert float(shares.sum()) == pytest.approx(12)
    wanted = by_hand(model, inputs, run, merges, EXTRA, features)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llava", "llava_next", *TILES])
@pytest.mark.parametrize("name", ["tome", "topnorm"])
def test_unmerged_every_patch_has_the_features_of_its_slot(family: str, name: str) -> None:
    model, merge = model_of(family), tower(name, unmerge=True)
    inputs = row_of(model, ROWS, 1)
    n, vit = inputs["input_ids"].shape[1], model.model.vision_model if family in TILES else model.model.vision_tower
    given = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
    raw: list[Tensor] = []
    with reduce_places(model, tower=merge) as run, torch.no_grad():
        blocks = run.tower_run.encoder.blocks
        which = blocks[-1 if family in TILES else -2].module
        handle = which.register_forward_hook(lambda m, a, out: raw.append(out[0] if isinstance(out, tuple) else out))
        seen: list[Any] = []
        other = vit.register_forward_hook(lambda m, a, out: seen.append(out))
        features = model.get_image_features(**given).pooler_output
        handle.remove()
        other.remove()
        logits, stats = model(**inputs).logits, run.summary()
        level = run.tower_run.call.levels[-1 if family in TILES else -2]
    assert logits.shape[1] == n
    assert stats.tokens_per_layer == [n] * DEPTH and stats.visual_in == stats.visual_kept
    state = seen[0].last_hidden_state if family in TILES else seen[0].hidden_states[-2]
    short = vit.post_layernorm(raw[0]) if family in TILES else raw[0]
    prefix = state.shape[1] - (64 if family in TILES else 16)
    assert short.shape[1] < state.shape[1]
    for row, slots in enumerate(level.slot.tolist()):
        mean = torch.stack([short[row, k] for k in slots[prefix:] if k >= 0]).mean(0)
        for j, slot in enumerate(slots):
            wanted = short[row, slot] if slot >= 0 else mean
            assert torch.allclose(state[row, j], wanted, atol=EXACT, rtol=EXACT)
    with torch.no_grad():
        dense = model.get_image_features(**given).pooler_output
    assert [x.shape for x in dense] == [x.shape for x in features]
    assert not torch.allclose(dense[0], features[0], atol=0.01)


def test_crops_of_a_mosaic_lose_their_copies_each_for_itself() -> None:
    model = model_of("llava_next")
    inputs = row_of(model, [[0]], 0)
    with reduce_places(model, tower=tower(unmerge=True)), torch.no_grad():
        full = entering(model, inputs)["inputs_embeds"][0]
    with reduce_places(model, tower=tower()) as run, torch.no_grad():
        read = entering(model, inputs)["inputs_embeds"][0]
    image = run.images[0]
    newline = (full == model.model.image_newline).all(-1)
    assert newline.sum() == 6 and newline[run.columns[0]].sum() == 6
    assert torch.equal(read, full[run.columns[0]])
    # Of equal tokens one stays; padding that was cut off takes no slot with it.
    tokens = full[image.columns]
    alike = (tokens[:, None] - tokens[None]).abs().amax(-1) < EXACT
    groups = {tuple(row.nonzero().flatten().tolist()) for row in alike}
    assert len(groups) == image.left < image.count
    assert all(len({int(image.plan.slot[0, i]) for i in group}) == 1 for group in groups)


@pytest.mark.parametrize("method", ["scope", "quickmerge"])
def test_what_is_measured_in_a_merged_tower_is_of_its_slots(method: str) -> None:
    model = build("llava", attn="eager")
    inputs, merge = row_of(model, ROWS, 0), tower()
    vit, maps, values = model.model.vision_tower, [], []
    block = vit.encoder.layers[-2].self_attn
    handles = [block.register_forward_hook(lambda m, a, out: maps.append(out[1]))]
    handles.append(block.v_proj.register_forward_hook(lambda m, a, out: values.append(out)))
    with qm.reduce(vit, merge.reducer) as alone, torch.no_grad():
        vit(inputs["pixel_values"])
        level = alone.call.levels[-3]
    for handle in handles:
        handle.remove()
    votes = maps[0][0, :, 0].double()  # of the class token, counting slots by their size
    norms = values[0][0].double().unflatten(-1, (3, 8)).transpose(0, 1).norm(dim=-1)
    each = votes.sum(0) if method == "scope" else (votes * norms).mean(0)
    reducer = qm.SCOPE(keep=0.4) if method == "scope" else qm.QuickMergeVision(keep=0.4)
    with reduce_places(model, tower=merge, visual=Merge(reducer)) as run, torch.no_grad():
        model(**inputs)
        view, seen = run.images[0].view, run.tower.seen[0]
    assert torch.allclose(seen.saliency.double(), each[level.slot[0, 1:]], atol=EXACT)
    places = (seen.leader == torch.arange(16)).nonzero().flatten()
    assert torch.equal(view.evidence.saliency[0], seen.saliency[places])
    if method == "scope":
        assert torch.equal(view.hidden[0], seen.features[places])


@dataclass(frozen=True)
class Early(qm.TopNorm):
    """Drops tokens in front of a block."""

    before = True


@pytest.mark.parametrize("layers", [-2, [-3, -2], [0, -1]], ids=str)
@pytest.mark.parametrize("kind", ["tokens drop in front of blocks", "images differ in how many stay"])
def test_every_way_of_taking_tokens_out_reads_a_batch_as_its_rows(layers: Any, kind: str) -> None:
    model = build("llava", layer=layers)
    reducer = Early(keep=0.6) if kind.startswith("tokens") else qm.Attention(keep=qm.Mass(0.6))
    for unmerge in (False, True):
        for more in ({}, {"visual": Merge(qm.SCOPE(keep=0.3), [0, 2])}):
            merge = Merge(reducer, (0, 1), unmerge=unmerge)
            with reduce_places(model, tower=merge, **more) as run, torch.no_grad():
                logits, left = model(**prompt(model, ROWS)).logits[:, -1], [image.left for image in run.images]
                alone = []
                for i in range(len(ROWS)):
                    row = model(**row_of(model, ROWS, i)).logits[0, -1]
                    torch.testing.assert_close(row, logits[i], rtol=0, atol=1e-4)
                    alone += [image.left for image in run.images]
            assert alone == left and all(count < 16 for count in left)


SUBSETS = [s for n in (1, 2, 3) for s in combinations(("text", "visual", "tower"), n)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("places", SUBSETS, ids=" ".join)
def test_every_family_at_every_set_of_places(family: str, places: tuple[str, ...]) -> None:
    """It reads fewer tokens, a batch as its rows, and is itself again; or one sentence says why not."""
    model, squares = model_of(family), family in TILES
    every = {
        "text": merge_of("tome", 3),
        "visual": Merge(qm.ToMe(keep=0.4), [0, 2]),
        "tower": tower(unmerge=squares),
    }
    merges: dict[str, Any] = {place: every[place] for place in places}
    if "tower" in places and squares:
        with pytest.raises(QuickmergeError, match=r"unmerge must be True in tower for .*squares of patches"):
            reduce_places(model, **{**merges, "tower": tower()})
    if "tower" in places and family not in ("llava", "llava_next", *TILES):
        with pytest.raises(UnsupportedModelError, match=r"tower must be None for .*packed sequence"):
            reduce_places(model, **merges)
        return
    inputs = prompt(model, ROWS)
    alone = [row_of(model, ROWS, i) for i in range(len(ROWS))]
    with torch.no_grad():
        before = model(**inputs).logits
        with reduce_places(model, **merges) as run:
            logits, stats = model(**inputs).logits[:, -1], run.summary()
            for i, row in enumerate(alone):
                torch.testing.assert_close(model(**row).logits[0, -1], logits[i], rtol=0, atol=1e-4)
            texts = write(model, inputs, 3)
            assert write(model, alone[1], 3)[0].tolist() == texts[1].tolist()
        assert torch.equal(model(**inputs).logits, before)
    assert isinstance(stats, VisualStats)
    assert stats.mode == " + ".join({"text": "prefix"}.get(p, p) for p in ("tower", "visual", "text") if p in places)
    assert (stats.tokens_per_layer[3] < stats.tokens_per_layer[2]) == ("text" in places)
    assert (stats.tokens_per_layer[0] < stats.tokens_in) == ("visual" in places or ("tower" in places and not squares))
    assert (stats.visual_kept < stats.visual_in) == (stats.tokens_per_layer[0] < stats.tokens_in)
    assert bool(stats.tower_tokens) == ("tower" in places)
    assert not torch.allclose(before[:, -1], logits, atol=1e-3)


@pytest.mark.parametrize("family", ["llava", "llava_next", *TILES])
def test_keep_one_is_the_model_bit_for_bit_and_errors_leave_it(family: str) -> None:
    model, unmerge = model_of(family), family in TILES
    inputs = prompt(model, ROWS)
    merges = {"tower": tower(keep=1.0, unmerge=unmerge), "visual": Merge(qm.SCOPE(keep=1.0))}
    with torch.no_grad():
        logits, wanted = model(**inputs).logits, write(model, inputs)
        before = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
        with reduce_places(model, **merges) as run:
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(write(model, inputs), wanted)
            assert run.plan is None or run.plan.slots == inputs["input_ids"].shape[1]
        broken = Merge(qm.ToMe(keep=0.5), unmerge=unmerge)
        with pytest.raises(RuntimeError, match="stop"), reduce_places(model, tower=broken):
            model(**inputs)
            raise RuntimeError("stop")
        reduce_places(model, tower=broken).attach()
        assert qm.detach(model) == 1
        assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()} == before
        assert torch.equal(model(**inputs).logits, logits)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    assert {config._attn_implementation for config in configs if hasattr(config, "_attn_implementation")} == {"sdpa"}


def test_an_image_that_keeps_all_its_patches_keeps_no_others_from_losing_theirs() -> None:
    model = model_of("llava", tower="siglip")
    merge = Merge(qm.QuickMergeVision(keep=qm.Entropy()), (0, 1))
    with reduce_places(model, tower=merge) as run, torch.no_grad():
        logits, left = model(**prompt(model, ROWS)).logits[:, -1], [image.left for image in run.images]
        assert len(set(left)) > 1 and max(run.tower_run.call.widths[:1]) == 16
        for i in range(len(ROWS)):
            row = model(**row_of(model, ROWS, i)).logits[0, -1]
            torch.testing.assert_close(row, logits[i], rtol=0, atol=1e-4)


def test_gradients_flow_through_a_merged_tower() -> None:
    model = build("llava", layer=[-3, -1])
    with reduce_places(model, tower=tower(), visual=Merge(qm.ToMe(keep=0.5)), text=merge_of("tome", 2)):
        model(**row_of(model, ROWS, 0)).logits[:, -1].square().sum().backward()
    for part in (model.model.vision_tower.encoder.layers[0].mlp.fc1, model.model.multi_modal_projector.linear_1):
        assert bool(part.weight.grad.isfinite().all()) and float(part.weight.grad.abs().sum()) > 0


def test_beams_read_a_prompt_with_a_merged_tower() -> None:
    model = model_of("llava")
    with reduce_places(model, tower=tower(), text=merge_of("tome", 2)), torch.no_grad():
        beams = model.generate(**prompt(model, ROWS), max_new_tokens=4, num_beams=3, do_sample=False)
        for i in range(len(ROWS)):
            alone = model.generate(**row_of(model, ROWS, i), max_new_tokens=4, num_beams=3, do_sample=False)
            assert torch.equal(beams[i, -4:], alone[0, -4:])


def test_features_from_elsewhere_do_not_tell_what_was_merged() -> None:
    model = model_of("llava")
    inputs = row_of(model, ROWS, 0)
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with torch.no_grad():
        outside = model.get_image_features(inputs["pixel_values"])
        with reduce_places(model, tower=tower()):
            inside = model.get_image_features(inputs["pixel_values"])
            logits = model(**inputs).logits
            assert torch.equal(model(**rest, mm_encoder_outputs={"image": inside}).logits, logits)
            with pytest.raises(QuickmergeError, match="they tell which patches were merged in the vision tower"):
                model(**rest, mm_encoder_outputs={"image": outside})


def test_tiles_with_padding_inside_are_refused() -> None:
    model = model_of("smolvlm")
    inputs = row_of(model, ROWS, 0)
    inputs["pixel_attention_mask"] = torch.ones((*inputs["pixel_values"].shape[:2], 56, 56), dtype=torch.bool)
    with reduce_places(model, tower=tower(unmerge=True)), torch.no_grad():
        model(**inputs)
        inputs["pixel_attention_mask"][..., 28:] = False
        with pytest.raises(QuickmergeError, match="pixel_attention_mask must mark every pixel of a tile"):
            model(**inputs)


def test_a_tower_is_in_one_run() -> None:
    model = build("llava")
    assert model.config.model_type in FLAT
    with reduce_places(model, tower=tower()):
        with pytest.raises(UnsupportedModelError, match="already inside a quickmerge run"):
            qm.reduce(model.model.vision_tower, qm.ToMe(keep=0.5))
        with pytest.raises(UnsupportedModelError, match="already inside a quickmerge run"):
            reduce_places(model, visual=Merge(qm.SCOPE()))
    with pytest.raises(QuickmergeError, match="tower must be a reducer for a vision transformer"):
        reduce_places(model, tower=Merge(qm.Truncate()))
    with pytest.raises(ValueError, match=r"layer must be rising blocks in 0..2 or a Removal, got"):
        reduce_places(model, tower=Merge(qm.ToMe(), 5))
