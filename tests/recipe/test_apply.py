"""What a recipe does to a model is what its ingredients do; and outside, the model is as it was."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import vlm_zoo
from decoding_samples import endless, prompts, tiny
from gumiho_samples import heads
from hosts_zoo import build, generate, tokens
from torch import Tensor
from transformers import ViTConfig, ViTModel

import quickmerge as qm
from quickmerge.errors import QuickmergeWarning
from quickmerge.merge.attach import reduce_places

TEXT = qm.Merge(qm.QuickMerge(keep=0.5), 2, qm.Prefix(min_tokens=0))
CAUSAL = qm.Merge(qm.QuickMerge(keep=0.5, pool=1, merge=0), 1, qm.BlockCausal(chunk=8, window=4))
ATTENTION = qm.Multipole(budget=8, sink=2, interval=4, block=16)
WAYS: dict[str, tuple[qm.Recipe, Callable[[Any], list[Any]]]] = {
    "nothing": (qm.Recipe(), lambda model: []),
    "prefix": (qm.Recipe(merge=TEXT), lambda model: [qm.reduce(model, TEXT.reducer, 2, mode=qm.Prefix(min_tokens=0))]),
    "block_causal": (
        qm.Recipe(merge=CAUSAL),
        lambda model: [qm.reduce(model, CAUSAL.reducer, 1, mode=qm.BlockCausal(chunk=8, window=4))],
    ),
    "attention": (qm.Recipe(attention=ATTENTION), lambda model: [qm.multipole(model, ATTENTION)]),
    "both": (
        qm.Recipe(merge=TEXT, attention=ATTENTION),
        lambda model: [qm.reduce(model, TEXT.reducer, 2, min_tokens=0), qm.multipole(model, ATTENTION)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_recipe_does_what_its_ingredients_do(way: str, untouched: Callable[[Any], Any]) -> None:
    model, ids = untouched(build("llama")), tokens(1, 80)
    recipe, ingredients = WAYS[way]
    plain = generate(model, ids, 6)
    runs = [run.attach() for run in ingredients(model)]
    wanted = generate(model, ids, 6)
    for run in runs:
        run.detach()
    with qm.apply(model, recipe) as run:
        assert run.attached
        found = generate(model, ids, 6)
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(torch.equal(one, other) for one, other in zip(found.logits, wanted.logits, strict=True))
    again = generate(model, ids, 6)
    assert all(torch.equal(one, other) for one, other in zip(again.logits, plain.logits, strict=True))
    assert way == "nothing" or not torch.equal(found.logits[-1], plain.logits[-1])
    assert len(run.summary().of) == len(runs)


# Decoding -----------------------------------------------------------------------------------------------------------


def repeating(rows: int = 1) -> dict[str, Tensor]:
    """Prompts in which lookup finds something."""
    ids = tokens(rows, 12).repeat(1, 3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("rows", [1, 3])
def test_plain_generate_is_speculative_inside_and_writes_the_same_text(rows: int) -> None:
    model, inputs = tiny(), repeating(rows)
    wanted = endless(model, inputs, 24)
    with qm.apply(model, qm.Recipe(decoding=qm.Speculation(qm.PromptLookup(ngram=2), nodes=8, tree=8))) as run:
        assert str(run.summary()) == "decoding: nothing has been generated yet"
        found = endless(model, inputs, 24)
    assert torch.equal(found, wanted)
    stats = run.summary()["decoding"]
    assert stats.rows == rows and stats.tokens == 24 * rows and stats.lossless
    assert stats.nodes > stats.row_passes  # something was drafted
    assert run.summary().as_dict()["decoding"]["tokens"] == stats.tokens
    assert str(run.summary()).startswith(f"decoding: {stats.tokens} tokens in {stats.passes} passes")


DRAFTS = qm.Speculation(qm.PromptLookup(ngram=2), tree=6)
TOGETHER = {
    "merge": qm.Recipe(merge=TEXT),
    "attention": qm.Recipe(attention=ATTENTION),
    "both": qm.Recipe(merge=TEXT, attention=ATTENTION),
}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", TOGETHER)
def test_speculation_writes_what_the_other_ingredients_write_without_it(
    name: str, family: str, untouched: Callable[[Any], Any]
) -> None:
    model, recipe = untouched(build(family, dtype=torch.float64)), TOGETHER[name]
    ids = tokens(2, 12).repeat(1, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with qm.apply(model, recipe):
        wanted = endless(model, inputs, 20)
    with qm.apply(model, replace(recipe, decoding=DRAFTS)) as run:
        assert torch.equal(endless(model, inputs, 20), wanted)
    assert run.summary()["decoding"].nodes > run.summary()["decoding"].row_passes
    assert list(run.summary().of) == [*(["merge"] * (name != "attention")), *(["attention"] * (name != "merge")),
                                      "decoding"]  # fmt: skip


@pytest.mark.parametrize("other", [{"decoding": DRAFTS}, {"attention": ATTENTION}], ids=["decoding", "attention"])
def test_what_does_not_go_with_block_causal_mode_is_refused_when_the_recipe_is_made(other: dict[str, Any]) -> None:
    (name,) = other
    with pytest.raises(qm.QuickmergeError, match=f"{name} must be left out beside merge in block_causal mode"):
        qm.Recipe(merge=CAUSAL, **other)


def test_heads_draft_in_plain_generate(untouched: Callable[[Any], Any]) -> None:
    model, inputs = untouched(tiny()), prompts([9, 5])
    wanted = endless(model, inputs, 10)
    with qm.apply(model, qm.Recipe(decoding=qm.Speculation(heads(model), tree=6))) as run:
        assert torch.equal(endless(model, inputs, 10), wanted)
        assert torch.equal(endless(model, inputs, 10), wanted)
    assert run.summary()["decoding"].nodes > run.summary()["decoding"].row_passes


def test_samples_are_those_of_speculation_by_argument() -> None:
    model, inputs = tiny(), repeating()
    engine = qm.SpeculativeDecoding(qm.PromptLookup(), tree=8)
    torch.manual_seed(3)
    wanted = endless(model, inputs, 12, do_sample=True, custom_generate=engine)
    with qm.apply(model, qm.Recipe(decoding=qm.Speculation(qm.PromptLookup(), tree=8))):
        torch.manual_seed(3)
        assert torch.equal(endless(model, inputs, 12, do_sample=True), wanted)


def test_arguments_by_their_place_are_kept() -> None:
    model, inputs = tiny(), repeating()
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=7, do_sample=False, eos_token_id=None)
    wanted = model.generate(inputs["input_ids"], config)
    with qm.apply(model, qm.Recipe(decoding=qm.PromptLookup())):
        assert torch.equal(model.generate(inputs["input_ids"], config), wanted)


REPLACED: dict[str, Any] = {
    "custom_generate": qm.SpeculativeDecoding(qm.PromptLookup()),
    "assistant_model": tiny(),
    "prompt_lookup_num_tokens": 3,
}


@pytest.mark.parametrize("name", REPLACED)
def test_another_way_to_decode_is_refused_and_without_decoding_kept(name: str) -> None:
    model, inputs, way = tiny(), repeating(), {name: REPLACED[name]}
    with (
        qm.apply(model, qm.Recipe(decoding=qm.PromptLookup())),
        pytest.raises(
            qm.QuickmergeError, match=f"{name} must be left out inside a recipe with decoding, whose PromptL"
        ),
    ):
        endless(model, inputs, 8, **way)
    wanted = endless(model, inputs, 8)
    with qm.apply(model, qm.Recipe()):
        assert torch.equal(endless(model, inputs, 8, **way), wanted)


def test_threads_generate_at_once_each_with_a_drafter_of_its_own() -> None:
    model = tiny()
    given = [repeating(rows) for rows in (1, 2, 3, 4)]
    model.generation_config.eos_token_id, kept = None, model.generation_config.eos_token_id
    wanted = [model.generate(**inputs, max_new_tokens=30, do_sample=False) for inputs in given]
    found: list[Any] = [None] * len(given)
    rows: list[int] = [0] * len(given)
    begin = threading.Barrier(len(given))

    def write(i: int) -> None:
        begin.wait()
        found[i] = model.generate(**given[i], max_new_tokens=30, do_sample=False)
        rows[i] = run.summary()["decoding"].rows

    try:
        with qm.apply(model, qm.Recipe(decoding=qm.Speculation(qm.PromptLookup(ngram=2), tree=8))) as run:
            threads = [threading.Thread(target=write, args=(i,)) for i in range(len(given))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        model.generation_config.eos_token_id = kept
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert rows == [1, 2, 3, 4]


def test_generate_may_be_called_within_generate() -> None:
    model, inputs = tiny(), repeating()
    inner: list[Tensor] = []

    def more(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if not inner:
            inner.append(endless(model, inputs, 5))
        return torch.zeros(len(ids), dtype=torch.bool)

    wanted, short = endless(model, inputs, 12), endless(model, inputs, 5)
    with qm.apply(model, qm.Recipe(decoding=qm.PromptLookup())):
        assert torch.equal(endless(model, inputs, 12, stopping_criteria=[more]), wanted)
    assert torch.equal(inner[0], short)


def test_the_drafter_of_a_recipe_is_left_alone() -> None:
    drafter = qm.PromptLookup()
    before = copy.deepcopy(vars(drafter))
    model = tiny()
    with qm.apply(model, qm.Recipe(decoding=drafter)), qm.apply(build("qwen2"), qm.Recipe(decoding=drafter)):
        endless(model, repeating(), 5)
    assert vars(drafter) == before


# Beginning and ending -----------------------------------------------------------------------------------------------

EVERY = qm.Recipe(merge=TEXT, attention=ATTENTION, decoding=qm.PromptLookup())


def test_detach_leaves_a_recipe_as_one_run(untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    before = model.generate
    run = qm.apply(model, EVERY).attach()
    assert qm.detach(model) == 1
    assert not run.attached and not any(part.attached for part in run.parts.values())
    assert "generate" not in vars(model) and model.generate == before
    with run:  # it may be entered again
        assert run.attached
    assert qm.detach(model) == 0


def test_where_one_ingredient_refuses_none_is_begun(untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    run = qm.apply(model, EVERY)
    with (
        qm.reduce(model, qm.Uniform(keep=0.5), mode="block_causal"),
        pytest.raises(qm.QuickmergeError, match="is already inside a quickmerge run"),
    ):
        run.attach()
    assert not run.attached and not any(part.attached for part in run.parts.values())
    assert qm.detach(model) == 0


def test_a_recipe_is_entered_once(untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    for recipe in (qm.Recipe(), EVERY):
        with (
            qm.apply(model, recipe) as run,
            pytest.raises(qm.QuickmergeError, match="already inside a quickmerge run"),
        ):
            run.attach()


def test_copies_and_pickles_made_inside_are_of_the_plain_model() -> None:
    model, ids = build("llama"), tokens(1, 60)
    plain = generate(model, ids, 3)
    with qm.apply(model, EVERY):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        assert "generate" not in vars(each)
        assert torch.equal(generate(each, ids, 3).logits[-1], plain.logits[-1])


def test_a_run_that_is_never_entered_warns_once_and_an_entered_one_never() -> None:
    model = build("llama")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with qm.apply(model, EVERY):
            pass
        gc.collect()
        assert not [each for each in told if each.category is QuickmergeWarning]
        qm.apply(model, EVERY)
        gc.collect()
    messages = [str(each.message) for each in told if each.category is QuickmergeWarning]
    assert len(messages) == 1 and messages[0].startswith("a run made by quickmerge.apply on LlamaForCausalLM was never")


# Places of a model --------------------------------------------------------------------------------------------------


def vit() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    return ViTModel(ViTConfig(image_size=32, patch_size=4, **sizes)).eval()


def test_a_vision_transformer_is_a_tower() -> None:
    model, images = vit(), torch.randn(2, 3, 32, 32)
    place = qm.Merge(qm.ToMe(keep=0.5), qm.Removal(8), unmerge=True)
    with qm.reduce(model, place.reducer, qm.Removal(8), unmerge=True):
        wanted = model(images).last_hidden_state
    with qm.apply(model, qm.Recipe(tower=place)) as run:
        found = model(images).last_hidden_state
    assert torch.equal(found, wanted) and found.shape[1] == 65
    assert run.summary()["tower"].tokens_per_block[-1] < 65


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_visual_tokens_of_a_vision_language_model(family: str) -> None:
    model = vlm_zoo.model_of(family)
    inputs = vlm_zoo.prompt(model, [[0], [1, 2]])
    reducer = qm.ToMe(keep=qm.Count(3))
    with qm.reduce(model, reducer, positions="kept"):
        wanted = vlm_zoo.write(model, inputs)
    with qm.apply(model, qm.Recipe(visual=reducer)) as run:
        found = vlm_zoo.write(model, inputs)
    assert torch.equal(found, wanted)
    assert run.summary()["visual"].visual_kept < run.summary()["visual"].visual_in


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_text_and_visual_tokens_of_a_vision_language_model(family: str) -> None:
    model = vlm_zoo.model_of(family)
    inputs = vlm_zoo.prompt(model, [[0], [1, 2]])
    visual, text = qm.Merge(qm.ToMe(keep=0.5)), qm.Merge(qm.QuickMerge(keep=0.6), 2, qm.Prefix(min_tokens=0, recent=2))
    with reduce_places(model, text=text, visual=visual):
        wanted = vlm_zoo.write(model, inputs)
    with qm.apply(model, qm.Recipe(merge=text, visual=visual, attention=ATTENTION)) as run:
        vlm_zoo.write(model, inputs)
    assert list(run.summary().of) == ["merge+visual", "attention"]
    with qm.apply(model, qm.Recipe(merge=text, visual=visual)) as run:
        assert torch.equal(vlm_zoo.write(model, inputs), wanted)
    read = run.summary()["merge+visual"].tokens_per_layer
    assert run.summary()["merge+visual"].tokens_in > read[0] == read[1] > read[2] == read[3]


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_everything_together_in_a_vision_language_model(family: str) -> None:
    model = vlm_zoo.model_of(family)
    inputs = vlm_zoo.prompt(model, [[0], [1, 2]])
    text = qm.Merge(qm.QuickMerge(keep=0.6), 2, qm.Prefix(min_tokens=0, recent=2))
    tower = qm.Merge(qm.ToMe(keep=0.6), unmerge=family == "idefics3")
    recipe = qm.Recipe(merge=text, visual=qm.ToMe(keep=0.5), tower=tower, attention=ATTENTION)
    with qm.apply(model, recipe):
        wanted = vlm_zoo.write(model, inputs)
    with qm.apply(model, replace(recipe, decoding=DRAFTS)) as run:
        assert torch.equal(vlm_zoo.write(model, inputs), wanted)
    assert list(run.summary().of) == ["merge+visual+tower", "attention", "decoding"]


def test_speculation_and_multipole_of_a_vision_language_model() -> None:
    model = vlm_zoo.model_of("llava")
    inputs = vlm_zoo.prompt(model, [[0], []])
    wanted = vlm_zoo.write(model, inputs)
    with qm.apply(model, qm.Recipe(decoding=qm.PromptLookup())) as run:
        assert torch.equal(vlm_zoo.write(model, inputs), wanted)
    assert run.summary()["decoding"].rows == 2
    with qm.apply(model, qm.Recipe(attention=ATTENTION)) as run:
        vlm_zoo.write(model, inputs)
    assert run.summary()["attention"].tokens


MISPLACED: list[tuple[Callable[[], Any], qm.Recipe, str]] = [
    (vit, qm.Recipe(merge=qm.QuickMerge()), "merge must be left out for ViTModel, a vision transformer: give tower"),
    (lambda: build("llama"), qm.Recipe(visual=qm.SCOPE()), "visual must be left out for LlamaForCausalLM, a language"),
    (lambda: build("llama"), qm.Recipe(tower=qm.ToMe()), "tower must be left out for LlamaForCausalLM"),
    (vit, qm.Recipe(attention=qm.Multipole()), "ViTModel .*is not supported"),
    (vit, qm.Recipe(decoding=qm.PromptLookup()), "decoding is for models that generate text, got ViTModel"),
    (lambda: build("llama"), qm.Recipe(merge=qm.Merge(qm.QuickMerge(), 9)), "layer must lie in 1..3"),
    (lambda: build("llama"), qm.Recipe(attention=qm.Multipole(first=9)), "first must be at most 3"),
    (lambda: build("llama"), qm.Recipe(decoding=heads(tiny())), "the draft heads"),
    (lambda: "gpt", qm.Recipe(), "model must be a transformers PreTrainedModel.*got 'gpt'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "recipe", "message"), MISPLACED)
def test_what_does_not_fit_the_model_is_one_sentence(make: Callable[[], Any], recipe: qm.Recipe, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qm.apply(make(), recipe)


def test_what_is_no_recipe_is_refused() -> None:
    with pytest.raises(qm.QuickmergeError, match=r"recipe must be a Recipe such as .*got QuickMerge"):
        qm.apply(build("llama"), qm.QuickMerge())  # type: ignore[arg-type]
