"""Multipole attention together with `quickmerge.reduce`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from attend_samples import Case, literal_multipole
from caches import held, past
from hosts_zoo import DEPTH, build, generate, pad, reduce, stored, tokens
from torch import Tensor

import quickmerge as qm
import quickmerge.multipole.run as run_module
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.multipole import MultipoleLayer

ALL = 10_000
SMALL: dict[str, Any] = {"budget": 16, "sink": 3, "interval": 4, "ratio": 0.25, "block": 32}
REDUCERS = {
    "quickmerge": qm.QuickMerge(keep=0.5, layers=2, window=16, pool=3),
    "tome": qm.ToMe(keep=0.4),
    "uniform": qm.Uniform(keep=0.5),
}
PROMPTS = [tokens(1, n, n)[0] for n in (61, 44)]


def inputs() -> tuple[Tensor, dict[str, Tensor]]:
    ids, mask, _ = pad(PROMPTS, "left")
    return ids, {"attention_mask": mask}


def reduced(model: Any, name: str = "tome", **more: Any) -> Any:
    return reduce(model, REDUCERS[name], **{"layer": 2, "sinks": 2, "recent": 5, **more})


def all_close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_nothing_merged_and_a_budget_for_all_keys_is_the_model(family: str, untouched: Callable[[Any], Any]) -> None:
    model = untouched(build(family))
    ids, more = inputs()
    wanted = generate(model, ids, 8, **more)
    with reduce(model, qm.QuickMerge(keep=1.0), layer=2, recent=5), qm.multipole(model, **SMALL | {"budget": ALL}):
        all_close(generate(model, ids, 8, **more), wanted)


@pytest.mark.parametrize("order", ["reduce first", "multipole first"])
@pytest.mark.parametrize(
    ("family", "name", "attn"),
    [
        ("llama", "tome", "sdpa"), ("llama", "quickmerge", "eager"), ("gemma3_text", "tome", "sdpa"),
        ("gpt_neox", "uniform", "sdpa"), ("smollm3", "quickmerge", "sdpa"),
    ],
)  # fmt: skip
def test_a_budget_for_all_keys_is_the_reduced_model(
    family: str, name: str, attn: str, order: str, untouched: Callable[[Any], Any]
) -> None:
    """In either order of entering, over a padded batch, with updates in between."""
    model = untouched(build(family, attn))
    ids, more = inputs()
    told = {"budget": ALL}
    with reduced(model, name) as alone:
        wanted = generate(model, ids, 10, **more)
    for settings in ({}, {"space": "windowed"}):
        with ExitStack() as stack:
            runs = {}
            for kind in ("reduce", "multipole") if order == "reduce first" else ("multipole", "reduce"):
                # Made when the other one is entered already.
                run = reduced(model, name) if kind == "reduce" else qm.multipole(model, **SMALL | settings | told)
                runs[kind] = stack.enter_context(run)
            found = generate(model, ids, 10, **more)
        all_close(found, wanted)
        one, other = runs["reduce"], runs["multipole"]
        assert one.summary().tokens_per_layer == alone.summary().tokens_per_layer
        assert stored(held(found)) == stored(held(wanted))
        assert other.summary().updates > 0
        top = held(found).layers[DEPTH - 1]
        assert isinstance(top, MultipoleLayer) and int(top.clusters.members.sum()) > 0
        if REDUCERS[name].proportional:
            # Slots count as the tokens that they stand for.
            assert float(top.clusters.count.sum()) > float(top.clusters.members.sum())


@pytest.mark.parametrize(("name", "layer"), [("tome", 2), ("uniform", 2), ("tome", 1)])
def test_one_block_equals_the_sums_written_out(
    name: str, layer: int, untouched: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What block 2 reads by clusters, with slots of many sizes, padding and new tokens, key by key in float64."""
    model = untouched(build("llama", dtype=torch.float64))
    ids, more = inputs()
    calls: list[tuple[Case, Tensor, Tensor]] = []
    attend = run_module.attend_and_count

    def spy(
        query: Tensor, keys: Tensor, values: Tensor, size: Tensor, clusters: Any, settings: Any, **rest: Any
    ) -> Any:
        out, kept = attend(query, keys, values, size, clusters, settings, **rest)
        case = Case(query, keys.clone(), values.clone(), size, clusters, settings, rest["scaling"])
        calls.append((case, out, kept))
        return out, kept

    monkeypatch.setattr(run_module, "attend_and_count", spy)
    with reduced(model, name, layer=layer) as run, qm.multipole(model, **SMALL):
        generate(model, ids, 6, **more)
        plan = run.plan
    steps = [calls[i : i + DEPTH] for i in range(0, len(calls), DEPTH)]
    assert len(steps) == 5
    for new, step in enumerate(steps, 1):
        case, out, kept = step[2]
        # The slots first, then what was generated; a slot counts as its tokens where the method wants that.
        assert case.keys.shape[2] == plan.slots + new
        told = plan.size if REDUCERS[name].proportional else torch.ones_like(plan.size)
        size = torch.where(plan.valid, told, 0).float()
        assert torch.equal(case.size, torch.cat([size, torch.ones(2, new)], 1))
        wanted, rows = literal_multipole(case)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
        assert torch.equal(kept, rows)
    assert int(plan.size.max()) > 2 or name == "uniform"
    assert not bool(plan.valid.all()) and float(steps[0][2][2].min()) > 0
    # Below the merge there are tokens, the padded ones of no size.
    below = steps[0][layer - 1][0]
    assert torch.equal(below.size, torch.cat([more["attention_mask"], torch.ones(2, 1)], 1).float())


def test_in_the_windowed_space_slots_are_turned_back_from_their_own_places() -> None:
    """Centroids above the merge are means of what the projection gave, weighted by the sizes of the slots."""
    model = build("llama", dtype=torch.float64)
    ids, more = inputs()
    bare: list[Tensor] = []
    handle = model.model.layers[3].self_attn.k_proj.register_forward_hook(
        lambda module, args, out: bare.append(out.unflatten(-1, (2, -1)).transpose(1, 2))
    )
    with reduced(model) as run, qm.multipole(model, **SMALL, space="windowed"):
        out = generate(model, ids, 10, **more)
    handle.remove()
    layer, keys, plan = held(out).layers[3], torch.cat(bare, 2), run.plan
    clusters, new = layer.clusters, keys.shape[2] - plan.slots
    assert torch.equal(layer.position[:, : plan.slots], plan.position)
    assert layer.position[:, plan.slots :].tolist() == [[n + i for i in range(new)] for n in (61, 44)]
    size = torch.cat([torch.where(plan.valid, plan.size, 0), torch.ones(2, new)], 1).double()
    assert float(clusters.count.sum()) > float(clusters.members.sum())
    for row in range(2):
        first, length = int(clusters.start[row]), int(clusters.end[row] - clusters.start[row])
        for head in range(2):
            label = clusters.labels[row, head, :length]
            for i in label.unique().tolist():
                members = first + (label == i).nonzero()[:, 0]
                own = size[row, members]
                assert float(clusters.count[row, head, i]) == float(own.sum())
                if own.sum() > 0:
                    mean = (own[:, None] * keys[row, head, members]).sum(0) / own.sum()
                    torch.testing.assert_close(clusters.key[row, head, i], mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["reduce first", "multipole first"])
def test_a_model_may_be_called_without_a_cache_of_ones_own(order: str) -> None:
    model = build("llama")
    ids, more = inputs()
    with ExitStack() as stack, torch.no_grad():
        makers = [lambda: reduced(model), lambda: qm.multipole(model, **SMALL | {"budget": ALL})]
        for make in makers if order == "reduce first" else makers[::-1]:
            stack.enter_context(make())
        out = model(ids, **more)
        mask = torch.cat([more["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        place = mask.sum(-1, keepdim=True) - 1
        step = model(ids[:, :1], attention_mask=mask, position_ids=place, **past(held(out)))
    with reduced(model), torch.no_grad():
        alone = model(ids, **more)
        wanted = model(ids[:, :1], attention_mask=mask, position_ids=place, **past(held(alone)))
    torch.testing.assert_close(out.logits[:, -1], alone.logits[:, -1])
    torch.testing.assert_close(step.logits, wanted.logits, rtol=0, atol=1e-5)


def test_several_merges_and_beams_go_together() -> None:
    model = build("llama")
    ids, more = inputs()
    told = {**more, "num_beams": 2}
    with reduced(model, "quickmerge", layer=[1, 3]):
        wanted = generate(model, ids, 8, **told)
        with qm.multipole(model, **SMALL | {"budget": ALL}):
            all_close(generate(model, ids, 8, **told), wanted)
        with qm.multipole(model, **SMALL) as run:
            out = generate(model, ids, 8, **told)
        all_close(generate(model, ids, 8, **told), wanted)
    assert all(bool(step.isfinite().all()) for step in out.logits)
    assert run.summary().rows_read < run.summary().rows_dense


def test_a_cache_that_multipole_attention_made_is_known_to_the_reducer() -> None:
    """A cache filled by another run is refused as ever; an empty one of ours is as good as any."""
    model = build("llama")
    ids = tokens(1, 60)
    cache = qm.MultipoleCache(model.config)
    with reduced(model) as run, torch.no_grad():
        model(ids, **past(cache))
        assert run.summary().tokens_per_layer[3] < 60
        other = qm.MultipoleCache(model.config)
        other.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
        with pytest.raises(QuickmergeError, match="was filled outside this run"):
            model(ids, **past(other))


@pytest.mark.parametrize("order", ["reduce first", "multipole first"])
def test_block_causal_merging_does_not_share(order: str, untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    ids = tokens(1, 60)

    def chunks() -> Any:
        return reduce(model, qm.Uniform(keep=0.5), mode="block_causal", chunk=8, window=4)

    makers = [chunks, lambda: qm.multipole(model)]
    first, second = makers if order == "reduce first" else makers[::-1]
    late = second()
    with torch.no_grad(), first():
        before = model(ids).logits
        for make in (second, lambda: late):
            with pytest.raises(UnsupportedModelError, match="already inside a quickmerge run"), make():
                pass
        assert torch.equal(model(ids).logits, before)


def test_runs_may_be_left_in_any_order(untouched: Callable[[Any], Any]) -> None:
    model = untouched(build("llama"))
    ids = tokens(1, 60)
    plain = generate(model, ids, 6)
    outer, inner = reduced(model), qm.multipole(model, **SMALL)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    with qm.multipole(build("llama", seed=3)):
        both = generate(model, ids, 6)
    assert held(both).layers[3].get_seq_length() == 65
    inner.__exit__(None, None, None)
    all_close(generate(model, ids, 6), plain, 0)


def test_two_reducers_still_do_not_share() -> None:
    model = build("llama")
    with (
        qm.multipole(model),
        reduced(model),
        pytest.raises(UnsupportedModelError, match="already inside a quickmerge run"),
        reduced(model),
    ):
        pass


def test_settings_of_both_show_in_their_summaries() -> None:
    model = build("llama")
    reducer = replace(REDUCERS["tome"], keep=0.3)
    with reduce(model, reducer, layer=2, recent=5) as one, qm.multipole(model, **SMALL) as other:
        generate(model, tokens(1, 80), 6)
    assert one.summary().cache_bytes < one.summary().cache_bytes_full
    stats = other.summary()
    # Half of the blocks hold 80 tokens and 5 new ones, the others about a third of that.
    assert 2 * stats.tokens == pytest.approx(85 + 29, abs=4)
