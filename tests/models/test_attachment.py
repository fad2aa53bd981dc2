"""What every run does for its model: beginning and ending, by whoever; copies, files, tracers."""

from __future__ import annotations

import copy
import copyreg
import gc
import io
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts_zoo import assert_detached, build, generate, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, ViTConfig, ViTModel

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.models.attachment import stand_in

RUNS: dict[str, Callable[[Any], Any]] = {
    "prefix": lambda model: qm.reduce(model, qm.Uniform(keep=0.5), layer=2, min_tokens=0),
    "block_causal": lambda model: qm.reduce(model, qm.QuickMerge(keep=0.5), mode="block_causal", chunk=8, window=4),
    "multipole": lambda model: qm.multipole(model, budget=8, sink=2, interval=4, block=16),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch": lambda model: through_file(model),
}


def through_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def vit() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    return ViTModel(ViTConfig(image_size=32, patch_size=4, **sizes)).eval()


# Beginning and ending ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_may_begin_and_end_without_a_block(kind: str, untouched: Callable[[Any], Any]) -> None:
    model, ids = untouched(build("llama")), tokens(1, 80)
    with RUNS[kind](model):
        wanted = generate(model, ids, 3)
    run = RUNS[kind](model)
    assert run.attach() is run and run.attached
    found = generate(model, ids, 3)
    run.detach()
    run.detach()
    assert torch.equal(found.sequences, wanted.sequences) and not run.attached
    assert_detached(model, "sdpa")
    with run:
        run.detach()  # the block's end has nothing left to do


@pytest.mark.parametrize("part", ["model", "base", "head", "around"])
def test_a_run_that_nobody_holds_can_be_left(part: str) -> None:
    model, ids = build("llama"), tokens(1, 80)
    plain = model(ids).logits
    RUNS["multipole"](model).attach()
    RUNS["prefix"](model).attach()
    gc.collect()
    around = nn.Sequential(model)
    given = {"model": model, "base": model.model, "head": model.lm_head, "around": around}[part]
    assert qm.detach(given) == 2 and qm.detach(given) == 0
    assert_detached(model, "sdpa")
    assert torch.equal(model(ids).logits, plain)


def test_other_models_are_not_left() -> None:
    one, two, seen = build("llama", seed=1), build("llama", seed=2), vit()
    with RUNS["prefix"](one), qm.reduce(seen, qm.ToMe(), qm.Removal(2)):
        assert qm.detach(two) == 0
        assert qm.detach(seen) == 1
        assert_detached(seen, "sdpa")
        assert one(tokens(1, 80)).logits.shape[1] == 40
    with pytest.raises(QuickmergeError, match=r"model must be a torch\.nn\.Module, got str"):
        qm.detach("smollm2-135m")  # type: ignore[arg-type]


def test_one_hook_that_cannot_be_removed_keeps_none_of_the_others() -> None:
    model = build("llama")
    run = RUNS["prefix"](model).attach()

    def fail() -> None:
        raise RuntimeError("gone")

    run._undo.append(fail)
    with pytest.raises(RuntimeError, match="gone"):
        run.detach()
    assert_detached(model, "sdpa")


# A run that is never entered ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_was_never_entered_says_so_once(kind: str) -> None:
    model = build("llama")
    with pytest.warns(UserWarning, match="on LlamaForCausalLM was never entered, so it has done nothing"):
        RUNS[kind](model)
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with RUNS[kind](model):
            pass
        run = RUNS[kind](model).attach()
        run.detach()
        with pytest.raises(ValueError, match="got"):
            qm.reduce(model, qm.Uniform(), layer=77)
        with pytest.raises(ValueError, match="got"):
            qm.multipole(model, first=77)
        del run
        gc.collect()


def test_it_says_so_at_the_end_of_a_program_too() -> None:
    text = (
        "import torch, quickmerge as qm\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2,\n"
        "    num_attention_heads=1))\n"
        "run = qm.reduce(model, qm.Uniform())\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=300)
    assert done.stderr.count("a run made by quickmerge.reduce on LlamaForCausalLM was never entered") == 1


# Copies and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", RUNS)
@torch.no_grad()
def test_a_copy_made_inside_is_the_plain_model(kind: str, how: str, untouched: Callable[[Any], Any]) -> None:
    model, ids = build("llama"), tokens(1, 80)
    plain = model(ids).logits
    model.model.layers[1].register_forward_hook(note)
    table = dict(copyreg.dispatch_table)
    with RUNS[kind](model):
        inside = generate(model, ids, 3)
        twin = COPIES[how](model)
        part = COPIES[how](model.model)
        again = generate(model, ids, 3)
        assert torch.equal(twin(ids).logits, plain)
    assert copyreg.dispatch_table == table
    assert torch.equal(inside.sequences, again.sequences)
    assert list(twin.model.layers[1]._forward_hooks.values()) == [note], "a user's own hook is copied"
    for layer in (twin.model.layers[1], part.layers[1], model.model.layers[1]):
        layer._forward_hooks.clear()
    assert_detached(untouched(model), "sdpa")
    assert_detached(untouched(twin), "sdpa")
    assert_detached(part, "sdpa")
    assert torch.equal(twin(ids).logits, plain) and torch.equal(part(ids)[0], model.model(ids)[0])
    with RUNS[kind](twin):
        assert torch.equal(generate(twin, ids, 3).sequences, inside.sequences)


def note(module: nn.Module, args: Any, output: Any) -> None:
    """A hook of a user, at the top of a module so that it can be pickled."""


@pytest.mark.parametrize("how", COPIES)
@torch.no_grad()
def test_so_is_one_of_a_vision_model(how: str) -> None:
    model, pixels = vit(), torch.randn(1, 3, 32, 32)
    plain = model(pixels).last_hidden_state
    with qm.reduce(model, qm.ToMe(), qm.Removal(5)):
        twin = COPIES[how](model)
        assert model(pixels).last_hidden_state.shape != plain.shape
    assert_detached(twin, "sdpa")
    assert torch.equal(twin(pixels).last_hidden_state, plain)


@pytest.mark.parametrize("kind", RUNS)
def test_files_written_inside_are_the_plain_model_s(kind: str, tmp_path: Path) -> None:
    model, ids = build("llama"), tokens(1, 80)
    plain, names = model(ids).logits, list(model.state_dict())
    with RUNS[kind](model):
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path)
        assert "quickmerge" not in model.config.to_json_string()
    assert "quickmerge" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, plain)


# What stands in for a method ---------------------------------------------------------------------------------------


def test_what_a_user_put_on_a_module_comes_back_or_stays() -> None:
    def own() -> str:
        return "own"

    def later() -> str:
        return "later"

    module = nn.Linear(2, 2)
    kept = type(module).forward
    stand_in(module, "forward", own)()
    assert "forward" not in vars(module) and type(module).forward is kept
    module.forward = own  # type: ignore[method-assign, assignment]
    undo = stand_in(module, "forward", lambda: "ours")
    assert module.forward() == "ours"  # type: ignore[call-arg]
    undo()
    assert module.forward is own  # type: ignore[comparison-overlap]
    undo = stand_in(module, "forward", lambda: "ours")
    module.forward = later  # type: ignore[method-assign, assignment]
    undo()
    assert module.forward is later  # type: ignore[comparison-overlap]


# Tracers and compilers ---------------------------------------------------------------------------------------------


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and asks modules for deprecated things
@pytest.mark.parametrize("kind", RUNS)
@torch.no_grad()
def test_tracing_a_language_model_inside_is_refused(kind: str) -> None:
    model, ids = build("llama"), tokens(1, 40)
    with (
        RUNS[kind](model),
        pytest.raises(QuickmergeError, match="LlamaForCausalLM can't be traced by torch"),
    ):
        torch.jit.trace(Logits(model), ids)
    assert_detached(model, "sdpa")


def test_compilers_go_on_behind_the_last_run() -> None:
    torch.compile(lambda x: x, backend="eager")
    one, two, calls = build("llama", seed=1), build("llama", seed=2), []

    def count(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph

    def double(x: Tensor) -> Tensor:
        return 2 * x

    first, second = RUNS["prefix"](one), RUNS["multipole"](two)
    with first:
        second.attach()
    torch.compile(double, backend=count)(torch.ones(2))
    assert not calls
    second.detach()
    torch.compile(double, backend=count)(torch.ones(2))
    assert calls
