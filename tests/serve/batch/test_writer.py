"""Rows in batches are answered as each alone, by the model and recipe that a user would call himself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from batch_samples import prompts, save_tiny

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.recipe.answer import answer
from quickmerge.serve.batch import Row, Writer, WriterSettings
from quickmerge.serve.batch.draws import row_seed, sampling
from quickmerge.serve.batch.writer import check

PREFIX = qm.Prefix(min_tokens=16)
RECIPES: dict[str, qm.Recipe] = {
    "nothing": qm.Recipe(),
    "merge": qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.4), 1, PREFIX)),
    "chunks": qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.5, pool=1), 1, qm.BlockCausal(chunk=8))),
    "cache": qm.Recipe(cache=qm.SnapKV(keep=0.3, min_tokens=16)),
    "both": qm.Recipe(
        merge=qm.Merge(qm.QuickMerge(keep=0.6), 1, PREFIX),
        cache=qm.SnapKV(keep=0.5, min_tokens=16, heads="adaptive"),
    ),
    "attention": qm.Recipe(attention=qm.Multipole(budget=32)),
    "drafts": qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.4), 1, PREFIX), decoding=qm.PromptLookup()),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def rows(count: int = 6) -> list[Row]:
    return [Row(i, f"r{i}", f"h{i}", text) for i, text in enumerate(prompts(count))]


def made(tiny: Path, recipe: qm.Recipe, **more: Any) -> Writer:
    return Writer(WriterSettings(str(tiny), recipe, max_new_tokens=12, dtype="float64", **more))


def by_row(results: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    assert not [each for each in results if "error" in each]
    found = {each["index"]: {k: v for k, v in each.items() if k != "seconds"} for each in results}
    assert len(found) == len(results)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_batch_equals_what_each_prompt_gives_alone(tiny: Path, name: str) -> None:
    recipe = RECIPES[name]
    found = by_row(made(tiny, recipe).write(rows()))
    model, tokenizer = qm.load(tiny, dtype="float64")
    for row in rows():
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row.prompt}], tokenize=False, add_generation_prompt=True
        )
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        ids = inputs["input_ids"]
        with torch.inference_mode(), qm.apply(model, recipe) as run:
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
            )[0, ids.shape[1] :]
        one = found[row.index]
        assert one["text"] == tokenizer.decode(out, skip_special_tokens=True).strip()
        assert one["tokens_written"] == len(out)
        assert one["finish_reason"] == ("stop" if int(out[-1]) == 1 else "length")
        assert one["tokens_read"] == ids.shape[1]
        layers = next((s.tokens_per_layer for s in run.summary().of.values() if hasattr(s, "tokens_per_layer")), None)
        if recipe.evictor is None and layers:
            assert one["tokens_kept"] == pytest.approx(sum(layers) / len(layers), rel=1e-5)
        elif layers:
            stats = run.summary()["cache" if "cache" in run.summary() else "merge+cache"]
            # of whole entries alone; what a head has to know of each is memory too
            entry = 2 * 12 * 8 * 2 * 4
            assert one["tokens_kept"] * entry <= stats.prompt_cache_bytes <= one["tokens_kept"] * entry * 1.35
    if name in ("merge", "cache", "both", "chunks"):
        assert sum(each["tokens_kept"] for each in found.values()) < sum(each["tokens_read"] for each in found.values())


@pytest.mark.parametrize("name", ["merge", "drafts"])
def test_a_sample_depends_on_its_row_alone(tiny: Path, name: str) -> None:
    writer = made(tiny, RECIPES[name], sample=True, temperature=1.3, seed=3)
    together = by_row(writer.write(rows()))
    apart = by_row([each for row in reversed(rows()) for each in writer.write([row])])
    assert together == apart
    other = by_row(made(tiny, RECIPES[name], sample=True, temperature=1.3, seed=4).write(rows()))
    assert [other[i]["text"] for i in other] != [together[i]["text"] for i in other]


def test_the_same_prompt_twice_is_sampled_twice(tiny: Path) -> None:
    twins = [Row(i, str(i), "same", prompts(1)[0]) for i in range(4)]
    found = by_row(made(tiny, qm.Recipe(), sample=True, temperature=1.3).write(twins))
    assert len({each["text"] for each in found.values()}) == 4
    assert len({row_seed(0, i) for i in range(1000)} | {row_seed(1, i) for i in range(1000)}) == 2000


@pytest.mark.parametrize(
    "given", [{}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.6, "top_k": 0}, {"min_p": 0.2}, {"typical_p": 0.5}]
)
def test_what_is_drawn_from_is_what_generate_draws_from(tiny: Path, given: dict[str, Any]) -> None:
    model, _ = qm.load(tiny, dtype="float64")
    model.generation_config = type(model.generation_config)(eos_token_id=1, pad_token_id=0, **given)
    ids = torch.randint(5, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    wanted = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=1, output_scores=True,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    ours = sampling(model.generation_config, None)(ids, wanted.logits[0].clone())
    assert torch.equal(ours, wanted.scores[0].to(ours.dtype))


def test_only_the_document_is_merged(tiny: Path) -> None:
    recipe = RECIPES["merge"]
    texts = prompts(4, 40, 90)
    asked = [Row(i, str(i), str(i), "What is it?", text) for i, text in enumerate(texts)]
    found = by_row(made(tiny, recipe, documents=True).write(asked))
    model, tokenizer = qm.load(tiny, dtype="float64")
    for row in asked:
        alone = answer(model, tokenizer, str(row.document), row.prompt, recipe, max_new_tokens=12)
        assert found[row.index]["text"] == alone.text


def test_completion_goes_on_with_the_text(tiny: Path) -> None:
    found = by_row(made(tiny, qm.Recipe(), mode="completion").write(rows(2)))
    model, tokenizer = qm.load(tiny, dtype="float64")
    for row in rows(2):
        ids = tokenizer(row.prompt, return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert found[row.index]["text"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_bad_row_harms_no_other(tiny: Path) -> None:
    writer = made(tiny, RECIPES["merge"])
    alone = by_row(writer.write(rows(3)))
    bad = [Row(7, "long", "h", "word " * 2000), Row(8, "odd", "h", [{"role": "user", "content": "x"}])]
    found = {each["index"]: each for each in writer.write([rows(3)[0], *bad, *rows(3)[1:]])}
    assert "must fit the model's 1024 positions" in found[7]["error"]
    assert "text" in found[8]
    for index, each in alone.items():
        assert {k: v for k, v in found[index].items() if k != "seconds"} == each


def test_what_fails_in_a_batch_is_tried_row_by_row(tiny: Path) -> None:
    writer = made(tiny, RECIPES["merge"])
    whole = by_row(writer.write(rows(4)))
    real, poison = writer.model.generate, writer.tokenizer(rows(4)[2].prompt)["input_ids"][-3:]

    def generate(**given: Any) -> Any:
        for ids in given["input_ids"].tolist():
            if any(ids[i : i + 3] == poison for i in range(len(ids))):
                raise RuntimeError("out of something. And more")
        return real(**given)

    writer.model.generate = generate
    found = {each["index"]: each for each in writer.write(rows(4))}
    assert found[2]["error"] == "RuntimeError: out of something"
    for index in (0, 1, 3):
        assert {k: v for k, v in found[index].items() if k != "seconds"} == whole[index]


def test_messages_need_a_chat(tiny: Path) -> None:
    asked = [Row(0, "0", "h", [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])]
    assert "need the chat mode" in made(tiny, qm.Recipe(), mode="completion").write(asked)[0]["error"]
    writer = made(tiny, qm.Recipe())
    assert "text" in writer.write(asked)[0]
    writer.tokenizer.chat_template = None
    assert "with a chat template" in writer.write(asked)[0]["error"]


def test_a_recipe_for_another_model_is_refused_beforehand(tiny: Path) -> None:
    recipe = qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.4), 9))
    with pytest.raises((QuickmergeError, ValueError), match="layer"):
        check(WriterSettings(str(tiny), recipe))
    assert check(WriterSettings(str(tiny), RECIPES["merge"])).weights is not None
