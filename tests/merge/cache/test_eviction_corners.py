"""Corners of evicting in a model: layers that keep all beside others, drafts, gradients, windows, and what is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from caches import held, past
from hosts_zoo import DEPTH, build, generate, pad, tokens, window_of
from torch import Tensor
from transformers import DynamicCache

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.cache import Evictor
from quickmerge.merge.cache.evictor import choose

ALL: dict[str, Any] = {"sinks": 2, "min_tokens": 0}
RAGGED = qm.SnapKV(0.5, window=6, kernel=3, heads="adaptive", **ALL)
METHODS = [RAGGED, qm.ObservedAttention(0.5, **ALL), qm.KVzip(0.5, chunk=12, **ALL)]
by_label = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def model_of(family: str, attn: str = "sdpa") -> Any:
    return build(family, attn, torch.float64)


def reduce(model: Any, method: Evictor) -> Any:
    return qm.reduce(model, method, recent=3)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("keep", [0.99, 0.97])
def test_a_layer_that_keeps_all_stands_beside_one_that_does_not(family: str, keep: float) -> None:
    """What can't be divided among layers leaves some of them whole, and models make one mask for many layers."""
    model, more = model_of(family), tokens(1, 5, 3)
    with torch.no_grad(), reduce(model, qm.KeyDiff(keep, **ALL)):
        cache = held(model(tokens(1, 40), use_cache=True))
        at_once = model(more, **past(cache)).logits
        cache = held(model(tokens(1, 40), use_cache=True))
        close(at_once, torch.cat([model(token[None], **past(cache)).logits for token in more.T], 1))


@by_label
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_drafts_behind_a_prompt_see_what_is_left_of_it(family: str, method: Evictor) -> None:
    """A forward that asks for several logits reads the last tokens as if they were read behind the prompt."""
    model, ids, more = model_of(family), tokens(2, 45), tokens(2, 3, 4)
    with torch.no_grad(), reduce(model, method) as run:
        out = model(ids, use_cache=True, logits_to_keep=6, output_hidden_states=True)
        assert run.summary().decode_steps == 0 and run.summary().tokens_in == 40
        assert [states.shape[1] for states in out.hidden_states] == [45] * (DEPTH + 1)
        after = model(more, **past(held(out))).logits
        first = model(ids[:, :-5], use_cache=True)
        close(out.logits, torch.cat([first.logits[:, -1:], model(ids[:, -5:], **past(held(first))).logits], 1))
        close(after, model(more, **past(held(first))).logits)


@by_label
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_assisted_decoding_writes_what_greedy_decoding_writes(family: str, method: Evictor) -> None:
    model, ids = model_of(family), torch.cat([tokens(1, 20)] * 2, 1)
    with reduce(model, method):
        wanted = generate(model, ids, 12).sequences
        assert torch.equal(generate(model, ids, 12, prompt_lookup_num_tokens=3).sequences, wanted)


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda m: m.name)
def test_gradients_reach_a_prompt_through_what_is_left_of_it(method: Evictor) -> None:
    """Those of keys and values that are kept; against the difference quotient, as near as float32 norms allow."""
    model, more = model_of("llama"), tokens(1, 3, 4)
    embeds = model.get_input_embeddings()(tokens(1, 40)).detach().requires_grad_()

    def loss(given: Tensor) -> Tensor:
        total: Tensor = model(more, **past(held(model(inputs_embeds=given, use_cache=True)))).logits.square().sum()
        return total

    with reduce(model, method):
        loss(embeds).backward()
        assert embeds.grad is not None and float(embeds.grad.abs().sum()) > 0
        step = 1e-3 * embeds.grad / embeds.grad.norm()
        with torch.no_grad():
            quotient = (loss(embeds + step) - loss(embeds - step)) / (2 * step.norm())
    assert float(embeds.grad.norm()) == pytest.approx(float(quotient), rel=2e-3)


@pytest.mark.parametrize("kind", ["equal", "adaptive"])
@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
@pytest.mark.parametrize("keep", [0.5, 0.99, 1.0])
def test_a_cache_without_windows_goes_on_as_one_with_them(family: str, keep: float, kind: str) -> None:
    model = model_of(family)
    found = []
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        with torch.no_grad(), reduce(model, qm.KeyDiff(keep, heads=kind, **ALL)):
            model(tokens(2, 40), **past(cache))
            found.append(torch.cat([model(tokens(2, n, n), **past(cache)).logits for n in (1, 4, 1)], 1))
    close(*found)


def test_sinks_that_have_left_a_window_are_nobody_s() -> None:
    """The first entries that a window still holds stay for their scores alone; where no one has left, as before."""
    method = qm.KeyDiff(0.5, sinks=3)
    scores = torch.arange(8.0).expand(1, 2, 8)
    there = torch.ones(1, 12, dtype=torch.bool)
    kept = choose(method, scores, there, torch.tensor([4]), 1)
    assert kept.nonzero()[:, 2].tolist() == [4, 5, 6, 7] * 2
    kept = choose(method, scores, there[:, 4:], torch.tensor([4]), 1)
    assert kept.nonzero()[:, 2].tolist() == [0, 1, 2, 7] * 2
    kept = choose(method, scores, there[:, 2:], torch.tensor([4]), 1)
    assert kept.nonzero()[:, 2].tolist() == [0, 5, 6, 7] * 2


@pytest.mark.parametrize("beams", [1, 3])
def test_kvzip_cuts_each_row_as_it_does_alone(beams: int) -> None:
    model, texts = model_of("llama"), [tokens(1, n, n)[0] for n in (40, 31)]
    ids, mask, _ = pad(texts, "left")
    more = {"num_beams": beams, "num_return_sequences": min(2, beams)}
    with reduce(model, qm.KVzip(0.5, chunk=12, **ALL)):
        both = generate(model, ids, 6, attention_mask=mask, **more).sequences[:, -6:].chunk(2)
        for text, wanted in zip(texts, both, strict=True):
            assert torch.equal(generate(model, text[None], 6, **more).sequences[:, -6:], wanted)


@pytest.mark.parametrize("merge", [None, "merge", "reread"])
@pytest.mark.parametrize("kind", ["equal", "adaptive"])
def test_what_somebody_protects_stays_in_every_head_and_costs_the_rest_nothing(kind: str, merge: str | None) -> None:
    """Also where the method keeps no sinks, and where tokens were merged or left out before."""
    model, ids = model_of("llama"), tokens(1, 60)
    method = qm.KeyDiff(0.3, heads=kind, sinks=0, min_tokens=0)
    reducer, more = None, {}
    if merge is not None:
        reducer = qm.GemFilter(keep=0.8, block=1) if merge == "reread" else qm.QuickMerge(keep=0.8, window=8, pool=3)
        more = {"min_tokens": 0, "sinks": 1} | ({} if merge == "reread" else {"layer": 2})

    def protect(ids: Tensor) -> Tensor:
        return (torch.arange(ids.shape[1]) < 20).expand_as(ids)

    with torch.no_grad():
        whole = []  # keys of the same prompt, of which nothing has left the cache
        for cache in (None if merge else qm.KeyDiff(1.0), method):
            with qm.reduce(model, reducer, cache=cache, recent=3, protect=protect, **more) as run:
                whole.append(held(model(ids, use_cache=True)))
    full, left = whole
    for before, after in zip(full.layers, left.layers, strict=True):
        for g in range(before.keys.shape[1]):
            for key in before.keys[0, g, :20]:
                assert bool((after.keys[0, g] == key).all(-1).any())
    if merge is None:
        counts = [60 if layer.heads.valid is None else layer.heads.valid.sum(-1) for layer in left.layers]
        held_ = sum(float(torch.as_tensor(c).float().mean()) for c in counts) if kind == "adaptive" else 0
        assert kind == "equal" or held_ == DEPTH * (20 + 0.3 * 40)
        assert kind == "adaptive" or {layer.heads.count for layer in left.layers} == {20 + 12}
    assert run.protected is not None


@pytest.mark.parametrize("name", ["sinks", "min_tokens"])
def test_a_setting_of_merging_is_refused_where_nothing_is_merged(name: str) -> None:
    with pytest.raises(QuickmergeError, match=rf"{name} is of what is merged, .* say KeyDiff\({name}=\.\.\.\)"):
        qm.reduce(build("llama"), qm.KeyDiff(0.5), **{name: 8})  # type: ignore[call-overload]


# What is told --------------------------------------------------------------------------------------------------------


def test_where_nothing_can_leave_nobody_looks() -> None:
    """A short prompt asks nothing of a model, not even room for a second reading; and the summary says so."""
    model = build("llama", dtype=torch.float64, max_position_embeddings=64)
    ids, embeds = tokens(1, 40), model.get_input_embeddings()(tokens(1, 40)).detach()
    for method in (qm.KVzip(0.5, min_tokens=41), qm.KVzip(1.0, min_tokens=0)):
        plain = generate(model, ids, 4)
        with reduce(model, method) as run:
            close(torch.stack(generate(model, ids, 4).logits), torch.stack(plain.logits))
            model(inputs_embeds=embeds, use_cache=True)
        told = "; 1 of 1 rows are below its min_tokens and keep all"
        assert (told in str(run.summary())) == (method.min_tokens > 0)
        assert run.summary().evicted_none == (method.min_tokens > 0)


def test_seconds_of_the_scores_are_those_of_the_reducer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on while scores are made, and stands still otherwise."""
    model, ticks = build("llama"), [0.0]
    scores = qm.ObservedAttention.scores

    def slow(self: Any, view: Any) -> Tensor:
        ticks[0] += 1.0
        return scores(self, view)

    monkeypatch.setattr(qm.ObservedAttention, "scores", slow)
    with torch.no_grad(), reduce(model, METHODS[1]) as run:
        monkeypatch.setattr(type(run), "clock", lambda self: ticks[0])
        model(tokens(1, 40), use_cache=True)
        assert run.summary().reducer_seconds == run.summary().prefill_seconds == DEPTH


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_bytes_of_a_whole_cache_are_those_of_the_plain_model(family: str) -> None:
    """Whatever is stored packed, and while text goes on."""
    model = build(family, hidden_size=64)
    with torch.no_grad():
        cache = held(model(tokens(2, 60), use_cache=True))
        model(tokens(2, 4, 3), **past(cache))
        full = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)
        with reduce(model, replace(RAGGED, floor=0.0)) as run:
            cache = held(model(tokens(2, 60), use_cache=True))
            model(tokens(2, 4, 3), **past(cache))
            assert run.summary().cache_bytes_full == full


def test_a_cache_without_windows_would_hold_everything() -> None:
    model = model_of("mistral")
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        with torch.no_grad(), reduce(model, qm.KeyDiff(1.0, **ALL)) as run:
            model(tokens(1, 40), **past(cache))
            model(tokens(1, 3), **past(cache))
        assert run.summary().cache_bytes == run.summary().cache_bytes_full


def test_a_cache_that_was_not_given_needs_to_be_asked_for() -> None:
    model = build("llama")
    model.config.use_cache = False
    with torch.no_grad(), reduce(model, RAGGED):
        assert model(tokens(1, 40), logits_to_keep=4).logits.shape[1] == 4
        with pytest.raises(QuickmergeError, match="attention_mask must be"):
            model(tokens(1, 40), attention_mask=torch.ones(1, 39), logits_to_keep=4, use_cache=True)
    assert window_of(model.config, 0) is None
