"""Every vision encoder of transformers: it is merged in and the laws hold, or it is refused and the trait is told.

``QUICKMERGE_WRITE_MATRIX=1 pytest -m "" tests/merge/vision/test_zoo.py`` writes src/quickmerge/data/vision.json anew.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
import transformers
import vision_zoo as zoo
from torch import Tensor

import quickmerge as qm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.tokens.removal import Removal
from quickmerge.merge.vision.policy import policy_vit
from quickmerge.merge.vision.run import first_members, full_length
from quickmerge.models import compat
from quickmerge.models.encoder import find_encoder
from quickmerge.models.vision_families import TABLE, VISION_FAMILIES, vision_rows

WRITE = os.environ.get("QUICKMERGE_WRITE_MATRIX") == "1"
KNOWN: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else {"rows": {}, "others": []}
NEWEST = transformers.__version__ == compat.NEWEST
PROVEN = VISION_FAMILIES
REFUSED = [row.family for row in vision_rows() if not row.proven]
QUICK = ("blip_vision_model", "data2vec-vision", "pixtral", "qwen3_vl_vision", "resnet", "swin", "yolos")
"""Of the refused ones, those that stand for a trait and are made in no time."""
KEEP = 0.6


def there(families: Any) -> list[str]:
    """Those that the installed transformers has."""
    return [family for family in families if family in set(compat.model_types())]


class Dropped(qm.Uniform):
    """Takes patches out in front of a block."""

    before: ClassVar[bool] = True


def named(output: Any) -> dict[str, Tensor]:
    return dict(zoo.tensors(output))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", there(PROVEN))
def test_laws(family: str, untouched: Any) -> None:
    """Keeping all is the model to the bit; keeping less reads less, and what follows the blocks reads every patch with
    the features of its slot; leaving the run restores the model."""
    model = untouched(zoo.build_family(family))
    example = zoo.example_of(model)
    plain = named(zoo.read(model, example))
    with qm.reduce(model, qm.ToMe(keep=1.0)):
        assert same(named(zoo.read(model, example)), plain)
    seen: list[Tensor] = []
    with qm.reduce(model, qm.ToMe(keep=KEEP)) as run:
        last = run.encoder.blocks[-1].module
        handle = last.register_forward_hook(lambda module, args, output: seen.append(first(output)))
        merged = named(zoo.read(model, example))
        handle.remove()
    call = run.call
    left = run.summary().tokens_per_block
    assert call.tokens > left[0] > left[-1] > call.prefix and sorted(left, reverse=True) == left
    assert abs(sum(left) / (len(left) * call.tokens) - KEEP) < 0.06
    slots = call.last.size.shape[1]
    alone = run.encoder.model is run.encoder.base and plain["last_hidden_state"].shape[1] == call.tokens
    assert slots == left[-1]
    assert merged["last_hidden_state"].shape[1] == (slots if alone else plain["last_hidden_state"].shape[1])
    assert call.last.slot[:, : call.prefix].tolist() == [list(range(call.prefix))] * len(call.last.slot)
    assert same(named(zoo.read(model, example)), plain)

    # Had the plain model had these features in its last block, it would have made of them what the run made.
    whole = seen[0] if seen[0].shape[1] == call.tokens else full_length(seen[0], call.last)
    handle = last.register_forward_hook(lambda module, args, output: with_first(output, whole))
    wanted = named(zoo.read(model, example))
    handle.remove()
    for name, value in merged.items():
        want = wanted[name]
        if value.ndim == 3 and value.shape != want.shape:
            cut = want.shape[1] - call.tokens  # patches alone, where it hands them out apart
            full = torch.nn.functional.pad(want, (0, 0, -cut, 0))
            index = first_members(call.last)[..., None].expand(-1, -1, want.shape[-1])
            want = full.gather(1, index)[:, -cut:]
        torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-4)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, tokens: Tensor) -> Any:
    return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


HEADS = {
    **{
        family: name if isinstance(name, str) else name[0]
        for family, name in compat.image_classification_names().items()
    },
    "videomae": "VideoMAEForVideoClassification",
    "vivit": "VivitForVideoClassification",
    "vjepa2": "VJEPA2ForVideoClassification",
}


@pytest.mark.parametrize("family", [family for family in there(HEADS) if family in PROVEN])
def test_a_classifier_reads_every_patch(family: str) -> None:
    """Its logits are those that it would make of the slots' features in the place of every original patch."""
    config = zoo.tiny_config(family)
    config.num_labels = 3
    torch.manual_seed(0)
    model = getattr(transformers, HEADS[family])(config).double().eval()
    example = zoo.example_of(model)
    seen: list[Tensor] = []
    with torch.no_grad(), qm.reduce(model, qm.ToMe(keep=KEEP)) as run:
        last = run.encoder.blocks[-1].module
        handle = last.register_forward_hook(lambda module, args, output: seen.append(first(output)))
        logits = model(**example.inputs).logits
        handle.remove()
    call = run.call
    assert call is not None and call.last.size.shape[1] < call.tokens
    whole = seen[0] if seen[0].shape[1] == call.tokens else full_length(seen[0], call.last)
    handle = last.register_forward_hook(lambda module, args, output: with_first(output, whole))
    torch.testing.assert_close(logits, zoo.read(model, example).logits, rtol=1e-9, atol=1e-9)
    handle.remove()


def test_a_head_that_reads_states_of_blocks_reads_every_patch() -> None:
    config = zoo.tiny_config("beit")
    config.out_indices = [1, 2, 3, 4]
    model = transformers.BeitForSemanticSegmentation(config).eval()
    x = zoo.pixels("beit")
    with torch.no_grad():
        plain = model(x)
        with qm.reduce(model, qm.ToMe(keep=1.0)):
            assert torch.equal(model(x).logits, plain.logits)
        with qm.reduce(model, qm.ToMe(keep=KEEP)) as run:
            merged = model(x, output_hidden_states=True)
    assert merged.logits.shape == plain.logits.shape and not torch.equal(merged.logits, plain.logits)
    assert run.summary().tokens_kept < run.summary().tokens_in
    assert [state.shape[1] for state in merged.hidden_states] == [run.call.tokens] * (zoo.DEPTH + 1)


@pytest.mark.parametrize("family", there(PROVEN))
def test_rows_and_places(family: str) -> None:
    """A batch equals its rows; and tokens taken out are tokens that nobody attends to, wherever the others stand."""
    model = zoo.build_family(family, torch.float64)
    example = zoo.example_of(model, 3)
    with qm.reduce(model, qm.ToMe(keep=KEEP)):
        whole = named(zoo.read(model, example))
        for row in range(3):
            for name, value in named(zoo.read(model, zoo.row_of(example, row))).items():
                torch.testing.assert_close(whole[name][row : row + 1], value, rtol=1e-7, atol=1e-7)
    with qm.reduce(model, Dropped(keep=0.5), [1]) as run:
        short = zoo.read(model, example).last_hidden_state
    call = run.call
    kept = call.last.slot[:, call.prefix :] >= 0
    assert 0 < int(kept[0].sum()) < kept.shape[1]
    with policy_vit(model, [1], lambda stage, patches, mask: kept.to(patches.dtype)) as policy:
        zoo.read(model, example)
    if short.shape[1] == call.last.size.shape[1]:
        attended = torch.stack([patches[row] for patches, row in zip(policy.features, kept, strict=True)])
        # Positions turned in float32 agree to that.
        torch.testing.assert_close(short[:, call.prefix :], attended, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", there(PROVEN))
def test_half_precision_and_other_sizes(family: str) -> None:
    model = zoo.build_family(family, torch.bfloat16)
    example = zoo.example_of(model)
    with qm.reduce(model, qm.ToMe(keep=KEEP)):
        got = zoo.read(model, example).last_hidden_state
    assert got.dtype == torch.bfloat16 and bool(got.isfinite().all())
    odd = other_size(zoo.build_family(family))
    if not WRITE and NEWEST:
        assert (odd is not None) == KNOWN["rows"][family]["any_size"]
    if odd is None:
        return
    model, example, more = odd
    with torch.no_grad(), qm.reduce(model, qm.ToMe(keep=KEEP)) as run:
        whole = model(**example.inputs, **more).last_hidden_state
        for row in range(2):
            one = model(**zoo.row_of(example, row).inputs, **more).last_hidden_state
            torch.testing.assert_close(whole[row : row + 1], one, rtol=1e-4, atol=1e-4)
    assert run.summary().grid[1:] == (5, 7) and run.summary().tokens_per_block[-1] < run.call.tokens


def other_size(model: Any) -> Any:
    """A model, images of 5 by 7 patches, and what it must be told to read them; None if it reads no such images."""
    names = inspect.signature(model.forward).parameters
    more: dict[str, Any] = {"skip_predictor": True} if "skip_predictor" in names else {}
    for told in ({}, {"interpolate_pos_encoding": True}) if "interpolate_pos_encoding" in names else ({},):
        for example in zoo.examples(model, 2, size=(5 * zoo.PATCH, 7 * zoo.PATCH)):
            if example.pixels.ndim == 3 and "spatial_shapes" not in names:
                continue
            try:
                with torch.no_grad():
                    model(**example.inputs, **told, **more)
            except Exception:  # of whatever kind: it can't
                continue
            return model, example, {**told, **more}
    return None


def refusal(family: str) -> tuple[str, str]:
    """What is said of a family that is refused, and the trait in it."""
    model = zoo.build_family(family)
    with pytest.raises(UnsupportedModelError) as caught:
        qm.reduce(model, qm.ToMe())
    told = str(caught.value)
    found = re.search(r"because of its (.*?); vision transformers", told) or re.search(r"(holds .*): give one", told)
    assert found is not None, told
    return told, found[1]


def bare(trait: str) -> str:
    """A trait without the names of one model that stand in brackets."""
    return re.sub(r" \([^)]*\)", "", trait)


@pytest.mark.parametrize("family", there(QUICK))
def test_the_trait_is_told(family: str) -> None:
    told, trait = refusal(family)
    assert type(zoo.build_family(family)).__name__ in told and "\n" not in told
    assert "language model" not in told
    assert bare(trait) == bare(KNOWN["rows"][family]["refused"])


@pytest.mark.slow  # many of them are large
@pytest.mark.parametrize("family", [family for family in there(REFUSED) if family not in QUICK])
def test_every_other_family_is_refused_by_a_trait(family: str) -> None:
    known = KNOWN["rows"][family]["refused"]
    if "needs the package" in known:
        with pytest.raises(ImportError):
            zoo.build_family(family)
        return
    told, trait = refusal(family)
    assert "language model" not in told
    assert bare(trait) == bare(known)


def test_every_family_has_its_row() -> None:
    """Fails when a new transformers has a family of images or videos that nobody has tried."""
    missing = set(zoo.families()) - set(KNOWN["rows"]) - set(KNOWN["others"])
    assert not missing, "write the table anew: see the head of this file"
    assert len(PROVEN) >= 40 and set(PROVEN) | set(REFUSED) == set(KNOWN["rows"])


@pytest.mark.slow  # every modeling file is imported
def test_families_without_a_row_have_no_model_of_pixels() -> None:
    assert all(zoo.class_of(family) is None for family in there(KNOWN["others"]))


# Padded patches -----------------------------------------------------------------------------------------------------


def naflex(shapes: list[tuple[int, int]], most: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Images of ``shapes`` in patches, padded to ``most`` of them with what would be seen if it were read."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(shapes), most, 3 * zoo.PATCH**2, generator=generator, dtype=dtype)
    counts = torch.tensor([high * wide for high, wide in shapes])
    there = torch.arange(most) < counts[:, None]
    return {
        "pixel_values": torch.where(there[..., None], values, 100.0),
        "pixel_attention_mask": there.long(),
        "spatial_shapes": torch.tensor(shapes),
    }


@pytest.mark.parametrize("reducer", [qm.ToMe(keep=KEEP), qm.QuickMergeVision(keep=KEEP), qm.Uniform(keep=KEEP)])
@pytest.mark.parametrize("head", ["VisionModel", "ForImageClassification"])
def test_padded_images_are_merged_as_they_are_alone(reducer: Any, head: str) -> None:
    """Each image keeps its share of its own patches, and padding is neither merged nor pooled."""
    config = zoo.tiny_config("siglip2_vision_model")
    if head == "ForImageClassification":
        config = transformers.Siglip2Config(vision_config=config.to_dict(), text_config={}, num_labels=3)
    torch.manual_seed(0)
    model = getattr(transformers, "Siglip2" + head)._from_config(config, attn_implementation="sdpa").double().eval()
    shapes = [(5, 7), (3, 4), (6, 6)]
    inputs = naflex(shapes, 40)
    with torch.no_grad(), qm.reduce(model, reducer) as run:
        whole = model(**inputs)
        level = run.call.last
        for row, (high, wide) in enumerate(shapes):
            alone = model(**{
                name: value[row : row + 1, : high * wide] if name != "spatial_shapes" else value[row : row + 1]
                for name, value in inputs.items()
            })  # fmt: skip
            if head == "ForImageClassification":
                torch.testing.assert_close(whole.logits[row], alone.logits[0], rtol=1e-9, atol=1e-9)
                continue
            mine = whole.last_hidden_state[row][level.valid[row]]
            torch.testing.assert_close(mine, alone.last_hidden_state[0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(whole.pooler_output[row], alone.pooler_output[0], rtol=1e-9, atol=1e-9)
            assert len(mine) < high * wide
            assert bool((level.slot[row, high * wide :] == -1).all())


def test_padded_images_are_read_whole_at_keep_1() -> None:
    model = zoo.build_family("siglip2_vision_model", torch.float64)
    inputs = naflex([(5, 7), (3, 4)], 40)
    with torch.no_grad():
        plain = model(**inputs)
        with qm.reduce(model, qm.ToMe(keep=1.0)):
            assert torch.equal(model(**inputs).pooler_output, plain.pooler_output)


def test_padding_between_patches_and_grids_that_differ_are_told() -> None:
    model = zoo.build_family("siglip2_vision_model", torch.float64)
    inputs = naflex([(5, 7), (3, 4)], 40)
    with qm.reduce(model, qm.Pool(keep=0.5), 1), pytest.raises(QuickmergeError, match="spatial_shapes"):
        model(**inputs)
    inputs["pixel_attention_mask"][0, 3] = 0
    with (
        qm.reduce(model, qm.ToMe(), Removal(1)),
        pytest.raises(QuickmergeError, match="attention_mask must mark"),
    ):
        model(**inputs)


# What a run asks for ------------------------------------------------------------------------------------------------


def test_patches_that_would_be_shuffled_stay_in_order() -> None:
    model = zoo.build_family("vit_mae")
    example = zoo.example_of(model)
    plain = zoo.read(model, example)
    bare_pixels = {"pixel_values": example.pixels}
    with torch.no_grad(), qm.reduce(model, qm.ToMe(keep=1.0)):
        assert torch.equal(model(**bare_pixels).last_hidden_state, plain.last_hidden_state)
        with pytest.raises(QuickmergeError, match="noise must be None or rising"):
            model(**{**bare_pixels, "noise": example.inputs["noise"].flip(1)})


def test_a_model_of_two_towers_is_told_so() -> None:
    class Two(transformers.ViTPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.left, self.right = transformers.ViTModel(config), transformers.ViTModel(config)

    with pytest.raises(UnsupportedModelError, match="holds 2 vision transformers, ViTModel, ViTModel: give one"):
        find_encoder(Two(zoo.tiny_config("vit")))


def test_a_tower_without_such_attention_is_told_inside_a_pair() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = transformers.BlipModel(
        transformers.BlipConfig(text_config={**sizes, "vocab_size": 9}, vision_config=vision)
    )
    with pytest.raises(UnsupportedModelError, match=r"BlipModel.* holds a BlipVisionModel, .*attention of its own"):
        qm.reduce(model, qm.ToMe())
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM .* holds 0 vision transformers"):
        find_encoder(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=9)))


def test_blocks_of_another_build_merge_behind() -> None:
    """A block whose halves work side by side is no pre-norm block, and is merged behind."""
    from transformers.models.vit import modeling_vit

    class Parallel(modeling_vit.ViTLayer):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            normed = self.layernorm_before(hidden_states)
            attended = self.attention(normed, **kwargs)
            attended = attended[0] if isinstance(attended, tuple) else attended
            return hidden_states + attended + self.mlp(self.layernorm_after(hidden_states))

    model = zoo.build_family("vit", torch.float64)
    for block in model.layers:
        block.__class__ = Parallel
    encoder = find_encoder(model)
    assert all(block.second_norm is None for block in encoder.blocks)
    x = zoo.pixels("vit", 3, torch.float64)
    with torch.no_grad():
        plain = model(x).last_hidden_state
        with qm.reduce(model, qm.ToMe(keep=1.0)):
            assert torch.equal(model(x).last_hidden_state, plain)
        with qm.reduce(model, qm.ToMe(), Removal(5)) as run:
            whole = model(x).last_hidden_state
            assert run.summary().tokens_per_block == [32.0, 27.0, 22.0, 17.0] and whole.shape[1] == 17
            torch.testing.assert_close(model(x[1:2]).last_hidden_state, whole[1:2], rtol=1e-9, atol=1e-9)


def test_a_block_that_goes_by_the_order_of_its_tokens_is_refused() -> None:
    model = zoo.build_family("vit")
    for block in model.layers:
        block.attention.is_causal = True
    with pytest.raises(UnsupportedModelError, match="blocks that go by the order of their tokens"):
        qm.reduce(model, qm.ToMe())


# Writing the table --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def written() -> Iterator[None]:
    if WRITE:
        rows = {family: row for family in zoo.families() if (row := row_for(family)) is not None}
        others = sorted(set(zoo.families()) - set(rows))
        TABLE.write_text(json.dumps({"rows": rows, "others": others}, indent=1) + "\n", encoding="utf-8")
    yield


def row_for(family: str) -> dict[str, Any] | None:
    made = zoo.class_of(family)
    if made is None:
        return None
    row: dict[str, Any] = {"model": made.__name__}
    try:
        model = zoo.build_family(family)
    except ImportError as error:
        found = re.search(r"requires the (\w+) library", str(error))
        assert found is not None
        return {**row, "refused": f"not tried: it needs the package {found[1]}"}
    try:
        encoder = find_encoder(model)
    except UnsupportedModelError:
        return {**row, "refused": refusal(family)[1]}
    layout = encoder.blocks[0].layout
    assert layout is not None
    return {
        **row, "prefix": layout.prefix, "any_size": other_size(model) is not None, "traits": list(layout.traits),
    }  # fmt: skip
