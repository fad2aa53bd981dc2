from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from caches import held
from caches import past as past_cache
from hosts_zoo import DEPTH, ZOO, assert_detached, generate, pad, stored, tokens
from run_samples import ALL, SMALL, all_close, check_clusters, close, clustered, model_of, read
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import quickmerge as qm
import quickmerge.multipole.run as run_module
from quickmerge.errors import QuickmergeError
from quickmerge.multipole import MultipoleLayer


def left(lengths: tuple[int, ...], seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows without a token twice, for a vocabulary of 997, padded on the left; and their mask."""
    draws = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(994, generator=draws)[:n] + 3 for n in lengths]
    return (rows, *pad(rows, "left")[:2])


def follow(model: Any, ids: Tensor, mask: Tensor, extra: Tensor) -> Tensor:
    """Logits of a prompt's last token and of ``extra`` tokens after it, as ``generate`` would ask for them."""
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=position)
        logits = [out.logits[:, -1]]
        for i in range(extra.shape[1]):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            logits.append(
                model(
                    extra[:, i : i + 1], attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1,
                    **past_cache(held(out)),
                ).logits[:, -1]
            )  # fmt: skip
    return torch.stack(logits, 1)


# With a budget for everything it is the model ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ZOO)
def test_with_a_budget_for_all_keys_it_is_the_model(family: str, untouched: Callable[[Any], Any]) -> None:
    ids, mask, _ = pad([tokens(1, n, n)[0] for n in (40, 27)], "left")
    told = {**SMALL, "budget": ALL, "interval": 4}
    model = untouched(model_of(family, torch.float32))
    wanted = generate(model, ids, 12, attention_mask=mask)
    with qm.multipole(model, **told) as run:
        found = generate(model, ids, 12, attention_mask=mask)
    assert float(torch.stack(wanted.logits).abs().max()) < 20
    all_close(found, wanted, 1e-5)
    layers = clustered(held(found))
    assert len(layers) == sum(window is None for window in run.decoder.windows)
    assert min(int(layer.clusters.end.min()) for layer in layers) >= 40
    assert run.summary().rows_read == pytest.approx(run.summary().rows_dense)
    model = untouched(model_of(family, vocab_size=997))
    _, ids, mask = left((40, 27))
    extra = tokens(2, 8, 5)
    exact = follow(model, ids, mask, extra)
    for settings in ({}, {"space": "windowed", "coarse": 0.1}):
        with qm.multipole(model, **told | settings):
            close(follow(model, ids, mask, extra), exact)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_in_front_of_eager_attention_it_is_the_model_too(family: str, untouched: Callable[[Any], Any]) -> None:
    model = untouched(model_of(family, torch.float32, attn="eager"))
    ids, mask, _ = pad([tokens(1, n, n)[0] for n in (40, 27)], "left")
    wanted = generate(model, ids, 8, attention_mask=mask)
    with qm.multipole(model, **SMALL | {"budget": ALL}):
        all_close(generate(model, ids, 8, attention_mask=mask), wanted, 1e-5)
        step = generate(model, ids[:1], 8)
    all_close(step, generate(model, ids[:1], 8), 1e-5)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox", "llama", "smollm3"])
def test_with_a_small_budget_it_reads_less_and_goes_on(family: str, untouched: Callable[[Any], Any]) -> None:
    model = untouched(model_of(family, torch.bfloat16))
    ids, mask, _ = pad([tokens(1, n, n)[0] for n in (60, 37)], "left")
    ways: list[dict[str, Any]] = [{}, {"space": "windowed", "coarse": 0.1}]
    if family == "llama":
        ways += [{"select": "top_p", "top_p": 0.5}, {"budget": 0, "variance": True}, {"replacement": False}]
    for settings in ways:
        with qm.multipole(model, **{**SMALL, "interval": 4, **settings}) as run:
            out = generate(model, ids, 8, attention_mask=mask)
        assert out.sequences.shape == (2, 68) and all(bool(step.isfinite().all()) for step in out.logits)
        assert stored(held(out)) == [67] * DEPTH
        stats = run.summary()
        assert 0 < stats.rows_read < stats.rows_dense and stats.kept <= SMALL["budget"]
        assert stats.decode_steps == 7 and stats.rows == 2 and stats.updates >= 1
        assert (stats.kept == 0) == (settings.get("budget") == 0)


def test_a_small_budget_changes_what_is_read_but_not_the_prompt() -> None:
    model = model_of()
    ids = tokens(1, 80)
    wanted = generate(model, ids, 3)
    with qm.multipole(model, **SMALL | {"budget": 0}):
        found = generate(model, ids, 3)
    assert torch.equal(found.logits[0], wanted.logits[0])
    assert float((found.logits[1] - wanted.logits[1]).abs().max()) > 1e-3


# Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "space"), [("llama", "rotated"), ("gemma3_text", "rotated"), ("gpt_neox", "windowed")]
)
def test_a_padded_batch_is_its_rows(family: str, space: str) -> None:
    """One row is long, one short, one has too few tokens to cluster for a while, one fewer than the sink."""
    model = model_of(family, vocab_size=997)
    rows, ids, mask = left((70, 41, 15, 2))
    extra = torch.stack(left((12,) * 4, seed=1)[0])
    settings = {**SMALL, "space": space, "interval": 5}
    with qm.multipole(model, **settings) as run:
        together = follow(model, ids, mask, extra)
        assert run.summary().updates >= 2
        for i, row in enumerate(rows):
            close(follow(model, row[None], torch.ones_like(row)[None], extra[i : i + 1])[0], together[i], 1e-8)
    assert float((together - follow(model, ids, mask, extra)).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "smollm3"])
def test_in_the_windowed_space_centroids_are_means_of_keys_that_were_not_rotated(family: str) -> None:
    """What a layer's projection gave, before the rotation, in a padded batch; a block without rotation has no other."""
    model = model_of(family, vocab_size=997)
    _, ids, mask = left((60, 37))
    layer, bare = (1 if family == "smollm3" else 2), []
    assert family == "llama" or not model.config.no_rope_layers[layer]
    handle = model.model.layers[layer].self_attn.k_proj.register_forward_hook(
        lambda module, args, out: bare.append(out.unflatten(-1, (2, -1)).transpose(1, 2))
    )
    caches = []
    with qm.multipole(model, **SMALL | {"interval": 4}, space="windowed") as run, torch.no_grad():
        watch = model.model.register_forward_hook(lambda module, args, out: caches.append(held(out)))
        follow(model, ids, mask, tokens(2, 14, 3))
        watch.remove()
    handle.remove()
    assert run.spaces[layer].rotary is not None
    keys, clusters = torch.cat(bare, 2), caches[-1].layers[layer].clusters
    assert int(clusters.end.min()) > 60
    for row in range(2):
        first, length = int(clusters.start[row]), int(clusters.end[row] - clusters.start[row])
        for head in range(2):
            label = clusters.labels[row, head, :length]
            for i in label.unique().tolist():
                members = first + (label == i).nonzero()[:, 0]
                close(clusters.key[row, head, i], keys[row, head, members].mean(0), 1e-5)


def test_padding_on_the_right_is_never_read() -> None:
    """What stands in padded columns changes nothing; with a budget for all keys it is the model."""
    model = model_of()
    ids, mask, position = pad([tokens(1, n, n)[0] for n in (60, 37)], "right")
    extra = tokens(2, 6, 5)
    grown = torch.cat([mask, torch.ones_like(extra)], 1)
    places = position.amax(1, keepdim=True) + 1 + torch.arange(6)

    def last(prompt: Tensor) -> Tensor:
        cache = held(model(prompt, attention_mask=mask, position_ids=position))
        return model(extra, **past_cache(cache), attention_mask=grown, position_ids=places).logits

    other = torch.where(mask == 1, ids, 5)
    with torch.no_grad():
        wanted = last(ids)
        with qm.multipole(model, **SMALL | {"budget": ALL}):
            close(last(ids), wanted)
        with qm.multipole(model, **SMALL | {"budget": 8}):
            found = last(ids)
            close(last(other), found)
    assert float((found - wanted).abs().max()) > 1e-6


# Ways to generate --------------------------------------------------------------------------------------------------


def test_sampling_draws_the_same_with_a_budget_for_all_keys() -> None:
    model = model_of()
    ids = tokens(2, 50)
    torch.manual_seed(3)
    wanted = generate(model, ids, 12, do_sample=True)
    torch.manual_seed(3)
    with qm.multipole(model, **SMALL | {"budget": ALL}):
        found = generate(model, ids, 12, do_sample=True)
    all_close(found, wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_beams_keep_their_rows_with_their_clusters(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family)
    ids, mask, _ = pad([tokens(1, n, n)[0] for n in (40, 27)], "left")
    settings = {**SMALL, "interval": 3}
    more = {"num_beams": 3, "attention_mask": mask}
    wanted = generate(model, ids, 14, **more)
    with qm.multipole(model, **settings | {"budget": ALL}):
        all_close(generate(model, ids, 14, **more), wanted, 1e-5)
    moves, reorder = [], MultipoleLayer.reorder_cache

    def note(layer: MultipoleLayer, index: Tensor) -> None:
        moves.append(index.tolist())
        reorder(layer, index)

    monkeypatch.setattr(MultipoleLayer, "reorder_cache", note)
    with qm.multipole(model, **settings) as run:
        out = generate(model, ids, 14, **more)
    assert sum(move != [0, 1, 2, 3, 4, 5] for move in moves) >= 3
    layers = clustered(held(out))
    assert layers and run.summary().updates >= 3
    for layer in layers:
        # Each row's centroids are means of its own keys, also of those that were generated.
        assert len(layer.keys) == 6 and int(layer.clusters.end.min()) > 45
        check_clusters(layer)


def test_prompt_lookup_reads_several_tokens_at_once_and_takes_them_back() -> None:
    model = model_of()
    ids = tokens(1, 16).repeat(1, 4)
    plain = generate(model, ids, 30)
    with qm.multipole(model, **SMALL | {"budget": ALL}) as run:
        found = generate(model, ids, 30, prompt_lookup_num_tokens=4)
        stats = run.summary()
    assert torch.equal(found.sequences, plain.sequences)
    assert stats.decode_steps < 29
    with qm.multipole(model, **SMALL):
        out = generate(model, ids, 30, prompt_lookup_num_tokens=4)
    assert out.sequences.shape == (1, 94)
    for layer in clustered(held(out)):
        assert layer.get_seq_length() == 93 and int(layer.clusters.end.max()) <= 93
        check_clusters(layer)


def test_an_assistant_may_read_by_clusters_too() -> None:
    model, assistant = model_of(), model_of(seed=0, num_hidden_layers=2)
    ids = tokens(1, 60)
    plain = generate(model, ids, 16)
    with qm.multipole(model, **SMALL | {"budget": ALL}), qm.multipole(assistant, **SMALL) as run:
        found = generate(model, ids, 16, assistant_model=assistant)
    assert torch.equal(found.sequences, plain.sequences) and run.summary().decode_steps > 0
    assert_detached(assistant, "sdpa")


def test_a_prompt_in_chunks_is_read_exactly() -> None:
    model = model_of()
    ids = tokens(2, 100)
    wanted = generate(model, ids, 8)
    with qm.multipole(model, **SMALL | {"queries": 16}) as run:
        whole = generate(model, ids, 8)
        chunks = generate(model, ids, 8, prefill_chunk_size=25)
        steps = run.summary().decode_steps
    # The chunks have 25 tokens, more than a forward that reads clusters may have.
    close(chunks.logits[0], wanted.logits[0])
    all_close(chunks, whole)
    assert steps == 7


def test_a_short_chunk_reads_clusters() -> None:
    model = model_of()
    ids = tokens(1, 100)
    with qm.multipole(model, **SMALL | {"queries": 25}) as run:
        out = generate(model, ids, 1, prefill_chunk_size=25)
        assert run.summary().decode_steps == 3 and clustered(held(out))
    with qm.multipole(model, **SMALL | {"queries": 25, "budget": ALL}):
        close(generate(model, ids, 1, prefill_chunk_size=25).logits[0], generate(model, ids, 1).logits[0])


# The cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [DynamicCache, lambda config: DynamicCache(config=config), qm.MultipoleCache])
def test_a_cache_may_be_brought_along(make: Any) -> None:
    for family in ("llama", "gemma3_text"):
        model = model_of(family)
        ids = tokens(1, 60)
        cache = make() if make is DynamicCache else make(model.config)
        with qm.multipole(model, **SMALL):
            wanted = generate(model, ids, 12)
            found = generate(model, ids, 12, **past_cache(cache))
            all_close(found, wanted)
            assert held(found) is cache
            sliding = [type(layer) for layer in cache.layers if not isinstance(layer, MultipoleLayer)]
            assert set(sliding) <= {DynamicLayer, DynamicSlidingWindowLayer}
            assert len(sliding) == (DEPTH // 2 if family == "gemma3_text" else 0)


def test_a_cache_goes_on_afterwards_and_later() -> None:
    """Behind the run it is a plain cache; in another one its clusters are used again, or made anew."""
    model = model_of()
    ids, extra = tokens(1, 60), tokens(1, 20, 7)
    with torch.no_grad():
        with qm.multipole(model, **SMALL):
            out = generate(model, ids, 12)
        cache = held(out)
        dense = held(generate(model, out.sequences[:, :-1], 1))
        # Keys and values above the first block were computed by clusters, so the caches differ there.
        close(cache.layers[0].keys, dense.layers[0].keys)
        after = read(model, extra, copy.deepcopy(cache))
        assert bool(after.isfinite().all())
        again, made = copy.deepcopy(cache), cache.layers[1].clusters
        with qm.multipole(model, **SMALL | {"budget": ALL}):
            close(read(model, extra[:, :1], again), after[:, :1])
            labels = again.layers[1].clusters.labels
            assert torch.equal(labels[..., : made.width], made.labels)
        with qm.multipole(model, **SMALL | {"ratio": 0.5}):
            read(model, extra[:, :1], again)
            assert len(again.layers[1].clusters) > len(made)
            check_clusters(again.layers[1])


def test_a_cache_filled_outside_may_be_read_inside() -> None:
    model = model_of()
    ids, extra = tokens(2, 60), tokens(2, 9, 7)
    cache = qm.MultipoleCache(model.config)
    with torch.no_grad():
        model(ids, **past_cache(cache))
        with qm.multipole(model, **SMALL) as run:
            found = read(model, extra, cache)
            wanted = read(model, extra, held(model(ids)))
        close(found, wanted)
        assert run.summary().clusters > 0
        with (
            qm.multipole(model, **SMALL, space="windowed"),
            pytest.raises(QuickmergeError, match="nobody noted positions, which space='windowed' needs"),
        ):
            read(model, extra, cache)


@pytest.mark.parametrize(("taken", "settings"), [(5, {}), (40, {}), (40, {"block": 256}), (40, {"space": "windowed"})])
def test_what_was_taken_back_was_never_there(taken: int, settings: dict[str, Any]) -> None:
    """Cropping inside the buffer, and through clusters, then going on as a run that never saw those tokens."""
    model = model_of()
    ids, extra, wrong = tokens(1, 100), tokens(1, 20, 7), tokens(1, taken, 8)
    told = {**SMALL, "interval": 16, **settings}
    with torch.no_grad(), qm.multipole(model, **told):
        cache = held(model(ids))
        read(model, wrong[:, :1], cache)
        if taken > 5:
            read(model, wrong[:, 1:], cache)
        else:
            read(model, wrong[:, 1:], cache, step=4)
        before = cache.layers[1].clusters
        cache.crop(-taken)
        if taken > 5 and "block" in settings:
            assert cache.layers[1].clusters is None
        found = read(model, extra, cache)
        assert taken == 5 or cache.layers[1].clusters is not before
        fresh = held(model(ids))
        wanted = read(model, extra, fresh)
    if taken == 5 or "block" in settings:
        close(found, wanted)
    for layer in clustered(cache) if "space" not in settings else ():
        check_clusters(layer)
    # Blocks before the cut stay as they are; what comes after them is clustered anew, and as good.
    assert stored(cache) == stored(fresh)


def test_a_second_prompt_is_read_exactly_and_joins_the_clusters() -> None:
    model = model_of()
    ids, more, extra = tokens(1, 60), tokens(1, 50, 5), tokens(1, 4, 7)
    with torch.no_grad():
        dense = held(model(ids))
        wanted = model(more, **past_cache(dense)).logits
        with qm.multipole(model, **SMALL | {"queries": 10, "update": False}):
            cache = held(model(ids))
            close(model(more, **past_cache(cache)).logits, wanted)
            read(model, extra, cache)
            assert int(cache.layers[1].clusters.end) > 90
            check_clusters(cache.layers[1])
            end = int(cache.layers[1].clusters.end)
            read(model, tokens(1, 40, 9), cache)
            # What is generated is not clustered without updates.
            assert int(cache.layers[1].clusters.end) == end


def test_updates_are_those_of_the_settings() -> None:
    model = model_of()
    with torch.no_grad(), qm.multipole(model, **SMALL | {"interval": 8, "sink": 3}) as run:
        cache = held(model(tokens(1, 50)))
        for i in range(40):
            read(model, tokens(1, 1, i), cache)
            past = 50 + i
            end = 3 + ((past - 3) // 8 - 1) * 8
            assert int(cache.layers[1].clusters.end) == end and 8 <= past - end < 16
        assert run.summary().updates == 5
    with torch.no_grad(), qm.multipole(model, **SMALL | {"update": False}):
        cache = held(model(tokens(1, 15)))
        read(model, tokens(1, 40), cache)
        assert cache.layers[1].clusters is None


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_cache_may_be_filled_in_one_mode_of_autograd_and_read_in_another(first: Any, then: Any) -> None:
    model = model_of()
    ids, extra = tokens(1, 40), tokens(1, 10, 7)
    if first is torch.inference_mode and then is torch.enable_grad:
        for p in model.parameters():
            p.requires_grad_(False)  # what was made in inference mode can't be differentiated, here or elsewhere
    with qm.multipole(model, **SMALL):
        with torch.no_grad():
            wanted = read(model, extra, held(model(ids)))
        with first():
            cache = held(model(ids))
        with then():
            found = read(model, extra, cache)
    close(found.detach(), wanted)


def test_under_autocast_clusters_are_read_as_precisely_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(dtype=torch.float32)
    attend, modes = run_module.attend_and_count, []

    def spy(*args: Any, **kwargs: Any) -> Any:
        modes.append(torch.is_autocast_enabled("cpu"))
        return attend(*args, **kwargs)

    monkeypatch.setattr(run_module, "attend_and_count", spy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), qm.multipole(model, **SMALL):
        cache = held(model(tokens(1, 40)))
        found = read(model, tokens(1, 10, 7), cache)
    assert modes == [False] * 40 and found.dtype == torch.bfloat16 and bool(found.isfinite().all())
