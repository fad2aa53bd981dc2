"""Speculative ``generate`` writes what plain ``generate`` writes, in fewer passes of the target."""

from __future__ import annotations

import copy
import threading
from random import Random
from typing import Any

import pytest
import torch
from caches import held
from caches import past as past_cache
from decoding_samples import (
    FAMILIES,
    VOCABULARY,
    Adversary,
    Features,
    Oracle,
    Scripted,
    endless,
    greedy,
    prompts,
    tiny,
    tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from quickmerge.errors import QuickmergeError
from quickmerge.speculative import Drafter, PromptLookup, SpeculativeDecoding, Tree, engine
from quickmerge.speculative.cost import Cost


class Odd(LogitsProcessor):  # type: ignore[misc]
    """Depends on every token before, padding included."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = torch.arange(scores.shape[-1])
        return scores + torch.sin(place * (input_ids.sum(-1, keepdim=True) % 7 + input_ids.shape[1]))


class Every(StoppingCriteria):  # type: ignore[misc]
    """Ends a row at a token of a kind."""

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        return input_ids[:, -1] % self.divisor == 0


def trees(script: Tensor, seed: int, nodes: int, right: float = 0.7, binding: bool = True) -> SpeculativeDecoding:
    return SpeculativeDecoding(Scripted(script, right, seed, binding), tree=nodes)


@pytest.mark.parametrize("family", FAMILIES)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), new=st.integers(1, 14), seed=seeds,
    shapes=st.lists(st.integers(1, 12), min_size=4, max_size=4),
)  # fmt: skip
@prop(16)
def test_greedy_text_is_that_of_plain_generate(
    family: str, lengths: list[int], new: int, shapes: list[int], seed: int
) -> None:
    model, inputs = tiny(family, seed=seed % 3), prompts(lengths, seed)
    wanted = greedy(model, inputs, new)
    for i, nodes in enumerate(shapes):
        drafting = trees(wanted, seed + i, nodes)
        found = greedy(model, inputs, new, custom_generate=drafting)
        assert torch.equal(found, wanted)
        stats = drafting.stats
        assert stats.lossless
        assert stats.rows == len(lengths)
        assert stats.tokens_per_pass >= 1 or stats.row_passes == 0
        assert stats.nodes <= stats.row_passes * nodes


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), nodes=st.integers(1, 10), seed=seeds,
    padding=st.booleans(),
)  # fmt: skip
@prop(30)
def test_processors_and_criteria_act_on_every_token(lengths: list[int], nodes: int, padding: bool, seed: int) -> None:
    model, inputs = tiny(), prompts(lengths, seed)
    rng = Random(seed)
    settings: dict[str, Any] = {
        "logits_processor": LogitsProcessorList([Odd()]),
        "repetition_penalty": rng.choice([1.0, 1.3]),
        "no_repeat_ngram_size": rng.choice([0, 2]),
        "min_new_tokens": rng.choice([None, 4]),
        "eos_token_id": rng.sample(range(VOCABULARY), 20) if padding else None,
        "stopping_criteria": StoppingCriteriaList([Every(rng.choice([2, 5, 50]))] if rng.random() < 0.7 else []),
        "pad_token_id": rng.choice([None, 0, 5]) if padding else None,
    }
    write = greedy if padding else endless
    wanted = write(model, inputs, 12, **settings)
    # Where a text ends is not where another would: the script is what is written if nothing ends it.
    script = endless(model, inputs, 12, **{**settings, "eos_token_id": None, "stopping_criteria": None})
    decoding = trees(script, seed, nodes, 0.9, binding=False)
    assert torch.equal(write(model, inputs, 12, custom_generate=decoding, **settings), wanted)


@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=3), seed=seeds)
@prop(6)
def test_processors_that_know_rows_by_number_are_asked_about_the_right_one(lengths: list[int], seed: int) -> None:
    model, inputs = tiny(), prompts(lengths, seed)
    settings: dict[str, Any] = {
        "prefix_allowed_tokens_fn": lambda row, ids: [t for t in range(3, VOCABULARY) if t % 4 != (row + len(ids)) % 4],
        "encoder_repetition_penalty": 1.2,
        "encoder_no_repeat_ngram_size": 2,
        "repetition_penalty": 1.2,
        "stopping_criteria": StoppingCriteriaList([Every(11)]),
    }
    wanted = greedy(model, inputs, 12, **settings)
    decoding = trees(wanted, seed, 8, 0.9, binding=False)
    assert torch.equal(greedy(model, inputs, 12, custom_generate=decoding, **settings), wanted)


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_a_drafter_that_is_always_right_is_always_accepted(depth: int) -> None:
    model, inputs = tiny("qwen3"), prompts([6, 2, 9])
    decoding = SpeculativeDecoding(Oracle(depth), tree=depth + 1)
    new = 1 + 4 * (depth + 1)
    wanted = endless(model, inputs, new)
    assert torch.equal(endless(model, inputs, new, custom_generate=decoding), wanted)
    assert decoding.stats.tokens_per_pass == depth + 1
    assert decoding.stats.passes == 4
    assert decoding.stats.acceptance == [1.0] * depth


def test_a_drafter_that_is_never_right_costs_passes_and_nothing_else() -> None:
    model, inputs = tiny("smollm3"), prompts([5, 7])
    decoding = SpeculativeDecoding(Adversary(4), tree=5)
    assert torch.equal(greedy(model, inputs, 9, custom_generate=decoding), greedy(model, inputs, 9))
    assert decoding.stats.tokens_per_pass == 1
    assert decoding.stats.acceptance == []
    assert sum(decoding.stats.offered) > 0


@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4), seed=seeds)
@prop(10)
def test_rows_of_a_batch_are_those_of_single_runs(lengths: list[int], seed: int) -> None:
    model, inputs = tiny("gpt_neox"), prompts(lengths, seed)
    wanted = greedy(model, inputs, 12)
    together = greedy(model, inputs, 12, custom_generate=trees(wanted, seed, 6))
    for row, n in enumerate(lengths):
        alone = {name: x[row : row + 1, -n:] for name, x in inputs.items()}
        text = greedy(model, alone, 12, custom_generate=trees(greedy(model, alone, 12), seed + 1, 6))[0]
        assert together[row, max(lengths) - n :][: len(text)].tolist() == text.tolist()


@pytest.mark.parametrize("new", range(1, 12))
def test_the_number_of_new_tokens_is_exact(new: int) -> None:
    model, inputs = tiny(), prompts([4, 6])
    longest = greedy(model, inputs, 20, min_new_tokens=20)
    decoding = trees(longest, new, 5, right=1.0)
    found = greedy(model, inputs, new, min_new_tokens=new, custom_generate=decoding)
    assert torch.equal(found, longest[:, : 6 + new])
    assert decoding.stats.tokens == 2 * new
    assert torch.equal(
        model.generate(**inputs, max_length=6 + new, min_length=6 + new, do_sample=False, custom_generate=decoding),
        longest[:, : 6 + new],
    )


def test_a_row_ends_inside_a_step() -> None:
    model, inputs = tiny("phi3"), prompts([5])
    odd: dict[str, Any] = {"logits_processor": LogitsProcessorList([Odd()])}
    longest = endless(model, inputs, 12, **odd)
    fresh = [i for i in range(5, 17) if longest[0, i] not in longest[0, 5:i]]
    assert len(fresh) > 3
    for at in fresh:
        decoding = trees(longest, 0, 12, right=1.0)
        found = greedy(model, inputs, 12, **odd, eos_token_id=int(longest[0, at]), custom_generate=decoding)
        assert found[0].tolist() == longest[0, : at + 1].tolist()
        assert decoding.stats.tokens == at - 4


def test_stop_strings_end_a_row() -> None:
    model, inputs = tiny("phi3"), prompts([5])
    odd: dict[str, Any] = {"logits_processor": LogitsProcessorList([Odd()])}
    longest = endless(model, inputs, 12, **odd)
    word = tokenizer().convert_ids_to_tokens(int(longest[0, 9]))
    given = {"stop_strings": [word], "tokenizer": tokenizer()}
    wanted = greedy(model, inputs, 12, **odd, **given)
    assert wanted.shape[1] < longest.shape[1]
    decoding = trees(longest, 0, 12, right=1.0)
    config = copy.deepcopy(model.generation_config)
    config.update(stop_strings=[word], max_new_tokens=12, do_sample=False)
    found = [
        greedy(model, inputs, 12, custom_generate=decoding, **odd, **given),
        greedy(model, inputs, 12, custom_generate=lambda *args, **kwargs: decoding(*args, **kwargs), **odd, **given),
        model.generate(**inputs, generation_config=config, tokenizer=tokenizer(), custom_generate=decoding, **odd),
    ]
    odd["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(tokenizer(), [word])])
    found.append(greedy(model, inputs, 12, custom_generate=decoding, **odd))
    assert all(torch.equal(each, wanted) for each in found)


class Collector(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_streamers_get_what_they_get_from_plain_generate() -> None:
    model, inputs = tiny(), prompts([5])
    plain, fast = Collector(), Collector()
    wanted = greedy(model, inputs, 12, streamer=plain)
    found = greedy(model, inputs, 12, streamer=fast, custom_generate=trees(wanted, 0, 12, right=1.0))
    assert torch.equal(found, wanted)
    assert (fast.got, fast.ended) == (plain.got, 1)
    wrapped = Collector()
    decoding = trees(wanted, 0, 12, right=1.0)
    greedy(model, inputs, 12, streamer=wrapped, custom_generate=lambda *args, **kwargs: decoding(*args, **kwargs))
    assert (wrapped.got, wrapped.ended) == (plain.got, 1)
    text = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=9)
    greedy(model, inputs, 12, streamer=text, custom_generate=trees(wanted, 0, 12))
    assert "".join(text).split() == tokenizer().decode(wanted[0, 5:]).split()
    with pytest.raises(ValueError, match=r"batch size 1|takes one row"):
        greedy(model, prompts([5, 5]), 3, streamer=text, custom_generate=SpeculativeDecoding(PromptLookup()))
    with pytest.raises(QuickmergeError, match="streamer takes one row, got 2"):
        greedy(model, prompts([5, 5]), 3, streamer=Collector(), custom_generate=SpeculativeDecoding(PromptLookup()))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=seeds, padding=st.booleans())
@prop(6)
def test_the_cache_that_is_returned_is_that_of_plain_generate(
    family: str, lengths: list[int], padding: bool, seed: int
) -> None:
    model, inputs = tiny(family), prompts(lengths, seed)
    settings: dict[str, Any] = {"return_dict_in_generate": True, **past_cache(None)}
    if padding:
        settings["eos_token_id"] = Random(seed).sample(range(3, VOCABULARY), 25)
    # A cache without sliding layers, so that it too holds every token.
    wanted = greedy(model, inputs, 10, **{**settings, **past_cache(DynamicCache())})
    # Ends where the text ends, and not at the token that ends texts when nobody names another.
    script = wanted.sequences
    found = greedy(model, inputs, 10, custom_generate=trees(script, seed, 8), **settings)
    assert torch.equal(found.sequences, wanted.sequences)
    assert held(found).get_seq_length() == found.sequences.shape[1] - 1
    for mine, theirs in zip(held(found).layers, held(wanted).layers, strict=True):
        for row, n in enumerate(lengths):
            there = slice(max(lengths) - n, None)
            assert torch.allclose(mine.keys[row, :, there], theirs.keys[row, :, there], atol=1e-10)
            assert torch.allclose(mine.values[row, :, there], theirs.values[row, :, there], atol=1e-10)


def test_generation_goes_on_from_a_cache() -> None:
    model, inputs = tiny("mistral"), prompts([8])
    wanted = greedy(model, inputs, 20)
    cache = DynamicCache()
    first = greedy(model, inputs, 7, **past_cache(cache), custom_generate=trees(wanted, 0, 6))
    assert cache.get_seq_length() == first.shape[1] - 1
    both = [trees(wanted, 1, 6), None]
    for decoding, past in zip(both, (cache, None), strict=True):
        more = past_cache(past) if past is not None else {}
        found = model.generate(first, max_new_tokens=13, do_sample=False, custom_generate=decoding, **more)
        assert torch.equal(found, wanted)
    with pytest.raises(QuickmergeError, match=r"input_ids must hold the whole text, the 27 tokens"):
        model.generate(first, **past_cache(cache), do_sample=False, max_length=40, custom_generate=both[0])
    past = DynamicCache()
    model(input_ids=first[:, :-1], **past_cache(past))
    # Of the text in the cache a drafter that reads features is told nothing but its last token.
    drafter = Features()
    found = model.generate(
        first, **past_cache(past), max_new_tokens=13, do_sample=False,
        custom_generate=SpeculativeDecoding(drafter, tree=3),
    )  # fmt: skip
    assert torch.equal(found, wanted) and torch.equal(drafter.prompt[0], first[:, -1:])
    assert drafter.prompt[2].shape[1] == 1 and int(drafter.prompt[3]) == first.shape[1] - 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_in_bfloat16_every_token_is_as_good_as_the_best_within_rounding(family: str) -> None:
    model, inputs = copy.deepcopy(tiny(family)).to(torch.bfloat16), prompts([8, 3])
    wanted = endless(model, inputs, 20)
    found = endless(model, inputs, 20, custom_generate=trees(wanted, 0, 9, 0.9, binding=False))
    assert found.shape == wanted.shape
    for row, n in enumerate([8, 3]):
        text = found[row, 8 - n :]
        with torch.no_grad():
            logits = model(input_ids=text[None, :-1]).logits[0, n - 1 :].float()
        chosen = logits.gather(1, text[n:, None])[:, 0]
        assert float((logits.amax(-1) - chosen).max()) < 0.02 * float(logits.abs().max())


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=seeds, padding=st.booleans(),
    flat=st.lists(st.floats(0.5, 2.0), min_size=4, max_size=4),
)  # fmt: skip
@prop(5)
def test_a_seed_gives_one_text_whatever_the_drafter_and_the_speed(
    lengths: list[int], padding: bool, flat: list[float], seed: int
) -> None:
    model, inputs = tiny(), prompts(lengths, seed)
    # Without a token that ends texts, rows that are done are written on until all are.
    ends: dict[str, Any] = {"eos_token_id": Random(seed).sample(range(3, VOCABULARY), 10) if padding else None}
    script = greedy(model, inputs, 12, min_new_tokens=12)
    drafters: list[tuple[Drafter, Any]] = [(PromptLookup(), 1), (PromptLookup(ngram=1), 6), (Adversary(2), 3)]
    drafters += [(Scripted(script, 0.9, seed + n, binding=False), n) for n in (2, 7)]
    drafters += [(Scripted(script, 0.9, seed, binding=False), "auto"), (PromptLookup(), "auto")]
    texts = []
    for drafter, tree in drafters:
        torch.manual_seed(seed)
        decoding = SpeculativeDecoding(drafter, tree=tree)
        with pytest.MonkeyPatch.context() as patch:
            # Machines of other speeds: what a pass takes decides how much is read in a step.
            patch.setattr(engine, "measure", lambda model, most: Cost((1, 2, 4, 16), tuple(flat)))
            write = greedy if padding else endless
            texts.append(write(model, inputs, 12, custom_generate=decoding, do_sample=True, top_k=0, **ends))
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_a_row_draws_the_same_whatever_its_neighbours_are() -> None:
    model, inputs = tiny(), prompts([6, 6, 6])
    texts = []
    for rows in (1, 2, 3):
        torch.manual_seed(3)
        few = {name: x[:rows] for name, x in inputs.items()}
        decoding = SpeculativeDecoding(PromptLookup(), tree=4)
        texts.append(
            model.generate(**few, do_sample=True, max_new_tokens=9, min_new_tokens=9, custom_generate=decoding)
        )
    assert texts[0][0].tolist() == texts[1][0].tolist() == texts[2][0].tolist()
    assert texts[1][1].tolist() == texts[2][1].tolist()
    assert len({tuple(row) for row in texts[2].tolist()}) == 3


def test_two_threads_with_drafters_of_their_own_share_a_model() -> None:
    model = tiny("qwen3")
    wanted, found, failed = {}, {}, []

    def write(thread: int, texts: dict[Any, Tensor]) -> None:
        try:
            for turn in range(6):
                inputs = prompts([4 + turn, 3 * (thread + 1)], 10 * thread + turn)
                # The drafter checks every feature that it is given against its own text.
                decoding = SpeculativeDecoding(Oracle(2), tree=3)
                texts[thread, turn] = greedy(model, inputs, 8, custom_generate=decoding)
        except Exception as error:
            failed.append(error)

    write(0, wanted)
    write(1, wanted)
    threads = [threading.Thread(target=write, args=(each, found)) for each in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_drafter_in_use_is_not_given_to_another_generate() -> None:
    model, inputs = tiny(), prompts([5])
    decoding = SpeculativeDecoding(PromptLookup(), tree=4)
    failures: list[Exception] = []

    class Again(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
            try:
                greedy(model, inputs, 3, custom_generate=SpeculativeDecoding(decoding.drafter))
            except QuickmergeError as error:
                failures.append(error)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    wanted = greedy(model, inputs, 3)
    found = greedy(model, inputs, 3, custom_generate=decoding, stopping_criteria=StoppingCriteriaList([Again()]))
    assert torch.equal(found, wanted)
    assert "a PromptLookup drafts for one generate at a time" in str(failures[0])
    assert torch.equal(greedy(model, inputs, 3, custom_generate=decoding), wanted)  # free again


def test_several_sequences_of_one_prompt() -> None:
    model, inputs = tiny(), prompts([5, 3])
    torch.manual_seed(0)
    settings: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6, "min_new_tokens": 6}
    script = model.generate(**inputs, **settings)
    for seed in range(2):
        found = []
        for _ in range(2):
            torch.manual_seed(seed)
            found.append(model.generate(**inputs, **settings, custom_generate=trees(script, 0, 5, binding=False)))
        assert found[0].shape == (6, 11)
        assert torch.equal(found[0], found[1])
        assert found[0][:, :5].tolist() == script[:, :5].tolist()
        assert len({tuple(row) for row in found[0].tolist()}) > 3


def test_a_size_that_is_chosen_by_itself_changes_no_text() -> None:
    model, inputs = tiny(), prompts([5, 9])
    wanted = greedy(model, inputs, 15)
    decoding = SpeculativeDecoding(Scripted(wanted, 1.0), nodes=8)
    assert torch.equal(greedy(model, inputs, 15, custom_generate=decoding), wanted)
    assert decoding.stats.nodes <= decoding.stats.row_passes * 8


def test_near_the_end_of_the_context_trees_are_cut() -> None:
    model = tiny(max_position_embeddings=16)
    inputs = prompts([5])
    wanted = greedy(model, inputs, 16, min_new_tokens=16)  # five tokens beyond the context, as plain generate does
    decoding = trees(wanted, 0, 8, right=1.0)
    found = greedy(model, inputs, 16, min_new_tokens=16, custom_generate=decoding)
    assert torch.equal(found, wanted)
    assert decoding.stats.passes < 15


class Wrong(Scripted):
    def _tree(self, row: int, last: int, nodes: int) -> Tree:
        return Tree.chain([last + 1, 3])


class Peeking(Scripted):
    def _tree(self, row: int, last: int, nodes: int) -> Tree:
        return Tree([last, 5, 6, 7], [0, 0, 0, 1], [1.0] * 4, extra=((2, 3),))


def test_a_draft_of_something_else_is_told() -> None:
    model, inputs = tiny(), prompts([5])
    script = greedy(model, inputs, 5)
    with pytest.raises(QuickmergeError, match=r"Wrong.draft must return a tree for each row with its last token"):
        greedy(model, inputs, 5, custom_generate=SpeculativeDecoding(Wrong(script), tree=4))


def test_a_draft_with_extra_pairs_is_called_lossy() -> None:
    model, inputs = tiny(), prompts([5])
    decoding = SpeculativeDecoding(Peeking(greedy(model, inputs, 9)), tree=4)
    greedy(model, inputs, 6, custom_generate=decoding)
    assert not decoding.stats.lossless
    assert "LOSSY" in decoding.stats.summary()


def test_what_a_drafter_refuses_is_refused() -> None:
    class Choosy(PromptLookup):
        def check(self, model: Any) -> None:
            raise QuickmergeError("made for another model")

    with pytest.raises(QuickmergeError, match="made for another model"):
        greedy(tiny(), prompts([5]), 5, custom_generate=SpeculativeDecoding(Choosy()))


def test_settings_out_of_range_are_told() -> None:
    for arguments, message in [
        ({"nodes": 0}, "nodes must be a whole number of at least 1, got 0"),
        ({"tree": 0}, "tree must be a whole number of at least 1, got 0"),
        ({"tree": 2.5}, "tree must be a whole number of at least 1, got 2.5"),
        ({"tree": "deep"}, "tree must be 'auto' or a whole number of at least 1, got 'deep'"),
    ]:
        with pytest.raises(ValueError, match=message):
            SpeculativeDecoding(PromptLookup(), **arguments)
    with pytest.raises(ValueError, match=r"drafter must be a quickmerge\.speculative\.Drafter, got str"):
        SpeculativeDecoding("lookup")  # type: ignore[arg-type]
    assert issubclass(PromptLookup, Drafter)
