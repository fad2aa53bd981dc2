"""What is told beforehand is what a run then does; and what does not fit a model is told in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import vlm_zoo
from decoding_samples import tiny
from gumiho_samples import heads
from hosts_zoo import build, generate, tokens
from recipe_samples import prior
from transformers import ViTConfig, ViTModel

import quickmerge as qm

N = 200
TEXTS: dict[str, qm.Merge] = {
    "prefix": qm.Merge(qm.QuickMerge(keep=0.4), mode=qm.Prefix(min_tokens=0)),
    "twice": qm.Merge(qm.Uniform(keep=0.3), (1, 3), qm.Prefix(min_tokens=0, recent=3)),
    "schedule": qm.Merge(qm.ToMe(keep=0.3), qm.Schedule((1, 2), 0.5), qm.Prefix(min_tokens=0)),
    "count": qm.Merge(qm.QuickMerge(keep=qm.Count(50)), 2, qm.Prefix(min_tokens=0)),
    "protected": qm.Merge(qm.QuickMerge(keep=0.01), 2, qm.Prefix(min_tokens=0)),
    "short": qm.Merge(qm.QuickMerge(keep=0.4), 2),
    "all": qm.Merge(qm.QuickMerge(keep=1.0), 2, qm.Prefix(min_tokens=0)),
}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", TEXTS)
def test_tokens_and_cache_of_a_prompt_are_those_that_a_run_counts(family: str, name: str) -> None:
    model, recipe = build(family), qm.Recipe(merge=TEXTS[name])
    with qm.apply(model, recipe) as run:
        generate(model, tokens(1, N), 1)
    stats, told = run.summary()["merge"], recipe.told(model, N)
    assert list(told.tokens_per_layer or ()) == stats.tokens_per_layer
    assert told.cache_bytes == stats.prompt_cache_bytes and told.cache_bytes_full == stats.prompt_cache_bytes_full
    assert told.flops is not None
    assert (told.flops < told.flops_full) == (stats.tokens_kept < N)
    assert told.lossless == (name == "all")


def test_the_meta_device_does() -> None:
    recipe = qm.Recipe(merge=TEXTS["twice"], attention=qm.Multipole(), decoding=qm.PromptLookup())
    model = build("llama")
    assert str(recipe.told(model.to("meta"), N)) == str(recipe.told(build("llama"), N))


def test_caches_of_block_causal_mode() -> None:
    model = build("llama")
    recipe = qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.5, pool=1, merge=0), 1, qm.BlockCausal(chunk=16, window=8)))
    with qm.apply(model, recipe) as run:
        generate(model, tokens(1, N), 1)
    stats, told = run.summary()["merge"], recipe.told(model, N)
    assert told.cache_bytes == stats.prompt_cache_bytes
    assert list(told.tokens_per_layer or ()) == [N] * 4 and told.flops == told.flops_full and not told.lossless


def test_rows_that_multipole_attention_reads() -> None:
    model = build("llama")
    recipe = qm.Recipe(attention=qm.Multipole(budget=32, sink=2, interval=8, block=64, ratio=0.25))
    with qm.apply(model, recipe) as run:
        generate(model, tokens(1, N), 12)
    read = run.summary()["attention"].rows_read
    line = next(line for line in recipe.told(model, N).effects[0].lines if "a new token reads about" in line)
    told = float(line.split("about ")[1].split()[0])
    assert told == pytest.approx(read / 2, rel=0.05)  # of each key that is read its value is, too
    effect = recipe.told(model, N).effects[0]
    fewer = int(next(line for line in effect.lines if line.startswith("reads less from")).split()[3])
    for n, more in ((fewer - 1, False), (fewer, True)):
        exact = 2 + 1.5 * 8 + 32
        assert (exact + 0.25 * max(0, n - 2 - 12) < n) is more
    # It costs more than what it reads, so it pays later than it reads less.
    pays = effect.pays_from
    assert pays is not None and pays > fewer and recipe.told(model, pays).effects[0].pays_from == pays
    least = qm.Recipe(attention=qm.Multipole(min_tokens=2 * pays)).told(model, N).effects[0]
    assert least.pays_from == 2 * pays and f"rows of fewer than {2 * pays} tokens are read in full" in least.lines


def test_where_merging_pays_it_saves_flops() -> None:
    model, recipe = build("llama"), qm.Recipe(merge=TEXTS["prefix"])
    pays = recipe.told(model, N).effects[0].pays_from
    assert pays is not None
    for n, saves in ((pays - 1, False), (pays, True)):
        told = recipe.told(model, n)
        assert told.flops is not None and (told.flops < told.flops_full) is saves
    usual = qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.4)))
    assert usual.told(model, N).effects[0].pays_from == 256


@pytest.mark.parametrize("budget", [qm.Mass(0.5), qm.Entropy()])
def test_what_depends_on_the_text_is_said_to(budget: Any) -> None:
    told = qm.Recipe(merge=qm.QuickMerge(keep=budget)).told(build("llama"), N)
    assert told.tokens_per_layer is None and told.flops is None and told.cache_bytes is None
    assert "depends on the text" in str(told)
    chunked = qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=budget), mode=qm.BlockCausal())).told(build("llama"), N)
    assert "depends on the text" in str(chunked)


def test_speculation_is_lossless_but_for_one_way() -> None:
    model = tiny()
    assert qm.Recipe(decoding=qm.PromptLookup()).told(model, N).lossless
    network = heads(model).network
    told = {fta: qm.Recipe(decoding=qm.Gumiho(network, fta=fta)).told(model, N) for fta in ("off", "reference")}
    assert told["off"].lossless and not told["reference"].lossless
    assert "lossless" in str(told["off"]) and "lossy" in str(told["reference"])


def test_nothing_is_told_of_an_empty_recipe() -> None:
    told = qm.Recipe().told(build("llama"), N)
    assert told.lossless and told.flops == told.flops_full and "nothing is done" in str(told)


@pytest.mark.parametrize("keep", [0.5, qm.Ratio(0.5), qm.Count(3)])
@pytest.mark.parametrize("layer", [None, 0, (0, 2)])
def test_visual_tokens(layer: Any, keep: Any) -> None:
    model = vlm_zoo.model_of("llava")
    inputs = vlm_zoo.prompt(model, [[0]])
    reducer = qm.ToMe(keep=keep)
    recipe = qm.Recipe(visual=qm.Merge(reducer, layer))
    with qm.apply(model, recipe) as run:
        vlm_zoo.write(model, inputs, 1)
    stats = run.summary()["visual"]
    n, visual = inputs["input_ids"].shape[1], round(stats.visual_in)
    told = recipe.told(model, n, visual=visual)
    assert list(told.tokens_per_layer or ()) == stats.tokens_per_layer
    assert recipe.told(model, n).tokens_per_layer is None


def test_text_above_visual_tokens() -> None:
    model = vlm_zoo.model_of("llava")
    inputs = vlm_zoo.prompt(model, [[1, 2]])
    text = qm.Merge(qm.QuickMerge(keep=0.6), 2, qm.Prefix(min_tokens=0, recent=2))
    recipe = qm.Recipe(merge=text, visual=qm.ToMe(keep=qm.Count(3)))
    with qm.apply(model, recipe) as run:
        vlm_zoo.write(model, inputs, 1)
    stats = run.summary()["merge+visual"]
    n, visual = inputs["input_ids"].shape[1], round(stats.visual_in)
    one = qm.Recipe(merge=text, visual=qm.ToMe(keep=qm.Count(6)))  # of two images, each with a budget of its own
    assert list(one.told(model, n, visual=visual).tokens_per_layer or ()) == stats.tokens_per_layer


def vit() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    return ViTModel(ViTConfig(image_size=32, patch_size=4, **sizes)).eval()


TOWERS = [
    qm.Merge(qm.ToMe(keep=0.6)),
    qm.Merge(qm.ToMe(), qm.Removal(5)),
    qm.Merge(qm.QuickMergeVision(keep=0.5), (0, 2)),
    qm.Merge(qm.ToFu(keep=qm.Count(20)), 1),
    qm.Merge(qm.ToFu(keep=0.26), (1, 2)),
    qm.Merge(qm.ToFu(keep=qm.Ratio(0.26)), (1, 2)),
]


@pytest.mark.parametrize("tower", TOWERS)
def test_patches_of_a_vision_transformer(tower: qm.Merge) -> None:
    model, recipe = vit(), qm.Recipe(tower=tower)
    with qm.apply(model, recipe) as run:
        model(torch.randn(1, 3, 32, 32))
    told = recipe.told(model)
    assert list(told.tokens_per_layer or ()) == run.summary()["tower"].tokens_per_block
    assert told.tokens == 65 and told.flops is not None and told.flops < told.flops_full and told.cache_bytes is None


def test_as_dict_is_json() -> None:
    recipe = qm.Recipe(merge=TEXTS["twice"], attention=qm.Multipole(coarse=0.01), decoding=qm.PromptLookup())
    data = json.loads(json.dumps(recipe.told(build("llama"), N).as_dict()))
    assert [effect["name"] for effect in data["effects"]] == ["merge", "attention", "decoding"]
    assert data["tokens"] == N and not data["lossless"]


# What does not fit --------------------------------------------------------------------------------------------------

WRONG: list[tuple[Callable[[], Any], Callable[[], qm.Recipe], str]] = [
    (lambda: build("llama"), lambda: qm.Recipe(merge=qm.Merge(qm.QuickMerge(), 4)), r"layer must lie in 1\.\.3"),
    (lambda: build("llama"), lambda: qm.Recipe(tower=qm.ToMe()), "tower must be left out for LlamaForCausalLM"),
    (lambda: build("llama"), prior, "prior was trained for another model"),
    (lambda: build("qwen2"), lambda: qm.Recipe(decoding=heads(tiny())), "the draft heads"),
    (vit, lambda: qm.Recipe(visual=qm.SCOPE()), "visual must be left out for ViTModel"),
    (
        lambda: build("mistral"),
        lambda: qm.Recipe(attention=qm.Multipole()),
        "needs full attention in some block",
    ),
]


@pytest.mark.parametrize(("make", "recipe", "message"), WRONG)
def test_check_raises_what_applying_would(
    make: Callable[[], Any], recipe: Callable[[], qm.Recipe], message: str, untouched: Callable[[Any], Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe().check(untouched(make()))


def test_check_leaves_a_model_that_fits_as_it_was(untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    qm.Recipe(merge=TEXTS["twice"], attention=qm.Multipole(), decoding=qm.PromptLookup()).check(model)
    assert qm.detach(model) == 0


@pytest.mark.parametrize(
    ("tokens", "visual", "message"), [(0, None, "tokens must be"), (9, 10, "visual must be at most")]
)
def test_numbers_out_of_range(tokens: int, visual: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qm.Recipe().told(build("llama"), tokens, visual=visual)
