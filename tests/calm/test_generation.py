"""Writing with a CALM: prompts of any length, caches, batches, ends, temperatures and streams."""

from __future__ import annotations

import threading
from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from calm_samples import BACKBONES, EOS, HEADS, PAD, generators, small_calm, some_ids, words_tokenizer
from hypothesis import given
from strategies import prop, seeds
from torch import Tensor
from transformers import TextIteratorStreamer, TextStreamer

from quickmerge.calm.chunks import chunk_document
from quickmerge.errors import QuickmergeError


def slow_row(model: Any, ids: list[int], new: int, generator: torch.Generator, ends: list[int]) -> list[int]:
    """One row alone, read anew at each step: the tokens that follow."""
    patch = model.config.patch
    read = [PAD] * (-len(ids) % patch) + ids
    written: list[int] = []
    while len(written) < new:
        states, _ = model.hidden(torch.tensor([read]))
        chunk = model.sample_chunks(states[:, -1], generator=generator)[0, 0].tolist()
        for token in chunk:
            if ends and token == PAD:
                return written[:new]
            written.append(token)
            if token in ends:
                return written[:new]
        read += chunk
    return written[:new]


@prop(20)
@given(seed=seeds)
def test_a_batch_is_its_rows_alone_said_slowly(seed: int) -> None:
    """Prompts of any lengths, padded on either side, with a cache or without."""
    rng = Random(seed)
    patch, rows, wide, new = rng.choice((1, 3, 4)), rng.choice((1, 3)), rng.choice((1, 5, 9)), rng.choice((1, 4, 10))
    ends = rng.choice(([EOS], [EOS, 5, 6, 7], []))
    model = small_calm(patch, seed=seed % 7)
    ids, mask = some_ids(rows, wide, seed=seed), torch.ones(rows, wide, dtype=torch.long)
    for row in range(rows):
        gone = rng.randrange(wide)
        mask[row, :gone] = 0
        if rng.random() < 0.5:
            mask[row] = mask[row].flip(0)
    given = {"max_new_tokens": new, "eos_token_id": ends, "use_cache": rng.random() < 0.5}
    got = model.generate(ids, mask, generator=generators(rows, seed), **given)
    filler = ends[0] if ends else PAD
    assert torch.equal(got[:, :wide], ids)
    want = [
        slow_row(model, ids[row][mask[row].bool()].tolist(), new, generators(1, seed + row)[0], ends)
        for row in range(rows)
    ]
    longest = max(map(len, want))
    assert got[:, wide:].tolist() == [row + [filler] * (longest - len(row)) for row in want]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("head", HEADS)
def test_with_a_cache_and_without_it_writes_the_same(backbone: str, head: str) -> None:
    model = small_calm(3, backbone, head)
    ids = some_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    given = {"max_new_tokens": 20, "eos_token_id": []}
    one = model.generate(ids, mask, seed=1, **given)
    assert one.shape == (2, 27)
    assert torch.equal(one, model.generate(ids, mask, seed=1, use_cache=False, **given))


def test_a_cache_spares_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_calm(3)
    read: list[int] = []
    forward = model.backbone.forward

    def watched(*args: Any, inputs_embeds: Tensor, **rest: Any) -> Any:
        read.append(inputs_embeds.shape[1])
        return forward(*args, inputs_embeds=inputs_embeds, **rest)

    monkeypatch.setattr(model.backbone, "forward", watched)
    model.generate(some_ids(1, 12), max_new_tokens=10, eos_token_id=[])
    assert read == [4, 1, 1, 1]
    read.clear()
    model.generate(some_ids(1, 12), max_new_tokens=10, eos_token_id=[], use_cache=False)
    assert read == [4, 5, 6, 7]


def test_prompts_are_cut_as_documents_are() -> None:
    """A document without its end, padded in front by the phase that brings its last token to the end of a chunk."""
    model = small_calm(3)
    seen: list[Tensor] = []
    hidden = model.hidden
    model.hidden = lambda ids, *rest: (seen.append(ids), hidden(ids, *rest))[1]
    for length in (1, 2, 3, 4, 7):
        ids = some_ids(1, length, seed=length)
        seen.clear()
        model.generate(ids, max_new_tokens=1)
        document = chunk_document(ids[0], 3, EOS, PAD, phase=-length % 3)
        assert torch.equal(seen[0].view(-1, 3), document[: seen[0].shape[1] // 3])


class Scripted:
    """In the place of the head and the decoder: says given chunks, one a step."""

    def __init__(self, *chunks: list[list[int]]) -> None:
        self.chunks = [torch.tensor(chunk) for chunk in chunks]
        self.rows: list[int] = []

    def __call__(self, states: Tensor, count: int = 1, *, generator: Any = None) -> Tensor:
        self.rows.append(len(states))
        return self.chunks.pop(0)[-len(states) :].expand(count, -1, -1)


def scripted(*chunks: list[list[int]]) -> Any:
    model = small_calm(3)
    model.sample_chunks = Scripted(*chunks)
    return model


def test_what_follows_an_end_inside_a_chunk_is_cut() -> None:
    model = scripted([[4, EOS, 9], [6, 7, 8]], [[5, 5, EOS]])
    out = model.generate(some_ids(2, 4), max_new_tokens=12)
    assert out[:, 4:].tolist() == [[4, EOS, EOS, EOS, EOS, EOS], [6, 7, 8, 5, 5, EOS]]
    assert model.sample_chunks.rows == [2, 1]  # no draws for a row that has ended


def test_padding_ends_a_text_and_is_no_part_of_it() -> None:
    out = scripted([[4, PAD, 9], [PAD, PAD, PAD]]).generate(some_ids(2, 4), max_new_tokens=12)
    assert out[:, 4:].tolist() == [[4], [EOS]]
    model = scripted([[4, PAD, 9]], [[EOS, 3, 3]])
    assert model.generate(some_ids(1, 4), max_new_tokens=6, eos_token_id=[])[0, 4:].tolist() == [4, PAD, 9, EOS, 3, 3]


def test_the_last_chunk_is_cut_to_length() -> None:
    for new in range(1, 7):
        out = scripted([[4, 5, 6]], [[7, 8, EOS]]).generate(some_ids(1, 4), max_new_tokens=new)
        assert out[0, 4:].tolist() == [4, 5, 6, 7, 8, EOS][:new]


def test_several_ends_and_another_padding() -> None:
    model = scripted([[4, 9, 3], [6, 7, 8]], [[5, 8, 8]])
    out = model.generate(some_ids(2, 4), max_new_tokens=6, eos_token_id=[9, 5], pad_token_id=0)
    assert out[:, 4:].tolist() == [[4, 9, 0, 0], [6, 7, 8, 5]]


class Coin:
    """Draws one of a few chunks, with given probabilities."""

    words = torch.tensor([[2, 3, 4], [5, 6, 7], [8, 9, 10]])

    def __init__(self, *weights: float) -> None:
        self.weights = torch.tensor(weights)

    def __call__(self, states: Tensor, count: int = 1, *, generator: Any = None) -> Tensor:
        draws = torch.multinomial(self.weights, count * len(states), replacement=True, generator=generator)
        return self.words[draws].view(count, len(states), 3)


@pytest.mark.parametrize(
    ("given", "power"),
    [({}, 1), ({"temperature": 0.5}, 2), ({"temperature": 0.7}, 1 / 0.7),
     ({"temperature": 0.5, "temperature_method": "batch", "batch_samples": 100}, 2)],
)  # fmt: skip
def test_a_temperature_sharpens_what_is_drawn(given: dict[str, Any], power: float) -> None:
    model = small_calm(3)
    weights = (0.5, 0.3, 0.2)
    model.sample_chunks = Coin(*weights)
    out = model.generate(some_ids(60, 3), max_new_tokens=30, eos_token_id=[], seed=0, **given)
    found = Counter(out[:, 3:].reshape(-1, 3)[:, 0].tolist())
    total = sum(found.values())
    assert total == 600
    whole = sum(weight**power for weight in weights)
    for weight, word in zip(weights, (2, 5, 8), strict=True):
        assert found[word] / total == pytest.approx(weight**power / whole, abs=0.08)


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_at_a_temperature_too_a_row_is_the_same_alone(method: str) -> None:
    model, ids = small_calm(3), some_ids(3, 5)
    model.sample_chunks = Coin(0.5, 0.3, 0.2)
    given = {"max_new_tokens": 9, "eos_token_id": [8], "temperature": 0.5, "temperature_method": method,
             "batch_samples": 5}  # fmt: skip
    together = model.generate(ids, generator=generators(3), **given)
    for row in range(3):
        alone = model.generate(ids[row : row + 1], generator=generators(1, row), **given)[0, 5:].tolist()
        assert together[row, 5 : 5 + len(alone)].tolist() == alone


def test_a_seed_leaves_the_global_generator_alone() -> None:
    model, ids = small_calm(3), some_ids(2, 5)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = model.generate(ids, seed=5, max_new_tokens=9)
    assert torch.equal(one, model.generate(ids, seed=5, max_new_tokens=9))
    assert torch.equal(one, model.generate(ids, generator=torch.Generator().manual_seed(5), max_new_tokens=9))
    assert torch.equal(before, torch.get_rng_state())
    texts = {tuple(model.generate(ids, seed=seed, max_new_tokens=9).flatten().tolist()) for seed in range(5)}
    assert len(texts) > 1
    model.generate(ids, max_new_tokens=9)
    assert not torch.equal(before, torch.get_rng_state())


# Streams --------------------------------------------------------------------------------------------------------


class Heard:
    """Remembers what it was given."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_hears_the_prompt_and_each_chunk() -> None:
    heard, ids = Heard(), some_ids(1, 4)
    model = scripted([[4, 5, 6]], [[7, 8, 9]], [[2, 3, 4]])
    out = model.generate(ids, max_new_tokens=7, streamer=heard)
    assert heard.parts == [ids[0].tolist(), [4, 5, 6], [7, 8, 9], [2]] and heard.ended == 1
    assert [token for part in heard.parts for token in part] == out[0].tolist()
    heard = Heard()
    scripted([[4, 5, 6]], [[PAD, 8, 9]]).generate(ids, max_new_tokens=7, streamer=heard)
    assert heard.parts == [ids[0].tolist(), [4, 5, 6]] and heard.ended == 1
    with pytest.raises(QuickmergeError, match="streamer must be given with one row of input_ids, got 2"):
        small_calm(3).generate(some_ids(2, 4), streamer=heard)


def test_the_streamers_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = words_tokenizer()
    ids = tokenizer("w4 w5", return_tensors="pt")["input_ids"]
    chunks = ([[4, 5, 6]], [[7, EOS, 9]])
    scripted(*chunks).generate(
        ids, max_new_tokens=9, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    assert capsys.readouterr().out == "w4 w5 w6 w7\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=20)
    model = scripted(*chunks)
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs={"max_new_tokens": 9, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == "w4 w5 w6 w7"
    thread.join()


# Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"input_ids": some_ids(4)}, r"input_ids must be \(batch, tokens\) token ids, got torch.int64 \(4,\)"),
        ({"input_ids": some_ids(2, 0)}, r"got torch.int64 \(2, 0\)"),
        ({"input_ids": torch.rand(2, 4)}, r"got torch.float32 \(2, 4\)"),
        ({"input_ids": torch.tensor([[4, 21]])}, "input_ids must be of the 21 tokens of the vocabulary, got 4 to 21"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask must have shape \(2, 4\), got \(2, 3\)"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}, "nothing but padding in row 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 400}, "are 135 chunks of 3 tokens, and the backbone reads at most 64"),
        ({"temperature": 0}, r"temperature must be a number in \(0, 1\]"),
        ({"temperature": 1.5}, r"temperature must be a number in \(0, 1\]"),
        ({"temperature_method": "exakt"}, r"temperature_method must be one of exact, batch, got 'exakt' \(did you m"),
        ({"temperature": 0.7, "temperature_method": "batch"}, "temperature must be 1/n for a whole n"),
        ({"batch_samples": 0}, "batch_samples must be a whole number of at least 1, got 0"),
        ({"eos_token_id": [-1]}, "eos_token_id must be a whole number of at least 0, got -1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": 1, "generator": torch.Generator()}, "either generator or seed must be given, got both"),
        ({"generator": generators(3)}, "generator must be one, or one for each of 2 rows, got 3"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_calm(3).generate(**{"input_ids": some_ids(2, 4), **given})
