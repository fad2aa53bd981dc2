"""``protect="literals"``: whole literals stay alone whatever the budget, in both modes, in batches and in the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from caches import past
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop
from tokenizer_samples import byte_level, sentencepiece_bpe
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.text.modes import LITERALS, protecting
from quickmerge.models.literals import literal_mask

TOKENIZERS = {"byte level": byte_level, "sentencepiece": sentencepiece_bpe}
TEXT = (
    "The cat 12,345 sat on /etc/passwd and the dog mailed a.b@c.org. 猫は2024年に座っています。 naïve déjà_vu ran. "
    "A transformer pays for every token that it reads, and so the cat and the dog and the mat: really! "
) * 2
WORDS = "the cat and the dog sat on the mat and ran after the cat "


def tiny(kind: str, depth: int = 4) -> tuple[Any, Any]:
    tokenizer = TOKENIZERS[kind]()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=depth, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().double(), tokenizer


@pytest.fixture(scope="module", params=TOKENIZERS)
def host(request: Any) -> tuple[Any, Any]:
    return tiny(request.param)


def ids_of(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def marks(tokenizer: Any, ids: torch.Tensor) -> torch.Tensor:
    return literal_mask(ids, torch.ones_like(ids, dtype=torch.bool), tokenizer)


METHODS = [qm.QuickMerge(), qm.ToMe(), qm.Truncate(), qm.Random(), qm.GemFilter(), qm.SpecPrefill()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@prop(6)
@given(
    keep=st.floats(0.01, 1.0),
    words=st.lists(st.sampled_from([*WORDS.split(), "12,345", "/etc/x", "a_b"]), min_size=30, max_size=60),
)
def test_whole_literals_stay_alone_whatever_the_budget(method: Any, keep: float, words: list[str]) -> None:
    model, tokenizer = tiny("byte level")
    ids = ids_of(tokenizer, " ".join(words))
    wanted = marks(tokenizer, ids)
    with (
        torch.no_grad(),
        qm.reduce(model, replace(method, keep=keep), protect=LITERALS, tokenizer=tokenizer, min_tokens=0) as run,
    ):
        model(ids)
    assert run.stats.literals == int(wanted.sum())
    for plan in run.composed:
        there = plan.slot[0][wanted[0]]
        assert bool((there >= 0).all())
        sizes = plan.size[0][there]
        assert bool((sizes == 1).all()), "a literal's token shares its slot"


def test_the_others_are_given_what_they_would_be_given_alone(host: tuple[Any, Any]) -> None:
    model, tokenizer = host
    ids = ids_of(tokenizer, TEXT)
    literals = int(marks(tokenizer, ids)[0, 4:-16].sum())
    with torch.no_grad(), qm.reduce(model, qm.QuickMerge(keep=0.3), 2, protect=LITERALS, tokenizer=tokenizer,
                                    min_tokens=0) as run:  # fmt: skip
        model(ids)
    assert run.plan.slots == literals + int((ids.shape[1] - literals) * 0.3 + 0.5 + 1e-9)
    told = str(run.summary())
    total = int(marks(tokenizer, ids).sum())
    assert f"literals: {total} tokens stay alone on top of keep, {100 * total / ids.shape[1]:.0f} % of all" in told


def test_the_summary_says_where_literals_are_more_than_all_else(host: tuple[Any, Any]) -> None:
    model, tokenizer = host
    ids = ids_of(tokenizer, "12345 67890 " * 20 + WORDS * 4)
    with torch.no_grad(), qm.reduce(model, qm.QuickMerge(keep=0.1), 2, protect=LITERALS, tokenizer=tokenizer,
                                    min_tokens=0) as run:  # fmt: skip
        model(ids)
    assert "that are kept of the others" in str(run.summary())


def test_without_literals_nothing_changes(host: tuple[Any, Any]) -> None:
    model, tokenizer = host
    ids = ids_of(tokenizer, WORDS * 5)
    assert not bool(marks(tokenizer, ids).any())
    plans = []
    for protect in (None, LITERALS):
        with torch.no_grad(), qm.reduce(model, qm.QuickMerge(keep=0.3), protect=protect, tokenizer=tokenizer,
                                        min_tokens=0) as run:  # fmt: skip
            model(ids)
        plans.append(run.plan.slot)
    assert torch.equal(*plans)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_what_its_rows_are(host: tuple[Any, Any], side: str) -> None:
    model, tokenizer = host
    rows = [ids_of(tokenizer, text)[0] for text in (TEXT, WORDS * 3, "12 of 34 " * 14 + WORDS)]
    width = max(map(len, rows))
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for i, row in enumerate(rows):
        here = slice(width - len(row), None) if side == "left" else slice(None, len(row))
        ids[i, here], mask[i, here] = row, 1
    place = (mask.cumsum(-1) - 1).clamp_min(0)
    settings: dict[str, Any] = {"protect": LITERALS, "tokenizer": tokenizer, "min_tokens": 0}
    with torch.no_grad(), qm.reduce(model, qm.QuickMerge(keep=0.3), 2, **settings) as run:
        model(ids, attention_mask=mask, position_ids=place)
        plan = run.plan
        for i, row in enumerate(rows):
            model(row[None])
            assert torch.equal(plan.position[i][plan.valid[i]], run.plan.position[0][run.plan.valid[0]]), i


def test_a_chat_template_is_marks_and_text(host: tuple[Any, Any]) -> None:
    """Special tokens are no literals, and what stands on both sides of one is not one."""
    model, tokenizer = host
    mark = tokenizer.eos_token_id
    ids = torch.cat(
        [torch.tensor([[mark]]), ids_of(tokenizer, TEXT), torch.tensor([[mark]]), ids_of(tokenizer, "12")], 1
    )
    with torch.no_grad(), qm.reduce(model, qm.QuickMerge(keep=0.2), 2, protect=LITERALS, tokenizer=tokenizer,
                                    min_tokens=0) as run:  # fmt: skip
        model(ids)
    assert run.stats.literals == int(marks(tokenizer, ids).sum())


def test_a_function_beside_literals(host: tuple[Any, Any]) -> None:
    model, tokenizer = host
    ids = ids_of(tokenizer, TEXT)
    mode = protecting(qm.Prefix(protect=LITERALS, min_tokens=0, tokenizer=tokenizer), lambda x: x == x[:, 30:31])
    with torch.no_grad(), qm.reduce(model, qm.QuickMerge(keep=0.1), 2, mode=mode) as run:
        model(ids)
    wanted = marks(tokenizer, ids) | (ids == ids[:, 30:31])
    assert set(wanted[0].nonzero().flatten().tolist()) <= set(run.plan.position[0].tolist())
    own = qm.Prefix(protect=lambda x: x == 1)
    assert protecting(own, lambda x: x == 2) is own  # a user's own function is not added to


# Block-causal mode ---------------------------------------------------------------------------------------------------


BLOCKS: dict[str, Any] = {"mode": "block_causal", "chunk": 32, "window": 16, "protect": LITERALS}


@pytest.mark.parametrize("piece", [1, 7, 50])
def test_in_block_causal_mode_a_text_is_read_the_same_in_pieces(host: tuple[Any, Any], piece: int) -> None:
    model, tokenizer = host
    ids = ids_of(tokenizer, TEXT)[:, :150]
    with torch.no_grad(), qm.reduce(model, qm.QuickMerge(keep=0.1), tokenizer=tokenizer, **BLOCKS) as run:
        whole = model(ids, use_cache=False).logits
        assert run.stats.literals and run.stats.tokens_per_layer[0] > run.stats.literals
        cache, parts = DynamicCache(), []
        for part in ids.split(piece, 1):
            parts.append(model(part, **past(cache), use_cache=True).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)


def test_in_block_causal_mode_literals_keep_their_own_entries(host: tuple[Any, Any]) -> None:
    """Of the chunks that were merged, every literal's token has a slot: by how many entries a layer holds."""
    model, tokenizer = host
    ids = ids_of(tokenizer, TEXT)
    found = {}
    for protect in (None, LITERALS):
        cache = DynamicCache()
        with torch.no_grad(), qm.reduce(model, qm.Truncate(keep=0.1), tokenizer=tokenizer,
                                        **{**BLOCKS, "protect": protect, "sinks": 0}) as run:  # fmt: skip
            model(ids, **past(cache), use_cache=True)
        found[protect] = cache.layers[0]
        literals = run.stats.literals
    held, plain = found[LITERALS], found[None]
    assert held.slots > plain.slots
    chunks = held.absorbed // 32
    free = 32 * chunks - literals
    # each chunk: its literals, and a tenth of its other tokens, at least one
    assert literals + 1 * chunks <= held.slots <= literals + 0.1 * free + chunks


def test_a_chunk_of_literals_alone(host: tuple[Any, Any]) -> None:
    model, tokenizer = host
    ids = ids_of(tokenizer, "1234567890 " * 40)[:, :120]
    assert bool(marks(tokenizer, ids).float().mean() > 0.9)
    with torch.no_grad():
        plain = model(ids).logits
        with qm.reduce(model, qm.QuickMerge(keep=0.1), tokenizer=tokenizer, **BLOCKS):
            got = model(ids).logits
    assert got.shape == plain.shape and bool(got.isfinite().all())


def test_later_text_changes_nothing_before_it(host: tuple[Any, Any]) -> None:
    """A quote that is closed far behind, or an address that goes on, says nothing of what was read."""
    model, tokenizer = host
    first = ids_of(tokenizer, TEXT)[:, :100]
    with torch.no_grad(), qm.reduce(model, qm.QuickMerge(keep=0.1), tokenizer=tokenizer, **BLOCKS):
        ends = [
            model(torch.cat([first, ids_of(tokenizer, text)], 1)).logits[:, :100] for text in ('"12', "345 cat", "b_c")
        ]
    assert torch.allclose(ends[0], ends[1], atol=1e-12) and torch.allclose(ends[0], ends[2], atol=1e-12)


# The cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["evictor", "reduce"])
@pytest.mark.parametrize("method", [qm.AttentionNorm, qm.SnapKV, qm.KVzip, qm.StreamingLLM], ids=lambda m: m.name)
def test_literals_stay_in_every_head_of_a_cache(host: tuple[Any, Any], method: Any, told: str) -> None:
    model, tokenizer = host
    ids = ids_of(tokenizer, TEXT)
    wanted = set(marks(tokenizer, ids)[0].nonzero().flatten().tolist())
    evictor = method(keep=0.1, min_tokens=0, protect=LITERALS if told == "evictor" else None)
    settings = {"protect": LITERALS} if told == "reduce" else {}
    cache = DynamicCache()
    with torch.no_grad(), qm.reduce(model, evictor, tokenizer=tokenizer, **settings) as run:  # type: ignore[arg-type]
        model(ids, **past(cache), use_cache=True)
    assert run.stats.literals == len(wanted)
    whole = DynamicCache()
    with torch.no_grad():
        model(ids, **past(whole), use_cache=True)
    for layer, full in zip(cache.layers, whole.layers, strict=True):
        assert layer.keys.shape[2] < full.keys.shape[2]
        for head in range(full.keys.shape[1]):
            for column in wanted:
                assert bool((layer.keys[0, head] == full.keys[0, head, column]).all(-1).any()), (head, column)


# What can't be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protect": "literal"}, "protect must be 'literals', a function of input_ids, several of these or None, got "
                                 "'literal'.*literals"),
        ({"protect": 3}, "protect must be 'literals'.*got 3"),
        ({"protect": ["literals", 3]}, "protect must be 'literals'.*got 3"),
        ({"protect": LITERALS}, "tokenizer must be given for protect='literals'.*tokenizer="),
        ({"protect": LITERALS, "mode": "block_causal"}, "tokenizer must be given for protect='literals'"),
        ({"protect": "numbers", "mode": "block_causal"}, "protect must be 'literals' or None in block_causal mode"),
    ],
)  # fmt: skip
def test_what_can_t_be_is_one_sentence(settings: dict[str, Any], message: str) -> None:
    model, _ = tiny("byte level")
    with pytest.raises(ValueError, match=message):
        qm.reduce(model, qm.QuickMerge(keep=0.4), **settings)


def test_a_cache_asks_for_a_tokenizer_too_and_knows_no_other_word() -> None:
    model, _ = tiny("byte level")
    with pytest.raises(QuickmergeError, match="tokenizer must be given for protect='literals'"):
        qm.reduce(model, qm.SnapKV(keep=0.4, protect=LITERALS))
    with pytest.raises(QuickmergeError, match="protect must be 'literals' or None, got 'lines'"):
        qm.SnapKV(protect="lines")


@pytest.mark.parametrize("settings", [{"min_tokens": 0}, {"mode": "block_causal"}])
def test_embeddings_have_no_literals(settings: dict[str, Any]) -> None:
    model, tokenizer = tiny("byte level")
    embeds = model.get_input_embeddings()(ids_of(tokenizer, TEXT))
    with (
        torch.no_grad(),
        qm.reduce(model, qm.QuickMerge(keep=0.4), protect=LITERALS, tokenizer=tokenizer, **settings),
        pytest.raises(QuickmergeError, match="protect needs input_ids"),
    ):
        model(inputs_embeds=embeds)


def test_a_cache_of_other_rules_is_refused(host: tuple[Any, Any]) -> None:
    model, tokenizer = host
    ids, cache = ids_of(tokenizer, TEXT), DynamicCache()
    with torch.no_grad(), qm.reduce(model, qm.QuickMerge(keep=0.4), tokenizer=tokenizer, **BLOCKS):
        model(ids, **past(cache), use_cache=True)
    with (
        torch.no_grad(),
        qm.reduce(model, qm.QuickMerge(keep=0.4), **{**BLOCKS, "protect": None}),
        pytest.raises(QuickmergeError, match=r"other settings.*protect=None and not 'literals'"),
    ):
        model(ids[:, :3], **past(cache), use_cache=True)
