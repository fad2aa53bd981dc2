"""Reducing visual tokens behind the projector, in every supported family."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from caches import held, past
from torch import Tensor
from vlm_zoo import (
    BOS,
    DEPTH,
    END,
    EXACT,
    FAMILIES,
    FLAT,
    IMAGE,
    METHODS,
    ROWS,
    build,
    entering,
    greedy,
    model_of,
    prompt,
    row_of,
    shortened,
    text_of,
    write,
)

import quickmerge as qm
from quickmerge.models.columns import stored

VIDEO_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2, [0, 2]])
def test_keep_one_is_the_model_bit_for_bit(family: str, layer: Any) -> None:
    model = model_of(family)
    inputs = prompt(model, ROWS)
    with torch.no_grad():
        logits, text = model(**inputs).logits, write(model, inputs)
        for reducer in (qm.SCOPE(keep=1.0), qm.ToMe(keep=1.0), qm.QuickMergeVision(keep=1.0)):
            with qm.reduce(model, reducer, layer=layer) as run:
                assert torch.equal(model(**inputs).logits, logits)
                assert torch.equal(write(model, inputs), text)
                assert run.summary().visual_kept == run.summary().visual_in > 0
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_leaves_the_model_as_it_was(family: str) -> None:
    model = model_of(family)
    inputs = prompt(model, ROWS)
    with torch.no_grad():
        logits = model(**inputs).logits
        before = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
        configs = [model.config._attn_implementation, text_of(model).config._attn_implementation]
        with pytest.raises(RuntimeError, match="stop"), qm.reduce(model, qm.SCOPE(keep=0.3), layer=[0, 2]):
            model(**inputs)
            raise RuntimeError("stop")
        assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()} == before
        assert [model.config._attn_implementation, text_of(model).config._attn_implementation] == configs
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_generate_equals_greedy_decoding_from_embeddings_built_by_hand(family: str, name: str) -> None:
    model = model_of(family)
    for i in range(2):
        inputs = row_of(model, ROWS, i)
        with qm.reduce(model, METHODS[name]) as run, torch.no_grad():
            text = write(model, inputs)
            logits = model(**inputs).logits
        ids, first = greedy(model, shortened(model, inputs, run), 5)
        assert logits.shape == first.shape
        assert torch.allclose(logits, first, atol=EXACT, rtol=EXACT)
        assert text[0].tolist() == ids


@pytest.mark.parametrize("family", FLAT)
@pytest.mark.parametrize("name", ["scope", "tome"])
def test_consecutive_positions_are_those_of_a_shorter_prompt(family: str, name: str) -> None:
    model, hand = model_of(family), []
    for i in range(2):
        inputs = row_of(model, ROWS, i)
        with qm.reduce(model, METHODS[name], positions="consecutive") as run, torch.no_grad():
            text = write(model, inputs)
            logits = model(**inputs).logits
        given = shortened(model, inputs, run, "consecutive")
        ids, first = greedy(model, given, 5)
        assert torch.allclose(logits, first, atol=EXACT, rtol=EXACT)
        assert text[0].tolist() == ids
        assert write(model, {"inputs_embeds": given["inputs_embeds"]})[0].tolist() == ids
        hand.append(ids)
    with qm.reduce(model, METHODS[name], positions="consecutive"):
        assert write(model, prompt(model, ROWS))[:2].tolist() == hand


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_what_was_asked_for_everywhere(family: str) -> None:
    model = model_of(family)
    inputs = prompt(model, ROWS)
    widths: list[int] = []
    block = text_of(model).layers[0]
    handle = block.register_forward_pre_hook(lambda m, a: widths.append(a[0].shape[1]))
    try:
        with qm.reduce(model, qm.SCOPE(keep=qm.Count(3))) as run, torch.no_grad():
            cache = held(model(**inputs))
    finally:
        handle.remove()
    visual = [sum(image.count for image in run.images if image.row == row) for row in range(3)]
    length = inputs["attention_mask"].sum(-1).tolist()
    left = [n - v + 3 * len(pictures) for n, v, pictures in zip(length, visual, ROWS, strict=True)]
    assert [image.left for image in run.images] == [3, 3, 3]
    assert widths == [max(left)]
    assert [stored(layer) for layer in cache.layers] == [max(left)] * DEPTH
    stats = run.summary()
    assert stats.images == 3
    assert stats.visual_in == pytest.approx(sum(visual) / 3)
    assert stats.visual_kept == pytest.approx(3)
    assert stats.tokens_per_layer == pytest.approx([sum(left) / 3] * DEPTH)
    assert stats.cache_bytes_full / stats.cache_bytes == pytest.approx(inputs["input_ids"].shape[1] / max(left))
    assert stats.tower_seconds > 0
    assert stats.prefill_seconds > 0
    assert "3 image(s)" in str(stats)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in FLAT])
def test_tokens_that_stay_keep_their_places_in_the_grid(family: str) -> None:
    model = model_of(family)
    inputs = row_of(model, ROWS, 1)
    dense = entering(model, inputs)["position_ids"]
    with qm.reduce(model, qm.SCOPE(keep=0.4)) as run:
        reduced = entering(model, inputs)
    # The hook of the run comes first, so what is seen here is what the language model reads.
    assert run.columns is not None
    assert torch.equal(reduced["position_ids"], dense[..., run.columns[0]])
    assert not torch.equal(dense[0], dense[-1])


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_videos_are_one_grid_of_frames(family: str) -> None:
    model = model_of(family)
    inputs = row_of(model, [[0], [1]], 0, "video")
    with qm.reduce(model, METHODS["scope"]) as run, torch.no_grad():
        text = write(model, inputs)
    assert [(image.kind, image.grid, image.count) for image in run.images] == [("video", (3, 4, 3), 36)]
    assert run.images[0].left == 14
    assert text[0].tolist() == greedy(model, shortened(model, inputs, run), 5)[0]
    with qm.reduce(model, METHODS["scope"]), torch.no_grad():
        both = write(model, prompt(model, [[0], [1]], "video"))
    assert both[0].tolist() == text[0].tolist()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_text_alone_passes_untouched(family: str) -> None:
    model = model_of(family)
    inputs = prompt(model, [[], []])
    with torch.no_grad():
        logits, text = model(**inputs).logits, write(model, inputs)
        with qm.reduce(model, qm.SCOPE(keep=0.3), layer=[0, 2]) as run:
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(write(model, inputs), text)
            assert run.summary().images == 0
            assert run.plan is None


def test_more_tokens_than_there_are_asks_for_all() -> None:
    model = model_of("llava")
    inputs = prompt(model, ROWS)
    with torch.no_grad():
        logits = model(**inputs).logits
        with qm.reduce(model, qm.SCOPE(keep=qm.Count(999))):
            assert torch.equal(model(**inputs).logits, logits)


def test_log_size_is_added_to_the_scores_of_merged_tokens() -> None:
    model = build("llava", attn="eager")
    inputs = row_of(model, ROWS, 0)
    with qm.reduce(model, qm.ToMe(keep=0.4)) as run, torch.no_grad():
        logits = model(**inputs).logits
    given = shortened(model, inputs, run)
    size = torch.ones(given["inputs_embeds"].shape[1])
    for k, column in enumerate(run.images[0].columns[run.images[0].plan.position[0]]):
        size[(run.columns[0] == column).nonzero()] = run.images[0].plan.size[0, k].float()
    n = len(size)
    bias = torch.full((n, n), torch.finfo(torch.float32).min).triu(1) + size.log()
    given["attention_mask"] = bias[None, None]
    given.pop("next")
    with torch.no_grad():
        hand = model.lm_head(text_of(model)(**given).last_hidden_state)
    assert torch.allclose(logits, hand, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next", "smolvlm"])
def test_features_computed_before_serve_as_well(family: str) -> None:
    model = model_of(family)
    inputs = prompt(model, ROWS)
    given = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with qm.reduce(model, METHODS["scope"]), torch.no_grad():
        logits = model(**inputs).logits
        features = model.get_image_features(**given)
        assert torch.equal(model(**rest, mm_encoder_outputs={"image": features}).logits, logits)
    with torch.no_grad():
        features = model.get_image_features(**given)
    other = METHODS["scope"]
    if family == "llava_next":
        other = METHODS["random"]
    else:
        with qm.reduce(model, METHODS["random"]), torch.no_grad():
            model(**rest, mm_encoder_outputs={"image": features})
    with (
        qm.reduce(model, other),
        torch.no_grad(),
        pytest.raises(qm.QuickmergeError, match="mm_encoder_outputs must come from"),
    ):
        model(**rest, mm_encoder_outputs={"image": features})


def test_mosaics_leave_newlines_and_padding_alone() -> None:
    model = model_of("llava_next")
    inputs = row_of(model, [[0]], 0)
    with qm.reduce(model, qm.Uniform(keep=0.5)) as run, torch.no_grad():
        model(**inputs)
    image = run.images[0]
    dense = entering(model, inputs)["inputs_embeds"][0]
    newline = (dense == model.model.image_newline).all(-1)
    assert newline.sum() == 6
    assert not newline[image.columns].any()
    assert image.count + int(newline.sum()) == int((inputs["input_ids"] == IMAGE).sum())
    assert newline[run.columns[0]].sum() == 6
    assert image.grid is None


def test_beams_and_sampling_run_and_repeat_themselves() -> None:
    model = model_of("llava")
    with qm.reduce(model, METHODS["scope"]), torch.no_grad():
        beams = model.generate(**prompt(model, ROWS), max_new_tokens=5, num_beams=3, do_sample=False)
        alone = [
            model.generate(**row_of(model, ROWS, i), max_new_tokens=5, num_beams=3, do_sample=False) for i in range(3)
        ]
    assert all(torch.equal(beams[i, -5:], alone[i][0, -5:]) for i in range(3))


def test_a_further_turn_reads_on_behind_the_shortened_cache() -> None:
    model = model_of("qwen2_5_vl")
    inputs = row_of(model, ROWS, 1)
    more = torch.tensor([[5, 6, 7]])
    with qm.reduce(model, METHODS["scope"]) as run, torch.no_grad():
        cache = held(model(**inputs))
        logits = model(input_ids=more, **past(cache)).logits
    given = shortened(model, inputs, run)
    n = given.pop("next")
    with torch.no_grad():
        place = torch.cat(
            [given["position_ids"], (n + torch.arange(3)).expand(*given["position_ids"].shape[:-1], 3)], -1
        )
        embeds = torch.cat([given["inputs_embeds"], model.get_input_embeddings()(more)], 1)
        hand = model.lm_head(text_of(model)(inputs_embeds=embeds, position_ids=place).last_hidden_state)[:, -3:]
    assert torch.allclose(logits, hand, atol=EXACT, rtol=EXACT)


def test_generation_without_a_cache_reduces_the_prompt_each_step() -> None:
    model = model_of("llava")
    inputs = prompt(model, ROWS)
    with qm.reduce(model, METHODS["scope"], layer=[0, 2]), torch.no_grad():
        texts = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)[:, -4:]
    with qm.reduce(model, qm.SCOPE(keep=0.4, alpha=0), layer=[0, 2]), torch.no_grad():
        cached = write(model, inputs, 4)
        fresh = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)[:, -4:]
    assert texts.shape == cached.shape
    assert torch.equal(cached, fresh)


def test_words_of_the_question_are_those_behind_the_image() -> None:
    model = model_of("llava")
    ids = torch.tensor([[BOS, 5, 6, 88, *[IMAGE] * 16, END, 7, 8, 9, 2, 10]])
    inputs = {"input_ids": ids, **{k: v for k, v in prompt(model, [[0]]).items() if k == "pixel_values"}}
    with qm.reduce(model, METHODS["trimtokenator"]) as run, torch.no_grad():
        model(**inputs)
    words = model.get_input_embeddings()(torch.tensor([END, 7, 8, 9, 10]))
    assert torch.equal(run.images[0].view.evidence.text[0], words)
    ids = torch.tensor([[BOS, 5, 6, *[IMAGE] * 16, 2]])
    with qm.reduce(model, METHODS["trimtokenator"]) as run, torch.no_grad():
        model(**{**inputs, "input_ids": ids})
    assert torch.equal(run.images[0].view.evidence.text[0], model.get_input_embeddings()(torch.tensor([5, 6])))


@pytest.mark.parametrize(("family", "name", "layer"), [("llava", "scope", 0), ("qwen2_vl", "quickmerge", [0, 1])])
def test_threads_share_a_run(family: str, name: str, layer: Any) -> None:
    model = model_of(family)
    asked = [prompt(model, [[which]], seed=which) for which in (0, 1, 2)]

    def work(i: int) -> Tensor:
        return write(model, asked[i], 4)

    with qm.reduce(model, METHODS[name], layer):
        wanted = [work(i) for i in range(3)]
    found: dict[int, list[Tensor]] = {i: [] for i in range(3)}
    start = threading.Barrier(3)
    with qm.reduce(model, METHODS[name], layer):

        def loop(i: int) -> None:
            start.wait()
            for _ in range(4):
                found[i].append(work(i))

        threads = [threading.Thread(target=loop, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(3):
        assert len(found[i]) == 4, "a thread died"
        assert all(torch.equal(each, wanted[i]) for each in found[i])


# Where nothing is shortened behind the projector, Qwen2-VL counts by what it keeps of the last prompt, in its order.
@pytest.mark.parametrize(("family", "layer"), [("llava", 0), ("llava", 1), ("qwen2_vl", 0)])
def test_a_copied_cache_whose_rows_moved_goes_on_as_rows_of_their_own(family: str, layer: int) -> None:
    model = model_of(family)
    asked = [row_of(model, [[0], [1]], i) for i in range(2)]
    both = prompt(model, [[0], [1]])
    new = torch.tensor([[5], [6]])
    with torch.no_grad(), qm.reduce(model, METHODS["scope" if layer == 0 else "quickmerge"], layer):
        wanted = []
        for i, inputs in enumerate(asked):
            cache = held(model(**inputs))
            seen = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
            wanted.append(model(new[i : i + 1], attention_mask=seen, **past(cache)).logits)
        cache = copy.deepcopy(held(model(**both)))
        cache.reorder_cache(torch.tensor([1, 0]))
        seen = torch.cat([both["attention_mask"].flip(0), torch.ones(2, 1, dtype=torch.long)], 1)
        found = model(new.flip(0), attention_mask=seen, **past(cache)).logits.flip(0)
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-4)
