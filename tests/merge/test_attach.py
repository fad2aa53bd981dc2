from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hosts_zoo import ZOO, assert_detached, build, generate, reduce, tokens
from torch import Tensor

import quickmerge as qm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.run import observe
from quickmerge.merge.tokens import MergePlan, TokenView

MODES: dict[str, dict[str, Any]] = {
    "prefix": {"layer": 2, "recent": 5},
    "block_causal": {"mode": "block_causal", "chunk": 8, "window": 4},
}


class Broken(qm.Uniform):
    """Fails after the layers below have run."""

    def plan(self, view: TokenView) -> MergePlan:
        raise RuntimeError("no plan")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_run_leaves_no_trace(mode: str, family: str, attn: str, untouched: Callable[[Any], Any]) -> None:
    model = untouched(build(family, attn))
    if family == "mistral" and mode == "block_causal":
        pytest.skip("every block slides: there is nothing to merge, which test_block_causal.py holds")
    ids = tokens(2, 40)
    with torch.no_grad():
        plain, config = model(ids).logits, copy.deepcopy(model.config.to_dict())
        with reduce(model, qm.Uniform(keep=0.5), **MODES[mode]):
            assert model.config._attn_implementation != attn
            assert not torch.equal(model(ids).logits[:, -1], plain[:, -1])
        assert_detached(model, attn)
        assert torch.equal(model(ids).logits, plain)
        assert model.config.to_dict() == config


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["body", "plan", "layer", "enter"])
def test_no_exception_leaves_a_trace(
    mode: str, where: str, untouched: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = untouched(build("llama"))
    ids = tokens(1, 40)
    plain = model(ids).logits
    reducer = Broken(keep=0.5) if where == "plan" else qm.Uniform(keep=0.5)
    run = reduce(model, reducer, **MODES[mode])

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no plan")

    if where == "layer":
        monkeypatch.setattr(model.model.layers[3], "forward", fail)
    if where == "enter":
        monkeypatch.setattr(model.model, "register_forward_hook", fail)
    with pytest.raises(RuntimeError, match="no plan"), run:
        model(ids)
        if where == "body":
            raise RuntimeError("no plan")
    monkeypatch.undo()
    assert_detached(model, "sdpa")
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_goes_on_after_a_failed_call(mode: str) -> None:
    model = build("llama")
    ids = tokens(1, 40)
    with torch.no_grad(), reduce(model, qm.Uniform(keep=0.5), **MODES[mode]):
        good = generate(model, ids, 4)
        with pytest.raises(QuickmergeError, match="attention_mask"):
            model(ids, attention_mask=torch.tensor([[1] * 10 + [0] + [1] * 29]))
        again = generate(model, ids, 4)
    assert torch.equal(good.sequences, again.sequences)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_may_be_entered_again(mode: str, untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    ids = tokens(1, 40)
    run = reduce(model, qm.Uniform(keep=0.5), **MODES[mode])
    logits: list[Tensor] = []
    for _ in range(2):
        with torch.no_grad(), run as entered:
            assert entered is run
            logits.append(model(ids).logits)
        assert run.summary().tokens_in == 40
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("outer", MODES)
@pytest.mark.parametrize("inner", MODES)
def test_a_second_run_on_a_model_is_refused_and_the_first_goes_on(
    outer: str, inner: str, untouched: Callable[[Any], Any]
) -> None:
    model = untouched(build("llama"))
    ids = tokens(1, 40)
    early = reduce(model, qm.Uniform(keep=0.25), **MODES[inner])
    with torch.no_grad(), reduce(model, qm.Uniform(keep=0.5), **MODES[outer]):
        before = model(ids).logits
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is already inside a quickmerge run"), early:
            pass
        assert torch.equal(model(ids).logits, before)


def test_a_second_run_made_inside_the_first_gets_the_same_answer() -> None:
    model = build("llama")
    with (
        reduce(model, qm.Uniform(keep=0.5)),
        pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is already inside a quickmerge run"),
        reduce(model, qm.Uniform(keep=0.5)),
    ):
        pass


def test_one_run_entered_twice_is_refused_and_goes_on(untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    ids = tokens(1, 40)
    run = reduce(model, qm.Uniform(keep=0.5), layer=2)
    with torch.no_grad(), run:
        with pytest.raises(UnsupportedModelError, match="already inside a quickmerge run"), run:
            pass
        assert model(ids).logits.shape[1] == 20


def test_a_run_inside_observing_is_undone_in_turn(untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    ids = tokens(1, 40)
    with torch.no_grad(), observe(model) as seen:
        plain = model(ids).logits
        with reduce(model, qm.Uniform(keep=0.5), layer=2):
            assert model(ids).logits.shape[1] == 20
        assert torch.equal(model(ids).logits, plain)
    assert seen.summary().tokens_per_layer == [40.0] * 4


@pytest.mark.parametrize("mode", MODES)
def test_models_do_not_hear_each_other(mode: str) -> None:
    """Two models of one class, nested: the inner block changes nothing for the outer model."""
    one, two = build("llama", seed=1), build("llama", seed=2)
    ids = tokens(1, 40)
    with torch.no_grad():
        plain = two(ids).logits
        with reduce(one, qm.Uniform(keep=0.5), **MODES[mode]):
            first = one(ids).logits
            assert torch.equal(two(ids).logits, plain)
            with reduce(two, qm.ToMe(keep=0.3), **MODES[mode]):
                assert not torch.equal(two(ids).logits[:, -1], plain[:, -1])
                assert torch.equal(one(ids).logits, first)
            assert torch.equal(two(ids).logits, plain)
            assert torch.equal(one(ids).logits, first)


@pytest.mark.parametrize("mode", MODES)
def test_threads_do_not_mix(mode: str) -> None:
    models = [build("llama", seed=1), build("qwen2", seed=2), build("llama", seed=3)]
    reducers = [qm.QuickMerge(keep=0.5, pool=3), qm.ToMe(keep=0.3), None]
    ids = [tokens(1, 40, 1), tokens(2, 50, 2), tokens(1, 45, 3)]

    def work(i: int) -> list[Tensor]:
        reducer = reducers[i]
        with torch.no_grad():
            if reducer is None:
                return [generate(models[i], ids[i], 6).sequences, models[i](ids[i]).logits]
            with reduce(models[i], reducer, **MODES[mode]):
                return [generate(models[i], ids[i], 6).sequences, models[i](ids[i]).logits]

    wanted = [work(i) for i in range(3)]
    found: dict[int, list[list[Tensor]]] = {0: [], 1: [], 2: []}
    start = threading.Barrier(3)

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
        for result in found[i]:
            assert all(torch.equal(a, b) for a, b in zip(result, wanted[i], strict=True))


def test_reducers_of_all_kinds_run_in_both_modes() -> None:
    from quickmerge.merge.reducers import REDUCERS
    from quickmerge.merge.reducers.reread import Reread

    model = build("llama")
    ids = tokens(2, 60)
    with torch.no_grad():
        for kind in REDUCERS.values():
            for settings in MODES.values():
                if issubclass(kind, Reread):  # which is for whole prompts, and says itself where it looks
                    if "mode" in settings:
                        continue
                    settings = {name: value for name, value in settings.items() if name != "layer"}
                with reduce(model, kind(keep=0.5), **settings) as run:
                    assert bool(generate(model, ids, 3).logits[-1].isfinite().all()), kind
                assert min(run.summary().tokens_per_layer) < 60, kind


def test_own_hooks_of_the_user_are_left_alone() -> None:
    model = build("llama")
    calls: list[int] = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: calls.append(1))
    with torch.no_grad(), reduce(model, qm.Uniform(keep=0.5), layer=2):
        model(tokens(1, 40))
    assert calls == [1] and len(model.model.layers[1]._forward_pre_hooks) == 1
    handle.remove()
    assert_detached(model, "sdpa")
