"""Visual tokens reduced and all tokens merged in one vision-language model, against its layers called by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from caches import held, past
from hypothesis import given, settings
from hypothesis import strategies as st
from places_samples import COMBINATIONS, SHORT, by_hand, double, doubled, merge_of
from torch import Tensor
from vlm_zoo import EOS, FAMILIES, FLAT, IMAGE, ROWS, VIDEO, build, entering, model_of, prompt, row_of, text_of, write

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.attach import reduce_places
from quickmerge.merge.place import Merge
from quickmerge.merge.text.modes import BlockCausal, Prefix
from quickmerge.models.columns import stored

CASES = [
    (f, name) for f in FAMILIES for name in COMBINATIONS if f in ("llava", "qwen3_vl") or name == "inside, then tome"
]
EXTRA = torch.tensor([[5, 6, 7, 8]])


def seen(model: Any, n: int) -> dict[str, Any]:
    """A mask for everything read so far; models that count places in a grid by it are given none."""
    flat = model.config.model_type in FLAT
    return {"attention_mask": torch.ones(1, n, dtype=torch.long)} if flat else {}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_prompt_and_what_follows_equal_the_layers_called_by_hand(family: str, name: str) -> None:
    model, merges = double(family), COMBINATIONS[name]
    for i in (1, 2):  # two images, and none
        inputs = doubled(row_of(model, ROWS, i))
        n = inputs["input_ids"].shape[1]
        if family not in FLAT:
            model.model.rope_deltas = None  # of the prompt before, which words alone don't change
        with reduce_places(model, **merges) as run, torch.no_grad():
            out = model(**inputs)
            cache, steps = held(out), []
            for part in (slice(0, 1), slice(1, 2), slice(2, 4)):  # one by one, then two at once
                new = EXTRA[:, part]
                steps.append(model(input_ids=new, **past(cache), **seen(model, n + part.stop)).logits)
            found = torch.cat([out.logits, *steps], 1)
        wanted = by_hand(model, inputs, run, merges, EXTRA)
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
        assert out.logits.shape[1] < n
        counts = run.summary().tokens_per_layer
        assert counts[-1] == out.logits.shape[1] < n
        assert [stored(layer) - 4 for layer in cache.layers] == counts


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_batch_equals_its_rows(family: str, name: str) -> None:
    model = model_of(family)
    inputs = prompt(model, ROWS)
    with reduce_places(model, **COMBINATIONS[name]) as run, torch.no_grad():
        texts = write(model, inputs, 3)
        kept = run.plan.valid.sum(-1).tolist()
        for i in range(len(ROWS)):
            assert write(model, row_of(model, ROWS, i), 3)[0].tolist() == texts[i].tolist()
            assert run.plan.slots == kept[i]


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_one_is_the_model_bit_for_bit_and_errors_leave_it(family: str) -> None:
    model = model_of(family)
    inputs = prompt(model, ROWS)
    text, visual = Merge(qm.QuickMerge(keep=1.0), [2, 3], SHORT), Merge(qm.SCOPE(keep=1.0))
    with torch.no_grad():
        logits, wanted = model(**inputs).logits, write(model, inputs)
        before = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
        for merges in ({"text": text}, {"text": text, "visual": visual}):
            with reduce_places(model, **merges) as run:
                assert torch.equal(model(**inputs).logits, logits)
                assert torch.equal(write(model, inputs), wanted)
                assert run.summary().visual_kept == run.summary().visual_in > 0
            with pytest.raises(RuntimeError, match="stop"), reduce_places(model, **merges):
                model(**inputs)
                raise RuntimeError("stop")
        assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()} == before
        assert torch.equal(model(**inputs).logits, logits)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_laws_hold_for_any_two_methods_at_any_blocks(data: st.DataObject) -> None:
    """Sizes are conserved, protected tokens stay alone, and a batch is read as its rows."""
    model = double(data.draw(st.sampled_from(["llava", "qwen2_vl"])))
    methods = [qm.ToMe, qm.SCOPE, qm.Random, qm.QuickMergeVision, qm.Attention]
    lower = sorted(data.draw(st.sets(st.sampled_from([0, 1]), max_size=2)))
    upper = sorted(data.draw(st.sets(st.sampled_from([2, 3]), min_size=1)))
    keep = data.draw(st.sampled_from([0.3, 0.5, 0.9]))
    sinks, recent = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4))
    least = data.draw(st.sampled_from([0, 16]))
    # What is drawn at random is drawn for a batch as for its rows where nothing is drawn.
    told = [qm.ToMe, qm.QuickMerge, qm.Uniform, qm.TopNorm, qm.Attention]
    method = data.draw(st.sampled_from(told))(keep=data.draw(st.sampled_from([0.3, 0.6])))
    merges = {"text": Merge(method, upper, Prefix(sinks=sinks, recent=recent, min_tokens=least))}
    if lower:
        merges["visual"] = Merge(
            data.draw(st.sampled_from([m for m in methods if m is not qm.Random]))(keep=keep), lower
        )
    inputs = doubled(prompt(model, ROWS))
    with reduce_places(model, **merges) as run, torch.no_grad():
        logits = model(**inputs).logits[:, -1]
        plan, protected, stats = run.plan, run.protected, run.summary()
        dropped = (plan.slot < 0).sum(-1) - (inputs["attention_mask"] == 0).sum(-1)
        assert torch.equal(plan.size.sum(-1), inputs["attention_mask"].sum(-1) - dropped)
        assert bool((plan.slot >= 0)[protected].all())
        assert stats.min_tokens == least
        for i in range(len(ROWS)):
            alone = doubled(row_of(model, ROWS, i))
            # Padding moves positions, whose rotary tables are float32.
            torch.testing.assert_close(model(**alone).logits[0, -1], logits[i], rtol=0, atol=1e-5)
            assert run.plan.slots == int(plan.valid[i].sum())


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_beams_and_rows_that_move_follow_their_prompt(family: str) -> None:
    model = model_of(family)
    merges = COMBINATIONS["tome then quickmerge"]
    stops = {"suppress_tokens": [IMAGE, VIDEO, EOS]}
    with reduce_places(model, **merges), torch.no_grad():
        beams = model.generate(**prompt(model, ROWS), max_new_tokens=4, num_beams=3, do_sample=False, **stops)
        for i in range(len(ROWS)):
            row = row_of(model, ROWS, i)
            alone = model.generate(**row, max_new_tokens=4, num_beams=3, do_sample=False, **stops)
            assert torch.equal(beams[i, -4:], alone[0, -4:])
    if family != "llava":
        return  # it counts by what it keeps of the last prompt, in its order
    both, new = prompt(model, [[0], [1]]), torch.tensor([[5], [6]])
    mask = torch.cat([both["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with reduce_places(model, **merges), torch.no_grad():
        cache = held(model(**both))
        moved = copy.deepcopy(cache)
        moved.reorder_cache(torch.tensor([1, 0]))
        wanted = model(new, attention_mask=mask, **past(cache)).logits
        found = model(new.flip(0), attention_mask=mask.flip(0), **past(moved)).logits.flip(0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_what_was_written_can_be_taken_back(family: str) -> None:
    model = double(family)
    inputs = doubled(row_of(model, ROWS, 1))
    n = inputs["input_ids"].shape[1]
    with reduce_places(model, **COMBINATIONS["scope then tome"]), torch.no_grad():
        cache = held(model(**inputs))
        first = model(input_ids=EXTRA, **past(cache), **seen(model, n + 4)).logits
        cache.crop(-3)
        again = model(input_ids=EXTRA[:, 1:], **past(cache), **seen(model, n + 4)).logits
        torch.testing.assert_close(again, first[:, 1:], rtol=0, atol=1e-9)
        with pytest.raises(QuickmergeError, match="crop can take back 4 tokens here"):
            cache.crop(-5)


def test_protection_counts_what_the_visual_merge_left() -> None:
    model = model_of("llava")
    inputs = row_of(model, ROWS, 0)
    n, asked = inputs["input_ids"].shape[1], []

    def protect(ids: Tensor) -> Tensor:
        asked.append(ids)
        return ids == inputs["input_ids"][0, 1]

    mode = Prefix(sinks=0, recent=2, protect=protect, min_tokens=0)
    with reduce_places(
        model, text=Merge(qm.Uniform(keep=qm.Count(3)), 2, mode), visual=Merge(qm.Uniform(keep=qm.Count(3)))
    ) as run, torch.no_grad():  # fmt: skip
        model(**inputs)
    left = inputs["input_ids"][0, run.composed[0].position[0]]
    assert torch.equal(asked[0][0], left) and int((left == IMAGE).sum()) == 3
    # The budget pays for the recent and the beginning that the model marks, what was asked for comes on top.
    marks = (inputs["input_ids"][0] == 1) | (inputs["input_ids"][0] == EOS)
    marks[-2:] = True
    marks |= inputs["input_ids"][0] == inputs["input_ids"][0, 1]
    assert torch.equal(run.protected[0], marks)
    assert run.plan.slots == 3 + 1
    assert bool((run.plan.slot[0, marks] >= 0).all())
    # min_tokens is of what is left, too.
    mode = Prefix(min_tokens=n - 13 + 1)
    with reduce_places(model, text=Merge(qm.Uniform(), 2, mode), visual=Merge(qm.Uniform(keep=qm.Count(3)))) as run:
        model(**inputs)
    assert run.summary().rows_short == 1
    assert "1 of 1 rows below min_tokens" in str(run.summary())


def test_positions_counted_anew_are_those_of_a_shorter_prompt_that_is_merged() -> None:
    model = double("llava")
    inputs = doubled(row_of(model, ROWS, 1))
    visual, text = Merge(qm.SCOPE(keep=0.4), positions="consecutive"), merge_of("tome", 2)
    with reduce_places(model, visual=visual), torch.no_grad():
        shorter = entering(model, inputs)["inputs_embeds"]
    with reduce_places(model, text=text), torch.no_grad():
        wanted = write(model, {"inputs_embeds": shorter}, 4)
        logits = model(inputs_embeds=shorter).logits
    with reduce_places(model, visual=visual, text=text), torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=0, atol=1e-9)
        assert torch.equal(write(model, inputs, 4), wanted)


def test_gradients_and_checkpointing_go_through_merged_text() -> None:
    grads = []
    for again in (False, True):
        model = build("llava")
        if again:
            switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            getattr(model, f"{switch}_checkpointing_enable")()
        model.train()
        with reduce_places(model, **COMBINATIONS["tome then quickmerge"]):
            model(**row_of(model, ROWS, 0), use_cache=False).logits[:, -1].square().sum().backward()
        grads.append(model.model.multi_modal_projector.linear_1.weight.grad)
    assert float(grads[0].abs().sum()) > 0
    torch.testing.assert_close(grads[0], grads[1])


def test_multipole_attention_reads_what_is_left() -> None:
    model = build("llava")
    inputs = prompt(model, ROWS)
    with reduce_places(model, **COMBINATIONS["tome then quickmerge"]):
        wanted = write(model, inputs, 6)
        with qm.multipole(model, sink=2, interval=4, ratio=0.25, budget=1000):
            assert torch.equal(write(model, inputs, 6), wanted)
    with qm.multipole(model, sink=2, interval=4, ratio=0.25, budget=1000):
        with reduce_places(model, **COMBINATIONS["text"]) as run:
            write(model, inputs, 6)
        assert run.summary().tokens_per_layer[-1] < run.summary().tokens_in


def test_other_models_have_their_one_place(tiny_llama: Any) -> None:
    ids = torch.arange(3, 43)[None] % 60
    with torch.no_grad():
        with qm.reduce(tiny_llama, qm.ToMe(keep=0.5), 1, mode=SHORT):
            wanted = tiny_llama(ids).logits
        with reduce_places(tiny_llama, text=merge_of("tome", 1)):
            assert torch.equal(tiny_llama(ids).logits, wanted)
    vit, pixels = model_of("llava").model.vision_tower, torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        with qm.reduce(vit, qm.ToMe(keep=0.5), unmerge=True):
            wanted = vit(pixels).last_hidden_state
        with reduce_places(vit, tower=Merge(qm.ToMe(keep=0.5), unmerge=True)):
            assert torch.equal(vit(pixels).last_hidden_state, wanted)
    with pytest.raises(QuickmergeError, match="visual must be None for LlamaForCausalLM, which has no visual"):
        reduce_places(tiny_llama, visual=Merge(qm.SCOPE()))
    with pytest.raises(QuickmergeError, match="text must be None for CLIPVisionModel, which has no text"):
        reduce_places(vit, text=Merge(qm.QuickMerge()))


@pytest.mark.parametrize(
    ("family", "merges", "message"),
    [
        ("llava", {}, "text, visual, tower or cache must say what is to be done"),
        ("llava", {"text": qm.QuickMerge()}, r"text must be a Merge\(reducer, ...\) or None, got QuickMerge"),
        ("llava", {"text": Merge(qm.SCOPE())}, "text must be a reducer for the prompt of a language model"),
        ("llava", {"text": Merge(qm.QuickMerge(), 4)}, r"layer must lie in 1..3 for a model of 4 blocks, got 4"),
        ("llava", {"text": Merge(qm.QuickMerge(), mode=BlockCausal())}, r"mode must be Prefix\(...\) for the text of"),
        ("llava", {"visual": Merge(qm.SCOPE(), [0, 2]), "text": Merge(qm.QuickMerge(), 2)}, "above block 2"),
        ("qwen3_vl", {"text": Merge(qm.QuickMerge(), 1)}, r"layer must be rising blocks in 2..3 for the text, behind"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(family: str, merges: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduce_places(model_of(family), **merges)


def test_a_mask_with_holes_is_refused_where_text_is_merged() -> None:
    model = model_of("llava")
    inputs = row_of(model, ROWS, 0)
    inputs["attention_mask"][0, 3] = 0
    with (
        reduce_places(model, **COMBINATIONS["text"]),
        pytest.raises(QuickmergeError, match="attention_mask must pad on one side"),
    ):
        model(**inputs)
    assert text_of(model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("visual", [None, Merge(qm.Attention(0.5), 0)], ids=["text", "both"])
def test_spans_are_told_of_the_ids_that_are_left(family: str, visual: Merge | None) -> None:
    """Words of one line are of one span, and each visual token is one of its own, wherever others have gone."""
    from tokenizer_samples import byte_level

    from quickmerge.models.spans import cut, pieces_of

    shown: list[Any] = []

    class Watching(qm.QuickMerge):
        def plan(self, view: Any) -> Any:
            shown.append(view)
            return super().plan(view)

    model = model_of(family)
    inputs = row_of(model, ROWS, 1)
    text = Merge(Watching(0.6), 2, Prefix(min_tokens=0, sinks=0, recent=1, tokenizer=byte_level()))
    with reduce_places(model, text=text, visual=visual) as run, torch.no_grad():
        model(**inputs)
    (view,) = shown
    ids = inputs["input_ids"][0, run.merges[0].position[0]] if visual is not None else inputs["input_ids"][0]
    lines, shut = cut(pieces_of(ids.tolist(), byte_level()), "line"), view.protected[0].tolist()
    told = view.group[0].tolist()
    assert len(told) == len(lines) and run.summary().spans == "line"
    for j in range(1, len(told)):
        assert (told[j] == told[j - 1]) is (lines[j] == lines[j - 1] and shut[j] == shut[j - 1])
