"""A packaged folder in Python: ``generate`` goes by its recipe, in every thread, and by nothing else of ours."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from gumiho_samples import heads
from hosts_zoo import assert_detached
from stock_server import environment, talker

import quickmerge as qm
from quickmerge.serve.package import package

MERGE = qm.QuickMerge(keep=0.4)
RECIPES: dict[str, Callable[[], qm.Recipe]] = {
    "merge": lambda: qm.Recipe(merge=MERGE),
    "block causal": lambda: qm.Recipe(merge=qm.Merge(qm.QuickMerge(0.5, pool=1), 1, qm.BlockCausal(chunk=32))),
    "cache": lambda: qm.Recipe(cache=qm.SnapKV(keep=0.3)),
    "merge and cache": lambda: qm.Recipe(merge=MERGE, cache=qm.SnapKV(keep=0.5)),
    "multipole": lambda: qm.Recipe(attention=qm.Multipole(budget=32, interval=32)),
    "lookup": lambda: qm.Recipe(decoding=qm.PromptLookup()),
    "merge and lookup": lambda: qm.Recipe(merge=MERGE, decoding=qm.PromptLookup()),
}
NEW = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(tmp_path_factory.mktemp("models") / "talker")


@pytest.fixture(scope="module")
def plain(model: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(model)


def opened(model: Path, recipe: qm.Recipe, folder: Path) -> Any:
    package(model, recipe, folder, progress=False)
    return hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 300, (1, length), generator=torch.Generator().manual_seed(seed))


def written(model: Any, ids: torch.Tensor, **more: Any) -> list[int]:
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, **more)
    return list(out[0, ids.shape[1] :].tolist())


def by_recipe(plain: Any, recipe: qm.Recipe, ids: torch.Tensor, **more: Any) -> list[int]:
    with qm.apply(plain, recipe):
        return written(plain, ids, attention_mask=torch.ones_like(ids), **more)


@pytest.mark.parametrize("name", RECIPES)
def test_generate_is_that_of_the_recipe_and_keep_1_that_of_the_model(
    name: str, model: Path, plain: Any, tmp_path: Path
) -> None:
    recipe, ids = RECIPES[name](), prompt(400)
    lm = opened(model, recipe, tmp_path / "out")
    alone = written(plain, ids)
    reduced = by_recipe(plain, recipe, ids)
    assert written(lm, ids, keep=1.0) == alone
    assert written(lm, ids) == reduced
    assert (reduced == alone) == (name == "lookup")  # or there would be nothing to see here
    assert written(lm, ids, keep=1) == alone
    assert_detached(lm, "sdpa")


def test_heads_go_along(model: Path, plain: Any, tmp_path: Path) -> None:
    made = heads(plain, seed=1)
    made.network.float()
    lm, ids = opened(model, qm.Recipe(merge=MERGE, decoding=made), tmp_path / "out"), prompt(400)
    assert (tmp_path / "out" / "recipe" / "decoding-network" / "model.safetensors").is_file()
    assert written(lm, ids) == by_recipe(plain, qm.Recipe(merge=MERGE), ids)


@pytest.mark.parametrize(
    ("recipe", "same"),
    [
        (qm.Recipe(merge=MERGE, decoding=qm.PromptLookup()), qm.Recipe(merge=qm.QuickMerge(keep=0.2))),
        (qm.Recipe(cache=qm.SnapKV(keep=0.5)), qm.Recipe(cache=qm.SnapKV(keep=0.2))),
    ],
)
def test_a_call_asks_for_another_share_and_the_next_has_the_recipes_again(
    recipe: qm.Recipe, same: qm.Recipe, model: Path, plain: Any, tmp_path: Path
) -> None:
    lm, ids = opened(model, recipe, tmp_path / "out"), prompt(400)
    usual, other = by_recipe(plain, recipe, ids), by_recipe(plain, same, ids)
    assert usual != other
    assert [written(lm, ids), written(lm, ids, keep=0.2), written(lm, ids)] == [usual, other, usual]
    config = hf.GenerationConfig(max_new_tokens=NEW, do_sample=False, keep=0.2)
    assert lm.generate(ids, config)[0, 400:].tolist() == other
    assert config.keep == 0.2  # the caller's own is left alone


def test_what_can_not_be_asked_for_is_one_sentence(model: Path, tmp_path: Path) -> None:
    lm, ids = opened(model, RECIPES["lookup"](), tmp_path / "out"), prompt(300)
    for keep in (0, 1.5, "0.5", True, float("nan")):
        with pytest.raises(qm.QuickmergeError, match=r"keep must be a number in \(0, 1\]"):
            written(lm, ids, keep=keep)
    with pytest.raises(qm.QuickmergeError, match="keep must be 1 or left out for the recipe PromptLookup"):
        written(lm, ids, keep=0.5)
    with pytest.raises(qm.QuickmergeError, match="assistant_model must be left out"):
        written(lm, ids, assistant_model=lm)
    with pytest.raises(qm.QuickmergeError, match="leave --continuous-batching out"):
        lm.generate_batch([[5, 6, 7]], max_new_tokens=2)
    with pytest.raises(qm.QuickmergeError, match="leave --continuous-batching out"):
        written(lm, ids, cache_implementation="paged")
    assert len(written(lm, ids)) == NEW


def test_other_models_may_be_batched_continuously(model: Path, plain: Any, tmp_path: Path) -> None:
    opened(model, RECIPES["merge"](), tmp_path / "out")
    plain.init_continuous_batching()  # asks for nothing of ours, and isn't refused


def test_threads_write_what_each_writes_alone(model: Path, plain: Any, tmp_path: Path) -> None:
    """Of two that ask at once one looks ``generate`` up while the other's run has its hooks on the model."""
    recipe = RECIPES["merge and lookup"]()
    lm = opened(model, recipe, tmp_path / "out")
    prompts = [prompt(300 + 20 * seed, seed) for seed in range(4)]
    keeps = [None, 0.2, 1.0, None]
    alone = [written(lm, ids, keep=keep) for ids, keep in zip(prompts, keeps, strict=True)]
    found: list[list[list[int]]] = [[] for _ in prompts]

    def ask(at: int) -> None:
        for _ in range(2):
            found[at].append(written(lm, prompts[at], keep=keeps[at]))

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [[each] * 2 for each in alone]
    assert_detached(lm, "sdpa")


def test_an_error_within_a_call_leaves_the_model_as_it_was(model: Path, plain: Any, tmp_path: Path) -> None:
    lm, ids = opened(model, RECIPES["merge and lookup"](), tmp_path / "out"), prompt(400)
    before = written(lm, ids)

    class Gone(hf.generation.streamers.BaseStreamer):  # type: ignore[misc]
        def put(self, value: Any) -> None:
            if value.ndim == 1:
                raise ConnectionError("the client has left")

        def end(self) -> None: ...

    with pytest.raises(ConnectionError):
        written(lm, ids, streamer=Gone())
    assert_detached(lm, "sdpa")
    assert written(lm, ids) == before


def test_a_line_for_each_call_says_what_was_read_and_kept(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = opened(model, RECIPES["merge and lookup"](), tmp_path / "out")
    caplog.set_level(logging.INFO, "quickmerge")
    for ids, more in (
        (prompt(500), {}), (prompt(60), {}), (prompt(500), {"keep": 1.0}), (prompt(500), {"keep": 0.1}),
        (prompt(500).repeat(2, 1), {"attention_mask": torch.ones(2, 500, dtype=torch.long)}),
    ):  # fmt: skip
        written(lm, ids, **more)
    lines = [record.getMessage().split(": ", 1)[1] for record in caplog.records]
    assert lines[0].startswith("read 500 tokens, kept 200 (40 %) from block 2 on, cache 60 %, ")
    assert "tokens per pass, wrote 16 in " in lines[0]
    assert lines[1].startswith("read 60 tokens, passed unreduced: fewer than min_tokens=256, ")
    assert lines[2].startswith("read 500 tokens, kept all: keep=1, wrote 16 in ")
    assert lines[3].startswith("read 500 tokens, kept 52 (10 %) from block 2 on, ")
    assert lines[4].startswith("read 2 rows of 500 tokens, kept 200 (40 %)")


def test_nothing_of_a_model_stays_when_it_goes(model: Path, tmp_path: Path) -> None:
    lm = opened(model, RECIPES["merge"](), tmp_path / "out")
    written(lm, prompt(300))
    gone = [weakref.ref(lm), weakref.ref(lm.model.layers[0])]
    del lm
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_a_model_that_moves_or_is_set_anew_is_seen_as_it_is_now(model: Path, plain: Any, tmp_path: Path) -> None:
    lm, ids = opened(model, RECIPES["merge"](), tmp_path / "out"), prompt(400)
    written(lm, ids)
    lm.double()
    lm.generation_config = hf.GenerationConfig(max_new_tokens=3, do_sample=False)
    wide = hf.AutoModelForCausalLM.from_pretrained(model).double()
    with qm.apply(wide, RECIPES["merge"]()):
        assert torch.equal(lm.generate(ids), wide.generate(ids, max_new_tokens=3, do_sample=False))


def test_a_folder_without_its_recipe_is_told(model: Path, tmp_path: Path) -> None:
    lm = opened(model, RECIPES["merge"](), tmp_path / "out")
    (tmp_path / "out" / "recipe").rename(tmp_path / "elsewhere")
    with pytest.raises(qm.QuickmergeError, match="out has no folder recipe/ with its recipe"):
        written(lm, prompt(300))
    plain = hf.AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(qm.QuickmergeError, match="talker has no folder recipe/"):
        written(plain, prompt(300), custom_generate=str(tmp_path / "out"), trust_remote_code=True)


@pytest.mark.slow
def test_a_packaged_folder_on_the_hub_brings_its_recipe_along(model: Path, plain: Any, tmp_path: Path) -> None:
    """The hub's cache is filled by hand, as a download would fill it; nothing is fetched."""
    cache, commit = tmp_path / "cache", "0" * 40
    repository = cache / "models--me--quick"
    package(model, RECIPES["merge"](), repository / "snapshots" / commit, progress=False)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        "lm = AutoModelForCausalLM.from_pretrained('me/quick', trust_remote_code=True)\n"
        "ids = torch.randint(5, 300, (1, 400), generator=torch.Generator().manual_seed(0))\n"
        f"print(lm.generate(ids, max_new_tokens={NEW}, do_sample=False)[0, 400:].tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment() | {"HF_HUB_CACHE": str(cache)}, capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(by_recipe(plain, RECIPES["merge"](), prompt(400)))
