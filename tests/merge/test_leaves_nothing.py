"""Outside of a run a model, and what it shares with others, is bit for bit what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hosts_zoo
import pytest
import torch
import transformers
import vision_zoo
import vlm_zoo

import quickmerge as qm
from quickmerge.merge.tokens.removal import Removal


def state_of(model: Any) -> dict[str, Any]:
    """Everything that hangs on a model, by where it hangs: attributes as they are, hooks, settings; and what torch
    keeps for everybody."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "rope_deltas":  # what the model's own forward writes down each time
                continue
            if key in ("_parameters", "_buffers", "_modules"):
                found |= {f"{name}.{key}.{part}": id(each) for part, each in value.items()}
            elif isinstance(value, dict) and key.startswith(("_forward", "_backward")):
                found[f"{name}.{key}"] = dict(value)
            else:
                found[f"{name}.{key}"] = id(value)
        if (config := getattr(module, "config", None)) is not None:
            found[f"{name}.config"] = repr(sorted((k, repr(v)) for k, v in vars(config).items()))
    found |= {f"{name} (weights)": value.clone() for name, value in model.state_dict().items()}
    if getattr(model, "generation_config", None) is not None:
        found["generation_config"] = model.generation_config.to_dict()
    found["random numbers"] = torch.get_rng_state()
    found["torch"] = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), model.training)
    found["verbosity"] = transformers.logging.get_verbosity()
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert set(before) == set(after)
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        assert same, key


def language() -> tuple[Any, Callable[[], Any]]:
    model = hosts_zoo.build("llama")
    return model, lambda: model.generate(hosts_zoo.tokens(1, 300), max_new_tokens=2, do_sample=False)


def vision() -> tuple[Any, Callable[[], Any]]:
    model = vision_zoo.build("dinov2")
    return model, lambda: model(vision_zoo.pixels("dinov2"))


RUNS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "prefix": (language, lambda model: qm.reduce(model, qm.QuickMerge(keep=0.5))),
    "block_causal": (language, lambda model: qm.reduce(model, qm.QuickMerge(keep=0.5), mode="block_causal")),
    "multipole": (language, lambda model: qm.multipole(model)),
    "vision": (vision, lambda model: qm.reduce(model, qm.ToMe(), Removal(3))),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_leaves_everything_as_it_was(kind: str, fails: bool) -> None:
    made, run = RUNS[kind]
    model, use = made()
    use()  # what transformers itself sets when a model is used first
    before = copy.copy(state_of(model))
    rng = torch.get_rng_state()
    if fails:
        with pytest.raises(ZeroDivisionError), torch.no_grad(), run(model):
            use()
            raise ZeroDivisionError
    else:
        with torch.no_grad(), run(model):
            use()
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same(before, state_of(model))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("asks", ["tower", "nothing"])
def test_a_vision_language_model_keeps_what_the_user_put_on_it(family: str, asks: str) -> None:
    """A wrapper on the function that makes features is called inside a run, and is there again behind it."""
    model = vlm_zoo.build(family)
    inputs = vlm_zoo.prompt(model, [[0], [1, 2]])
    inner, calls = model.model.get_image_features, []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    with torch.no_grad():
        model(**inputs)
        reducer = qm.SCOPE(keep=0.5) if asks == "tower" else qm.Uniform(keep=0.5)
        for own in (None, mine):
            if own is not None:
                model.model.get_image_features = own
            before = state_of(model)
            with qm.reduce(model, reducer):
                model(**inputs)
            assert_same(before, state_of(model))
            assert vars(model.model).get("get_image_features") is own
    assert calls
