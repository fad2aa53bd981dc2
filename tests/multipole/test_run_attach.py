"""Attaching multipole attention to a model, what it refuses, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from caches import held, past
from hosts_zoo import DEPTH, WINDOW, assert_detached, build, generate, tokens
from run_samples import SMALL, all_close, close, model_of
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import quickmerge as qm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.multipole import MultipoleLayer

# Which blocks ------------------------------------------------------------------------------------------------------


def test_first_blocks_and_sliding_ones_keep_their_own() -> None:
    model = model_of("gemma3_text")
    run = qm.multipole(model, **SMALL)
    assert run.blocks == (1, 3) and qm.multipole(model, **SMALL, first=2).blocks == (3,)
    with qm.multipole(model, **SMALL, first=2) as run:
        out = generate(model, tokens(1, 60), 12)
    kinds = [type(layer) for layer in held(out).layers]
    assert kinds == [DynamicSlidingWindowLayer, DynamicLayer, DynamicSlidingWindowLayer, MultipoleLayer]
    assert run.summary().blocks == 1 and run.summary().blocks_all == DEPTH
    with pytest.raises(ValueError, match=r"first must be at most 3, the last block of Gemma3.*, got 4"):
        qm.multipole(model, first=4)
    with pytest.raises(UnsupportedModelError, match=r"MistralForCausalLM, which needs full .* has sliding attention$"):
        qm.multipole(build("mistral", sliding_window=WINDOW))


# Refusals ----------------------------------------------------------------------------------------------------------


def test_settings_are_checked() -> None:
    model = model_of()
    with pytest.raises(ValueError, match=r"settings must be of budget, .*, got 'buget' \(did you mean 'budget'\?\)"):
        qm.multipole(model, buget=3)
    with pytest.raises(ValueError, match="budget must be a whole number of at least 0, got -1"):
        qm.multipole(model, budget=-1)
    with pytest.raises(ValueError, match=r"settings must be a Multipole such as Multipole\(budget=128\), got 128"):
        qm.multipole(model, 128)
    assert qm.multipole(model, qm.Multipole(budget=7, sink=3), sink=5).settings == qm.Multipole(budget=7, sink=5)
    with pytest.raises(UnsupportedModelError, match=r"model must be a transformers PreTrainedModel, got Linear"):
        qm.multipole(torch.nn.Linear(2, 2))


def four(model: Any, ids: Tensor) -> Any:
    return model(ids, attention_mask=torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool))


def static(model: Any, ids: Tensor) -> Any:
    return model(ids, **past(StaticCache(config=model.config, max_cache_len=100)))


def offloaded(model: Any, ids: Tensor) -> Any:
    return model(ids, **past(DynamicCache(config=model.config, offloading=True)))


def from_outside(model: Any, ids: Tensor) -> Any:
    cache = DynamicCache(config=model.config)
    keys = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    for i in range(DEPTH):
        cache.update(keys, keys, i)
    return model(ids, **past(cache))


def other_layers(model: Any, ids: Tensor) -> Any:
    cache = DynamicCache(config=model.config)
    cache.layers[2] = DynamicSlidingWindowLayer(sliding_window=5)
    return model(ids, **past(cache))


def softcap(model: Any, ids: Tensor) -> Any:
    return model(ids, softcap=30.0)


def sinks(model: Any, ids: Tensor) -> Any:
    return model(ids, s_aux=torch.zeros(4))


def weights(model: Any, ids: Tensor) -> Any:
    return model(ids, output_attentions=True)


def dropout(model: Any, ids: Tensor) -> Any:
    model.model.layers[1].self_attn.attention_dropout = 0.5
    return model.train()(ids)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (four, "attention_mask must be a 2-D padding mask inside a quickmerge run"),
        (static, "must be a DynamicCache that stays on its device, got StaticCache"),
        (offloaded, "must be a DynamicCache that stays on its device, got offloaded one"),
        (from_outside, "was filled outside this run; start it with an empty cache"),
        (other_layers, "got one of type DynamicSlidingWindowLayer for block 2"),
        (softcap, "softcap must be left out of attention for multipole attention, got 30.0"),
        (sinks, "s_aux must be left out of attention for multipole attention, got a Tensor"),
        (weights, "output_attentions must be left out of attention for multipole attention, got True"),
        (dropout, "dropout must be left out of attention for multipole attention, got 0.5"),
    ],
)
def test_what_clusters_cannot_give_is_refused_and_the_run_goes_on(
    call: Callable[..., Any], message: str, untouched: Callable[[Any], Any]
) -> None:
    # Where transformers captures weights it leaves hooks of its own.
    model = model_of() if call is weights else untouched(model_of())
    ids = tokens(1, 40)
    with torch.no_grad(), qm.multipole(model, **SMALL):
        wanted = generate(model, ids, 4)
        with pytest.raises(QuickmergeError, match=message):
            call(model, ids)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        all_close(generate(model.eval(), ids, 4), wanted)


def test_a_model_that_attends_both_ways_is_refused() -> None:
    model = model_of()
    with torch.no_grad(), qm.multipole(model, **SMALL), pytest.raises(QuickmergeError, match="is_causal must be left"):
        model(tokens(1, 40), is_causal=False)


# Attaching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["body", "layer", "enter", "refused"])
def test_no_exception_leaves_a_trace(
    where: str, untouched: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = untouched(model_of())
    ids = tokens(1, 40)
    plain = model(ids).logits

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no")

    if where == "layer":
        monkeypatch.setattr(model.model.layers[3], "forward", fail)
    if where == "enter":
        monkeypatch.setattr(model.model, "register_forward_hook", fail)
    error = QuickmergeError if where == "refused" else RuntimeError
    with pytest.raises(error), qm.multipole(model, **SMALL):
        model(ids, softcap=1.0 if where == "refused" else None)
        raise RuntimeError("no")
    monkeypatch.undo()
    assert_detached(model, "sdpa")
    assert torch.equal(model(ids).logits, plain)


def test_a_run_may_be_entered_again_and_is_alone() -> None:
    model = model_of()
    ids = tokens(1, 40)
    run, early = qm.multipole(model, **SMALL), qm.multipole(model)
    found = []
    for _ in range(2):
        with run:
            found.append(generate(model, ids, 8))
            for other in (run, early):
                with pytest.raises(UnsupportedModelError, match="already inside a quickmerge run"), other:
                    pass
            with pytest.raises(UnsupportedModelError, match="already inside a quickmerge run"):
                qm.multipole(model)
            assert model.config._attn_implementation == "quickmerge_sdpa"
    all_close(found[0], found[1])
    assert run.summary().decode_steps == 7


def test_models_do_not_hear_each_other() -> None:
    one, two = model_of(seed=1), model_of(seed=2)
    ids = tokens(1, 60)
    plain = generate(two, ids, 8)
    with qm.multipole(one, **SMALL):
        first = generate(one, ids, 8)
        all_close(generate(two, ids, 8), plain)
        with qm.multipole(two, **SMALL | {"budget": 0}):
            all_close(generate(one, ids, 8), first)
        all_close(generate(two, ids, 8), plain)


def test_without_a_cache_nothing_changes() -> None:
    model = model_of()
    ids = tokens(2, 40)
    with torch.no_grad():
        wanted = model(ids, use_cache=False)
        with qm.multipole(model, **SMALL):
            found = model(ids, use_cache=False)
    assert held(found) is None and torch.equal(found.logits, wanted.logits)


def test_training_goes_through_unchanged() -> None:
    model = model_of().train()
    ids = tokens(2, 30)
    model(ids, labels=ids).loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with qm.multipole(model, **SMALL):
        model(ids, labels=ids).loss.backward()
    for p, grad in zip(model.parameters(), wanted, strict=True):
        close(p.grad, grad)


# The summary -------------------------------------------------------------------------------------------------------


def test_the_summary_says_what_was_read() -> None:
    model = model_of()
    with qm.multipole(model, budget=24, sink=3, interval=8, ratio=0.25, block=32) as run:
        assert "nothing has been read yet" in str(run.summary())
        out = generate(model, tokens(1, 100), 2)
    stats, layers = run.summary(), held(out).layers
    # One step: 101 columns, 10 groups of 8 clustered behind the sink, the others read; kept are at most 24 of those.
    assert stats.tokens == 101 and stats.clustered == 88 and stats.decode_steps == 1 and stats.updates == 0
    assert stats.clusters == 3 * 8 - 2 and stats.rows_dense == 202
    assert 0 < stats.kept <= 24
    assert stats.rows_read == pytest.approx(2 * (stats.clusters + stats.kept + 101 - 88))
    # Layers have room for more tokens, and not all the same.
    assert stats.cache_bytes == sum(each.bytes for each in layers) > DEPTH * 2 * layers[0].keys.numel() * 8
    assert stats.cluster_bytes == sum(each.clusters.bytes for each in layers)
    assert stats.as_dict()["read_share"] == stats.rows_read / 202
    text = str(stats)
    assert "22 of 88 of 101 tokens" in text and "4 of 4 blocks, 1 row(s)" in text
    with qm.multipole(model, budget=24) as run:
        generate(model, tokens(1, 30), 2)
    assert "31 tokens: too few to cluster" in str(run.summary())
