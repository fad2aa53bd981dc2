"""lm-eval with our model: its own command line and evaluator, tiny random models, and tasks in files of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts_zoo import build
from tokenizer_samples import byte_level

import quickmerge as qm
from quickmerge.errors import QuickmergeError

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from quickmerge.serve.harness import check_lengths, register  # noqa: E402
from quickmerge.serve.lm_eval import QuickmergeLM  # noqa: E402
from quickmerge.serve.needles import KINDS, process_results, samples  # noqa: E402

TEXT = "The cat sat on the mat, and the dog ran after the cat. Numbers such as 12, 345 and 6789 are cut into pieces. "
TASKS = {
    "writes": {
        "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["zzz"], "max_gen_toks": 9, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "chooses": {
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["cat", "dog ran", "12"],
        "doc_to_target": 1, "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "reads": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
}  # fmt: skip
LENGTHS = (300, 40, 420, 190)
"""Characters of the prompts: rows of a batch have to be padded."""
SHORT = {"min_tokens": 0, "layer": 1}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    docs = [{"q": (TEXT * 9)[7 * i : 7 * i + length], "a": "x"} for i, length in enumerate(LENGTHS)]
    (folder / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    for name, settings in TASKS.items():
        whole = {
            "task": name, "dataset_path": "json", "test_split": "test", "metadata": {"version": 1},
            "dataset_kwargs": {"data_files": {"test": str(folder / "docs.json")}}, **settings,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def tiny(dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    return build("llama", dtype=dtype, vocab_size=420, eos_token_id=0, bos_token_id=0, **more)


def made(recipe: Any = None, batch: int = 2, model: Any = None, **given: Any) -> QuickmergeLM:
    return QuickmergeLM(model or tiny(), recipe, tokenizer=byte_level(), batch_size=batch, **given)


def asked(lm: Any, tasks: Path, *names: str) -> dict[str, Any]:
    """All that the samples were answered, by task: texts, or log-likelihoods."""
    found = lm_eval.simple_evaluate(
        lm, tasks=list(names), task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    order = {name: sorted(found["samples"][name], key=lambda s: s["doc_id"]) for name in names}
    return {name: [sample["resps"] for sample in order[name]] for name in names} | {"config": found["config"]}


# The plain model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_without_a_recipe_and_with_one_that_keeps_all_it_is_lm_evals_own_bit_for_bit(tasks: Path, batch: int) -> None:
    model = tiny(torch.float32)
    own = asked(HFLM(model, tokenizer=byte_level(), batch_size=batch), tasks, *TASKS)
    for lm in (
        made(None, batch, model),
        made(None, batch, model, reducer="quickmerge", keep=1, **SHORT),
        made(qm.Recipe(), batch, model),
    ):
        found = asked(lm, tasks, *TASKS)
        assert {name: found[name] for name in TASKS} == {name: own[name] for name in TASKS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny(torch.float32).save_pretrained(path)
    byte_level().save_pretrained(path)
    return path


def commanded(*args: str, home: Path) -> subprocess.CompletedProcess[str]:
    """lm-eval's own command line, as our module starts it."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "quickmerge.lm_eval", *args],
        capture_output=True, text=True, check=False, timeout=300, env=env,
    )  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("results_*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.slow
def test_the_real_command_line_gives_the_numbers_of_hf_and_says_what_they_cost(
    tasks: Path, folder: Path, tmp_path: Path
) -> None:
    common = ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--device", "cpu", "--batch_size", "2"]
    found = {}
    for name, args in {
        "hf": f"pretrained={folder}",
        "quickmerge": f"pretrained={folder},reducer=quickmerge,keep=1,min_tokens=0,layer=1",
    }.items():
        out = tmp_path / name
        done = commanded("--model", name, "--model_args", args, *common, "--output_path", str(out), home=tmp_path)
        assert done.returncode == 0, done.stderr
        found[name] = results(out), done.stdout
    assert found["hf"][0]["results"] == found["quickmerge"][0]["results"]
    assert "What reading took" in found["quickmerge"][1] and "What reading took" not in found["hf"][1]
    told = found["quickmerge"][0]["config"]["quickmerge"]
    assert told["recipe"]["merge"]["reducer"]["keep"] == 1
    assert told["costs"]["by_task"]["writes"]["prompts"] == len(LENGTHS)
    assert told["costs"]["by_task"]["writes"]["cache_ratio"] == 1


# With a recipe ------------------------------------------------------------------------------------------------------


def written(model: Any, recipe: qm.Recipe, text: str) -> str:
    """What a user gets who applies the recipe and generates."""
    tokenizer = byte_level()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with qm.apply(model, recipe):
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False,
                             pad_token_id=0)  # fmt: skip
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


PREFIX = qm.Prefix(min_tokens=0, tokenizer=byte_level())
RECIPES = {
    "prefix": qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.3), 1, PREFIX)),
    "block-causal": qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.3), 1, qm.BlockCausal(chunk=16, window=8))),
    "attention": qm.Recipe(attention=qm.Multipole(budget=16, sink=2, interval=16, block=64)),
    "cache": qm.Recipe(cache=qm.SnapKV(keep=0.3, min_tokens=0)),
    "decoding": qm.Recipe(decoding=qm.PromptLookup()),
    "prefix and decoding": qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.3), 1, PREFIX), decoding=qm.PromptLookup()),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("batch", [1, 4])
def test_texts_are_those_of_the_applied_recipe_whatever_the_batch(tasks: Path, name: str, batch: int) -> None:
    model, recipe = tiny(), RECIPES[name]
    docs = [json.loads(line)["q"] for line in (tasks / "docs.json").read_text().splitlines()]
    found = asked(made(recipe, batch, model), tasks, "writes")["writes"]
    assert [resps[0][0] for resps in found] == [written(model, recipe, doc) for doc in docs]


def test_a_recipe_changes_what_is_written(tasks: Path) -> None:
    plain, fewer = (asked(made(recipe), tasks, "writes")["writes"] for recipe in (None, RECIPES["prefix"]))
    assert plain != fewer


@pytest.mark.parametrize("until", ["a", " "])
def test_drafts_stop_where_the_plain_model_does(until: str) -> None:
    from lm_eval.api.instance import Instance

    def answers(recipe: Any) -> list[str]:
        given = {"until": [until], "max_gen_toks": 30, "do_sample": False}
        lm = made(recipe)
        return lm.generate_until([
            Instance("generate_until", {}, (TEXT[i:], given), i, metadata=("t", i, 1)) for i in range(4)
        ])  # fmt: skip

    assert answers(RECIPES["decoding"]) == answers(None)


def test_saved_recipes_and_the_short_form_say_the_same(tasks: Path, tmp_path: Path) -> None:
    given = {"reducer": "quickmerge", "keep": 0.3, "recency": 0.5, "layer": [1, 2], "min_tokens": 8, "sinks": 2}
    short = made(None, **given)
    merge = qm.Merge(qm.QuickMerge(keep=0.3, recency=0.5), [1, 2], qm.Prefix(min_tokens=8, sinks=2))
    assert short.recipe == qm.Recipe(merge=merge)
    short.recipe.save_pretrained(tmp_path)
    assert made(str(tmp_path)).recipe == short.recipe
    chunked = made(None, reducer="truncate:sinks=2", tokens=9, mode="block-causal", chunk=32, window=16, sinks=3)
    assert chunked.recipe.merge == qm.Merge(
        qm.Truncate(keep=qm.Count(9), sinks=2), None, qm.BlockCausal(chunk=32, window=16, sinks=3)
    )
    both = made(None, cache="snapkv:keep=0.4", attention=None, drafter="lookup", tree=6)
    assert both.recipe == qm.Recipe(cache=qm.SnapKV(keep=0.4), decoding=qm.Speculation(qm.PromptLookup(), tree=6))
    assert made(None, attention="multipole:budget=64").recipe == qm.Recipe(attention=qm.Multipole(budget=64))


# Likelihoods --------------------------------------------------------------------------------------------------------

REFUSED = {
    "prefix": r"merge \(quickmerge\) is in prefix mode",
    "attention": r"attention \(multipole\) reads clusters",
    "cache": r"cache \(snapkv.*\) makes the cache smaller",
    "decoding": "decoding drafts tokens",
    "prefix and decoding": r"merge \(quickmerge\) is in prefix mode",
}


@pytest.mark.parametrize("task", ["chooses", "reads"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_acts_behind_the_prefill_can_not_be_scored_in_it(tasks: Path, name: str, task: str) -> None:
    with pytest.raises(
        QuickmergeError, match=f"^{task} scores likelihoods inside the one prefill, and {REFUSED[name]}"
    ):
        asked(made(RECIPES[name]), tasks, task)


@pytest.mark.parametrize("batch", [1, 3])
def test_block_causal_likelihoods_read_the_merged_past(tasks: Path, batch: int) -> None:
    model, recipe, tokenizer = tiny(), RECIPES["block-causal"], byte_level()
    docs = [json.loads(line)["q"] for line in (tasks / "docs.json").read_text().splitlines()]
    found = asked(made(recipe, batch, model), tasks, "chooses", "reads")
    plain = asked(made(None, batch, model), tasks, "chooses", "reads")
    for doc, choices, own in zip(docs, found["chooses"], plain["chooses"], strict=True):
        context = tokenizer(doc)["input_ids"]
        for text, ((nll, _),) in zip(TASKS["chooses"]["doc_to_choice"], choices, strict=True):  # type: ignore[call-overload]
            whole = torch.tensor([tokenizer(f"{doc} {text}")["input_ids"]])
            behind = whole.shape[1] - len(context)
            with torch.no_grad(), qm.apply(model, recipe):
                logp = model(whole[:, :-1]).logits[0, -behind:].log_softmax(-1)
            assert nll == pytest.approx(float(logp.gather(-1, whole[0, -behind:, None]).sum()), abs=1e-9)
        if len(context) > 40:  # else no chunk has left the window
            assert [nll for ((nll, _),) in choices] != [nll for ((nll, _),) in own]
    for doc, ((found_nll,),), ((own_nll,),) in zip(docs, found["reads"], plain["reads"], strict=True):
        ids = torch.tensor([[0, *tokenizer(doc)["input_ids"]]])
        with torch.no_grad(), qm.apply(model, recipe):
            logp = model(ids[:, :-1]).logits[0].log_softmax(-1)
        assert found_nll == pytest.approx(float(logp.gather(-1, ids[0, 1:, None]).sum()), abs=1e-8)
        assert ids.shape[1] < 40 or found_nll != own_nll


# What it cost -------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_each_prompt_alone(tasks: Path) -> None:
    model, recipe, tokenizer = tiny(), RECIPES["prefix"], byte_level()
    docs = [json.loads(line)["q"] for line in (tasks / "docs.json").read_text().splitlines()]
    costs = asked(made(recipe, 1, model), tasks, "writes")["config"]["quickmerge"]["costs"]["all"]
    alone = []
    for doc in docs:
        ids = tokenizer(doc, return_tensors="pt")["input_ids"]
        with torch.no_grad(), qm.apply(model, recipe) as run:
            model(ids)
            alone.append(run.summary()["merge"])
    assert costs["prompts"] == len(docs) and costs["prompts_read_whole"] == sum(s.rows_protected for s in alone) == 1
    mean = {name: sum(getattr(s, name) for s in alone) / len(alone) for name in ("tokens_in", "tokens_kept")}
    assert {name: costs[name] for name in mean} == pytest.approx(mean)
    assert costs["cache_bytes"] == pytest.approx(sum(s.prompt_cache_bytes for s in alone) / len(alone))
    assert 0 < costs["cache_ratio"] < 1 and 0 < costs["flops_ratio"] < 1.5 and costs["prefill_seconds"] > 0
    batch = asked(made(recipe, 4, model), tasks, "writes")["config"]["quickmerge"]["costs"]["all"]
    assert {name: batch[name] for name in mean} == pytest.approx(mean)


def test_made_up_batches_that_find_the_size_are_nobody_s_prompts(tasks: Path) -> None:
    lm = made(RECIPES["prefix"], "auto", max_batch_size=4)  # type: ignore[arg-type]
    found = asked(lm, tasks, "writes")
    assert found["config"]["quickmerge"]["costs"]["all"]["prompts"] == len(LENGTHS)
    assert found["writes"] == asked(made(RECIPES["prefix"]), tasks, "writes")["writes"]


def test_prompts_that_are_too_short_are_counted_as_read_whole(tasks: Path) -> None:
    told = asked(made(None, reducer="quickmerge", min_tokens=100), tasks, "writes")["config"]["quickmerge"]
    assert 0 < told["costs"]["all"]["prompts_read_whole"] < len(LENGTHS)
    assert told["recipe"] == made(None, reducer="quickmerge", min_tokens=100).recipe.as_dict()


def test_the_plain_model_is_counted_by_the_same_clock(tasks: Path) -> None:
    for recipe in (None, RECIPES["attention"], RECIPES["decoding"]):
        costs = asked(made(recipe), tasks, "writes")["config"]["quickmerge"]["costs"]["all"]
        assert costs["prompts"] == len(LENGTHS) and costs["tokens_in"] == costs["tokens_kept"] > 0
        assert costs["flops_ratio"] == 1 and costs["prefill_seconds"] > 0 and costs["cache_bytes"] > 0
    chunked = asked(made(RECIPES["block-causal"]), tasks, "reads")["config"]["quickmerge"]["costs"]["all"]
    assert chunked["flops_ratio"] is None and 0 < chunked["cache_ratio"] < 1


# Doors --------------------------------------------------------------------------------------------------------------


def test_the_entry_point_is_what_the_coming_lm_eval_loads() -> None:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import Registry

    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    value = "quickmerge.serve.lm_eval:QuickmergeLM"
    assert f'[project.entry-points."lm_eval.models"]\nquickmerge = "{value}"' in pyproject
    registry = Registry("model", base_cls=LM)
    registry.register("quickmerge", target=EntryPoint("quickmerge", value, "lm_eval.models"))
    assert registry.get("quickmerge") is QuickmergeLM
    register()
    register()
    assert lm_eval.api.registry.get_model("quickmerge") is QuickmergeLM


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reducr": "quickmerge"}, r"unknown name 'reducr' \(did you mean 'reducer'"),
        ({"keep": 0.4}, "keep is for a reducer: give reducer=quickmerge"),
        ({"reducer": "quickmerg"}, r"reducer must be one of .* got 'quickmerg' \(did you mean 'quickmerge'"),
        ({"reducer": "quickmerge", "keep": 1.5}, "keep"),
        ({"reducer": "quickmerge", "keep": "much"}, "keep must be a number, got 'much'"),
        ({"reducer": "quickmerge", "block": 3}, "block is no setting of quickmerge or of prefix mode: give one of .*"),
        ({"reducer": "quickmerge", "chunk": 64}, "chunk is no setting of quickmerge or of prefix mode"),
        ({"reducer": "quickmerge", "mode": "suffix"}, "mode must be one of prefix, block_causal"),
        ({"reducer": "quickmerge", "layer": 99}, "layer"),
        ({"reducer": "gemfilter", "mode": "block-causal"}, "block_causal|block-causal"),
        ({"tree": 8}, "tree is for drafted tokens: give drafter too"),
        ({"recipe": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"recipe": RECIPES["prefix"], "keep": 0.4}, "keep can't be used with recipe, which says all that is done"),
        ({"recipe": qm.Recipe(visual=qm.SCOPE(keep=0.3))}, "visual must be left out of a recipe for lm-eval"),
    ],
)  # fmt: skip
def test_what_was_given_wrongly_is_told(given: dict[str, Any], said: str) -> None:
    with pytest.raises(QuickmergeError, match=said) as error:
        made(given.pop("recipe", None), **given)
    assert "\n" not in str(error.value)


def test_a_recipe_for_another_model_is_refused() -> None:
    from quickmerge.data import shipped_prior

    folder = shipped_prior("smollm2-135m")
    assert folder is not None
    recipe = qm.Recipe(merge=qm.QuickMergePrior.from_prior(qm.Prior.from_pretrained(folder)))
    with pytest.raises(QuickmergeError, match="prior"):
        made(recipe)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-such-owner/no-such-model", "the model no-such-owner/no-such-model can't be loaded"),
        ("no-such-model", "no model is called 'no-such-model'"),
        ("/nowhere/at/all", "there is no folder"),
    ],
)
def test_models_that_are_not_there(name: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(QuickmergeError, match=said) as error:
        QuickmergeLM(name, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model_args", "pretrained=no-such-owner/no-such-model"], "no-such-owner/no-such-model"),
        (["--model_args", "pretrained={folder},reducer=tomee"], "reducer must be one of"),
        (["--model_args", "pretrained={folder}", "--tasks", "no_such_task"], "stopped (Tasks not found: no_such_task)"),
        (["--model_args", "pretrained={folder},reducer=tome", "--tasks", "chooses"], "chooses scores likelihoods"),
        (["--model_args", "pretrained=smollm2-135m", "--tasks", "ruler_vt", "--metadata", "max_seq_lengths=[500]"],
         "max_seq_lengths must be at least"),
    ],
)  # fmt: skip
def test_one_sentence_and_exit_code_2(args: list[str], said: str, tasks: Path, folder: Path, tmp_path: Path) -> None:
    args = [each.format(folder=folder) for each in args]
    tasked = [] if "--tasks" in args else ["--tasks", "writes"]
    done = commanded(
        "--model", "quickmerge", *args, *tasked, "--include_path", str(tasks), "--device", "cpu", home=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_missing_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None; sys.argv = ['x', '--tasks', 'y']\n"
        "from quickmerge.lm_eval import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "quickmerge: tasks of lm-eval need the package lm-eval, which is not installed: pip install quickmerge[harness]"
    )


# Tasks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["ruler_vt", "ruler_cwe", "ruler_fwe"])
def test_lengths_at_which_ruler_looks_for_ever_are_refused(task: str) -> None:
    pytest.importorskip("wonderwords")

    class Words:
        """As few tokens as any tokenizer has: words."""

        def __call__(self, text: str) -> Any:
            return type("Encoding", (), {"input_ids": text.split()})

    with pytest.raises(QuickmergeError, match=f"max_seq_lengths must be at least .* for {task} .* got 100"):
        check_lengths([task], [4096, 100], Words())
    check_lengths([task], [1500, 4096], Words())
    with pytest.raises(QuickmergeError, match="must be a list of numbers"):
        check_lengths([task], 1024, Words())
    if task == "ruler_vt":  # this one cuts nearly every letter off
        with pytest.raises(QuickmergeError, match="can't be made with this tokenizer"):
            check_lengths([task], [4096], byte_level())


@pytest.mark.parametrize("kind", KINDS)
def test_needles_fit_and_stand_in_what_we_ship(kind: str) -> None:
    found = list(samples(kind, byte_level(), 2048, 6))
    assert found == list(samples(kind, byte_level(), 2048, 6)) and len({doc["input"] for doc in found}) == 6
    _, keys, each, wanted = KINDS[kind]
    for doc in found:
        assert 0.8 * 2048 < doc["length"] <= 2048
        assert len(set(doc["outputs"])) == wanted * each and all(doc["input"].count(o) == 1 for o in doc["outputs"])
        assert doc["input"].count(" office is ") == keys * each
        assert process_results(doc, [" and ".join(doc["outputs"])]) == {"found": 1, "all_found": 1}
        first = process_results(doc, [doc["outputs"][0]])
        assert first == {"found": 1 / len(doc["outputs"]), "all_found": float(len(doc["outputs"]) == 1)}
    with pytest.raises(QuickmergeError, match="too few for quickmerge_needle"):
        list(samples(kind, byte_level(), 120, 1))


@pytest.mark.slow
def test_needles_run_in_lm_eval_by_name(tmp_path: Path, folder: Path) -> None:
    args = ["--model", "quickmerge", "--model_args", f"pretrained={folder},reducer=tome,keep=0.5,max_length=4096"]
    done = commanded(
        *args, "--tasks", "quickmerge_needle", "--limit", "1", "--device", "cpu", "--output_path", str(tmp_path / "o"),
        "--metadata", '{"max_seq_lengths": [900], "samples": 2}', "--gen_kwargs", "max_gen_toks=4", home=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "o")
    assert {f"quickmerge_needle_{kind}" for kind in KINDS} <= set(found["results"])
    assert found["config"]["quickmerge"]["costs"]["all"]["tokens_kept"] < 900 * 0.6
