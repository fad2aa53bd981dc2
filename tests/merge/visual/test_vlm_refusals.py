"""What a run on a vision-language model refuses, and in which words; and observing one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from caches import held, past
from vlm_zoo import METHODS, ROWS, build, model_of, prompt, row_of

import quickmerge as qm
from quickmerge.errors import UnsupportedModelError
from quickmerge.merge.run import observe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 4}, r"layer must be 0 \(behind the projector\) or rising blocks in 1..3, got 4"),
        ({"layer": -1}, "layer must be 0"),
        ({"layer": True}, "layer must be 0"),
        ({"layer": [2, 0]}, "layer must be 0"),
        ({"layer": []}, "layer must be 0"),
        ({"layer": qm.Schedule((1, 2))}, "layer must be a block or a list of blocks for visual tokens, got a Schedule"),
        ({"layer": qm.Removal(4)}, "layer must be a block or a list of blocks for visual tokens, got a Removal"),
        ({"mode": "block_causal"}, "mode must be left out for LlavaForConditionalGeneration"),
        ({"sinks": 2}, "sinks must be left out"),
        ({"protect": lambda ids: ids > 0}, "protect must be left out"),
        ({"unmerge": True}, "unmerge must be left out"),
        ({"positions": "new"}, "positions must be one of kept, consecutive, got 'new'"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qm.reduce(model_of("llava"), METHODS["scope"], **settings)


@pytest.mark.parametrize("reducer", [qm.QuickMerge(), qm.Truncate()])
def test_methods_for_prompts_are_refused(reducer: Any) -> None:
    with pytest.raises(ValueError, match=f"reducer {reducer.name} .* is not for visual tokens"):
        qm.reduce(model_of("llava"), reducer)
    with pytest.raises(ValueError, match="reducer must be a quickmerge reducer"):
        qm.reduce(model_of("llava"), "scope")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paddleocr_vl"])
def test_places_in_a_grid_stay(family: str) -> None:
    with pytest.raises(ValueError, match="positions must be 'kept' for"):
        qm.reduce(model_of(family), METHODS["scope"], positions="consecutive")


@pytest.mark.parametrize("reducer", [qm.SCOPE(), qm.TrimTokenator()])
def test_language_models_alone_have_no_visual_tokens(reducer: Any, tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match=f"reducer {reducer.name} is for .*, and LlamaForCausalLM is a language model"):
        qm.reduce(tiny_llama, reducer)
    with pytest.raises(ValueError, match="positions is for vision-language models"):
        qm.reduce(tiny_llama, qm.ToMe(), positions="consecutive")


def test_a_layer_in_front_of_the_tower_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="in front of every block of its vision tower"):
        qm.reduce(build("llava", layer=0), METHODS["scope"])


def test_one_run_at_a_time_tower_included() -> None:
    model = build("llava")
    with qm.reduce(model, METHODS["random"]):
        for reducer in (METHODS["scope"], METHODS["random"]):
            with pytest.raises(UnsupportedModelError, match="already inside a quickmerge run"):
                qm.reduce(model, reducer)
        with pytest.raises(UnsupportedModelError, match="already inside a quickmerge run"):
            qm.reduce(model.model.vision_tower, qm.ToMe(keep=0.5))
    with (
        qm.reduce(model.model.vision_tower, qm.ToMe(keep=0.5)),
        pytest.raises(UnsupportedModelError, match="already inside a quickmerge run"),
    ):
        qm.reduce(model, METHODS["random"])


def inputs_of(model: Any) -> dict[str, Any]:
    return row_of(model, ROWS, 0)


def assisted(model: Any) -> Any:
    return model.generate(**inputs_of(model), max_new_tokens=5, prompt_lookup_num_tokens=2)


def labels(model: Any) -> Any:
    return model(**inputs_of(model), labels=inputs_of(model)["input_ids"])


def static(model: Any) -> Any:
    return model.generate(**inputs_of(model), max_new_tokens=3, cache_implementation="static")


def square(model: Any) -> Any:
    n = inputs_of(model)["input_ids"].shape[1]
    return model(**{**inputs_of(model), "attention_mask": torch.ones(1, 1, n, n)})


def no_ids(model: Any) -> Any:
    inputs = inputs_of(model)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    return model(**inputs, inputs_embeds=embeds)


def elsewhere(model: Any) -> Any:
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    for layer in range(4):
        cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), layer)
    return model(input_ids=torch.tensor([[5]]), **past(cache))


def other_layer(model: Any) -> Any:
    return model(**inputs_of(model), vision_feature_layer=-1)


def turn(model: Any) -> Any:
    """A further turn that leaves out what stood in front of it."""
    cache = held(model(**inputs_of(model)))
    ids = torch.tensor([[5, 6]])
    return model(input_ids=ids, attention_mask=torch.ones(1, 7), **past(cache))


def cropped(model: Any) -> Any:
    cache = held(model(**inputs_of(model)))
    cache.crop(-7)
    return model(input_ids=torch.tensor([[5]]), **past(cache))


def more_rows(model: Any) -> Any:
    cache = held(model(**inputs_of(model)))
    return model(input_ids=torch.tensor([[5], [6]]), **past(cache))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (assisted, "prompt_lookup_num_tokens must be left out inside a quickmerge run"),
        (labels, "labels must be left out inside a quickmerge run"),
        (static, "must be a DynamicCache|attention_mask must be a 2-D"),
        (square, "attention_mask must be a 2-D padding mask"),
        (no_ids, "input_ids must be given with images"),
        (elsewhere, "was filled outside this run"),
        (other_layer, "vision_feature_layer must be the model's own inside a quickmerge run, -2, got -1"),
        (turn, "attention_mask must have a column for each of the"),
        (cropped, "crop can take back 0 tokens here"),
        (more_rows, "holds 1 rows that were merged here, got 2 rows"),
    ],
)
def test_what_a_run_cannot_follow_is_named(call: Callable[[Any], Any], message: str) -> None:
    model = model_of("llava")
    with qm.reduce(model, METHODS["scope"]), torch.no_grad(), pytest.raises(qm.QuickmergeError, match=message):
        call(model)


def test_pool_says_that_a_mosaic_is_no_grid() -> None:
    model = model_of("llava_next")
    inputs = row_of(model, [[0]], 0)
    match = r"grid must be \(T, H, W\)"
    with qm.reduce(model, qm.Pool(keep=0.5)), torch.no_grad(), pytest.raises(ValueError, match=match):
        model(**inputs)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_observing_changes_nothing_and_counts_the_same(family: str) -> None:
    model = model_of(family)
    inputs = prompt(model, ROWS)
    with torch.no_grad():
        logits = model(**inputs).logits
        with observe(model) as seen:
            assert torch.equal(model(**inputs).logits, logits)
        with qm.reduce(model, METHODS["random"]) as run:
            model(**inputs)
    dense, less = seen.summary(), run.summary()
    assert dense.visual_in == dense.visual_kept == less.visual_in
    assert (dense.tokens_in, dense.rows) == (less.tokens_in, less.rows)
    assert dense.cache_bytes == less.cache_bytes_full
    assert dense.tower_seconds > 0
    assert not model.model._forward_pre_hooks
