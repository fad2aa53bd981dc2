"""Vectors from text alone: counts and PPMI by loops, and that company decides who is alike."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quickmerge.errors import QuickmergeError
from quickmerge.transplant import donor as module
from quickmerge.transplant.donor import count_pairs, embeddings_from_text, ppmi_vectors, unseen


def of_words(words: list[str]) -> Any:
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")


def slow_counts(documents: list[list[int]], window: int) -> dict[tuple[int, int], int]:
    out: dict[tuple[int, int], int] = {}
    for ids in documents:
        for a, i in enumerate(ids):
            for b, j in enumerate(ids):
                if a != b and abs(a - b) <= window:
                    out[i, j] = out.get((i, j), 0) + 1
    return out


DOCUMENTS = st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=4)


@prop(30)
@given(documents=DOCUMENTS, window=st.integers(1, 4), block=st.sampled_from((1, 5, 1000)))
def test_counts(documents: list[list[int]], window: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOKENS", block)
        key, count = count_pairs(documents, 6, window)
    got = {divmod(int(k), 6): int(n) for k, n in zip(key, count, strict=True)}
    assert got == slow_counts(documents, window)
    assert list(key) == sorted(key)


@prop(15)
@given(documents=DOCUMENTS, smoothing=st.sampled_from((0.0, 0.75, 1.0)))
def test_vectors_are_the_root_of_the_ppmi_matrix(documents: list[list[int]], smoothing: float) -> None:
    counts = slow_counts(documents, 2)
    if not counts:
        return
    total = sum(counts.values())
    own = [sum(n for (i, _), n in counts.items() if i == t) for t in range(6)]
    smooth = [n**smoothing if n else 0.0 for n in own]
    ppmi = torch.zeros(6, 6, dtype=torch.float64)
    for (i, j), n in counts.items():
        ppmi[i, j] = max(0.0, math.log(n / total / (own[i] / total * smooth[j] / sum(smooth))))
    vectors = ppmi_vectors(*count_pairs(documents, 6, 2), 6, 8, smoothing=smoothing).double()
    assert vectors.shape == (6, 8)
    assert not vectors[:, 6:].any()
    # With nothing cut off, V V^T is (M M^T)^(1/2).
    u, s, _ = torch.linalg.svd(ppmi)
    torch.testing.assert_close(vectors @ vectors.T, (u * s) @ u.T, rtol=1e-4, atol=1e-4)


def test_company_decides() -> None:
    rng = random.Random(0)
    fruit, tool, rest = ["apple", "pear", "plum"], ["saw", "drill", "file"], ["red", "sweet", "loud", "steel"]
    tokenizer = of_words([*fruit, *tool, *rest, "never"])
    texts = []
    for _ in range(300):
        group, company = rng.choice([(fruit, rest[:2]), (tool, rest[2:])])
        texts.append(f"{rng.choice(company)} {rng.choice(group)} {rng.choice(company)}")
    vectors = embeddings_from_text(tokenizer, texts, width=4, window=2)
    assert vectors.shape == (12, 4)
    ids = tokenizer.convert_tokens_to_ids
    alike = torch.nn.functional.normalize(vectors, dim=1) @ torch.nn.functional.normalize(vectors, dim=1).T
    assert alike[ids("apple"), ids("plum")] > 0.9
    assert alike[ids("saw"), ids("drill")] > 0.9
    assert alike[ids("apple"), ids("saw")] < 0.3
    assert unseen(vectors).tolist() == [0, ids("never")]
    assert torch.equal(vectors, embeddings_from_text(tokenizer, iter(texts), width=4, window=2))


def test_long_texts_are_cut_at_spaces_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHARACTERS", 10)
    parts = list(module._parts("one two three four five six  seven"))
    assert "".join(parts) == "one two three four five six  seven"
    assert all(part.startswith(" ") for part in parts[1:])
    assert len(parts) == 3


def test_randomness_outside_is_left_alone() -> None:
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    ppmi_vectors(*count_pairs([[0, 1, 2, 1]], 3, 1), 3, 2)
    assert torch.equal(torch.rand(1), want)


def test_what_it_refuses() -> None:
    tokenizer = of_words(["a"])
    for texts in ([], ["", "a"]):
        with pytest.raises(QuickmergeError, match="texts must hold at least two tokens"):
            embeddings_from_text(tokenizer, texts)
    with pytest.raises(ValueError, match="width"):
        embeddings_from_text(tokenizer, ["a a"], width=0)
