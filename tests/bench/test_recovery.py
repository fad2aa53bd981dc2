"""Context recovery: the ratio, its interval, and the NLLs it is made of."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from quickmerge.bench.quality import continuation_nll, document_nll, recovery
from quickmerge.datasets.text import Document, split_document
from quickmerge.merge.attach import reduce
from quickmerge.merge.reducers import QuickMerge, Random


def test_recovery_is_the_ratio_of_summed_differences() -> None:
    found = recovery([2.0, 3.5], full=[1.0, 3.0], none=[4.0, 4.0])
    assert found.recovery == pytest.approx((2.0 + 0.5) / (3.0 + 1.0))
    assert found.nll == 2.75 and found.nll_full == 2.0 and found.nll_none == 4.0


def test_full_is_one_and_none_is_zero() -> None:
    full, none = [1.0, 2.0, 3.0], [2.0, 2.5, 5.0]
    whole, bare = recovery(full, full, none), recovery(none, full, none)
    assert (whole.recovery, whole.low, whole.high) == (1.0, 1.0, 1.0)
    assert (bare.recovery, bare.low, bare.high) == (0.0, 0.0, 0.0)


def test_interval_holds_the_estimate_and_narrows_with_documents() -> None:
    generator = torch.Generator().manual_seed(0)

    def width(count: int) -> float:
        full = torch.rand(count, generator=generator) + 1
        none = full + 1 + torch.rand(count, generator=generator)
        reduced = full + 0.3 * torch.rand(count, generator=generator)
        found = recovery(reduced.tolist(), full.tolist(), none.tolist())
        assert found.low < found.recovery < found.high
        return found.high - found.low

    assert width(400) < width(8)


def test_interval_is_deterministic() -> None:
    values = ([2.0, 2.2, 1.4], [1.0, 2.0, 1.2], [3.0, 3.0, 3.0])
    assert recovery(*values) == recovery(*values)


@pytest.mark.parametrize(
    ("values", "word"), [(([1.0], [1.0, 2.0], [3.0]), "per document"), (([1.0], [2.0], [1.0]), "better than none")]
)
def test_bad_input_says_what_is_wrong(values: tuple[list[float], ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        recovery(*values)


def test_nll_equals_one_plain_forward(tiny_llama) -> None:
    model = tiny_llama.double()
    context, target = torch.randint(0, 64, (1, 30)), torch.randint(0, 64, (1, 9))
    found = continuation_nll(model, context, target, nullcontext())
    with torch.no_grad():
        logp = model(torch.cat([context, target], 1)).logits.log_softmax(-1)
    by_hand = torch.stack([-logp[0, 30 + i - 1, target[0, i]] for i in range(1, 9)])
    torch.testing.assert_close(found.double(), by_hand, atol=1e-5, rtol=0)
    alone = continuation_nll(model, None, target, nullcontext())
    with torch.no_grad():
        logp = model(target).logits.log_softmax(-1)
    by_hand = torch.stack([-logp[0, i - 1, target[0, i]] for i in range(1, 9)])
    torch.testing.assert_close(alone.double(), by_hand, atol=1e-5, rtol=0)


def test_keeping_everything_measures_the_full_model_to_the_bit(tiny_llama) -> None:
    document = Document("d", torch.randint(0, 64, (1, 40)), torch.randint(0, 64, (1, 8)))
    run = reduce(tiny_llama, QuickMerge(keep=1.0), 1, min_tokens=0)
    assert torch.equal(document_nll(tiny_llama, document, run), document_nll(tiny_llama, document))
    run = reduce(tiny_llama, Random(keep=0.6), 1, min_tokens=0)
    assert not torch.equal(document_nll(tiny_llama, document, run), document_nll(tiny_llama, document))


class Words:
    """A tokenizer of single characters."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) % 64 for c in text]}


def test_a_long_document_is_cut_where_asked() -> None:
    document = split_document(Words(), "ab" * 3000, "d", context=700, target=100)
    assert document.context.shape == (1, 700) and document.target.shape == (1, 100)


class BeginsText(Words):
    """One that puts a BOS in front of every text."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = super().__call__(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def test_a_text_begins_as_its_tokenizer_begins_texts_with_and_without_context() -> None:
    document = split_document(BeginsText(), "ab" * 3000, "d", context=700, target=100)
    plain = split_document(Words(), "ab" * 3000, "d", context=700, target=100)
    assert torch.equal(document.context[:, 1:], plain.context) and torch.equal(document.target, plain.target)
    assert document.nothing is not None and document.nothing.tolist() == [[1]]
    assert plain.nothing is None


def test_a_short_document_gives_the_context_it_has() -> None:
    document = split_document(Words(), "a" * 1000, "d", context=1024, target=192)
    assert document.context.shape == (1, 808) and document.target.shape == (1, 192)


@pytest.mark.parametrize(
    ("size", "target", "word"), [(999, 192, "at least 1000 tokens.*got 999"), (1000, 999, "target")]
)
def test_too_short_a_document_is_refused(size: int, target: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        split_document(Words(), "a" * size, "d", target=target)
