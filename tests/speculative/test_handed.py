"""What ``generate`` was given and does not hand on."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from decoding_samples import greedy, prompts, tiny, tokenizer

from quickmerge.errors import QuickmergeError
from quickmerge.speculative import PromptLookup, SpeculativeDecoding
from quickmerge.speculative.engine import Handed, handed_to, listen

UNSEEN = r"SpeculativeDecoding must be called by model\.generate"


def test_it_is_seen_from_any_depth_of_functions_and_only_in_its_own_generate() -> None:
    listen()
    listen()  # once is enough
    model, other, found = tiny(), tiny(seed=1), []

    def ask(asked: Any, input_ids: Any, **more: Any) -> Any:
        assert "tokenizer" not in more
        found.append(handed_to(asked))
        with pytest.raises(QuickmergeError, match=UNSEEN):
            handed_to(other)
        return input_ids

    def deeper(*args: Any, **kwargs: Any) -> Any:
        return [ask(*args, **kwargs)][0]

    class Quiet:
        def put(self, value: Any) -> None:
            pass

    mine = Quiet()
    greedy(model, prompts([5]), 4, streamer=mine, custom_generate=ask)
    greedy(model, prompts([5]), 4, streamer=mine, assistant_model=other, tokenizer=tokenizer(), custom_generate=deeper)
    greedy(model, prompts([5]), 4, synced_gpus=True, custom_generate=ask)
    assert found == [Handed(mine), Handed(mine, other), Handed(None, None, True)]
    greedy(model, prompts([5]), 2)
    with pytest.raises(QuickmergeError, match=UNSEEN):
        handed_to(model)  # a plain generate leaves nothing behind


def test_a_generate_whose_method_was_taken_before_is_seen_too() -> None:
    model, inputs = tiny(), prompts([5])
    taken = model.generate
    decoding = SpeculativeDecoding(PromptLookup(), tree=2)
    assert torch.equal(
        taken(**inputs, do_sample=False, max_new_tokens=3, custom_generate=decoding), greedy(model, inputs, 3)
    )


def test_what_cannot_be_seen_is_refused() -> None:
    model, inputs = tiny(), prompts([5])
    decoding = SpeculativeDecoding(PromptLookup(), tree=2)

    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        failures: list[Exception] = []

        def run() -> None:
            try:
                decoding(*args, **kwargs)
            except QuickmergeError as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        raise failures[0]

    with pytest.raises(QuickmergeError, match=UNSEEN):
        greedy(model, inputs, 3, custom_generate=elsewhere)


def test_functions_of_others_get_what_they_always_got() -> None:
    listen()
    model, inputs, seen = tiny(), prompts([5]), []

    def theirs(model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
               mine: int = 0, **model_kwargs: Any) -> Any:  # fmt: skip
        seen.append((mine, "tokenizer" in model_kwargs, "streamer" in model_kwargs))
        return input_ids

    greedy(model, inputs, 3, custom_generate=theirs, mine=4, tokenizer=tokenizer())
    assert seen == [(4, False, False)]

    def strict(model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
               attention_mask: Any, position_ids: Any = None, use_cache: Any = None, logits_to_keep: Any = None,
               past_key_values: Any = None, cache: Any = None) -> Any:  # fmt: skip
        return input_ids

    with pytest.raises(ValueError, match="tokenizer"):
        greedy(model, inputs, 3, custom_generate=strict, stop_strings=["w5"], tokenizer=tokenizer())
