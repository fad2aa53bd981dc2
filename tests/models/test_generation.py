"""What a model's folder may say about how texts are written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from quickmerge.errors import QuickmergeError
from quickmerge.models.generation import SAMPLING, TOKENS, check_temperature, own_generation
from quickmerge.speculative import PromptLookup, SpeculativeDecoding

IDS = torch.arange(3, 12)[None]
UNASKED: dict[str, Any] = {
    "suppress_tokens": list(range(20)), "begin_suppress_tokens": [5], "repetition_penalty": 3.0, "min_new_tokens": 9,
    "no_repeat_ngram_size": 1, "bad_words_ids": [[7]], "num_beams": 3, "forced_eos_token_id": 4, "max_time": 1e-9,
    "return_dict_in_generate": True, "use_cache": False, "cache_implementation": "static", "stop_strings": ["a"],
    "watermarking_config": {"bias": 9.0}, "sequence_bias": [[[3], 9.0]], "num_return_sequences": 2,
    "exponential_decay_length_penalty": (1, 2.0), "top_k": 1, "temperature": 0.1, "prefill_chunk_size": 2,
    "something_of_theirs": 3,
}  # fmt: skip


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            initializer_range=0.4,
        )
    ).eval()  # fmt: skip
    made.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    return made


@pytest.mark.parametrize("name", UNASKED)
def test_nothing_changes_what_is_written_greedily_unless_it_was_asked_for(name: str) -> None:
    lm = model()
    wanted = lm.generate(IDS, max_new_tokens=6, do_sample=False)
    setattr(lm.generation_config, name, UNASKED[name])
    told = own_generation(lm)
    assert len(told) == 1 and name in told[0]
    assert lm.generation_config.eos_token_id == 2 and lm.generation_config.pad_token_id == 0
    assert torch.equal(lm.generate(IDS, max_new_tokens=6, do_sample=False), wanted)
    assert own_generation(lm) == told if name in ("top_k", "temperature") else own_generation(lm) == []


def test_a_setting_that_a_newer_transformers_has_is_left_out_too() -> None:
    for name, value in vars(GenerationConfig()).items():
        if name[0] == "_" or value is not None:
            continue
        lm = model()
        setattr(lm.generation_config, name, 1)
        own_generation(lm)
        kept = {key for key, given in vars(lm.generation_config).items() if given is not None and key[0] != "_"}
        assert kept - {"transformers_version"} <= {*TOKENS, *SAMPLING}, name


def test_settings_of_sampling_are_kept_and_told() -> None:
    lm = model()
    lm.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=2, max_length=9)
    assert own_generation(lm) == [
        "note: where tokens are sampled, the model's generation_config sets temperature=0.6, top_p=0.9"
    ]
    assert (lm.generation_config.temperature, lm.generation_config.top_p) == (0.6, 0.9)
    assert lm.generation_config.do_sample is None and lm.generation_config.max_length is None
    plain = model()
    assert own_generation(plain) == [] and own_generation(torch.nn.Linear(1, 1)) == []


def test_temperatures_that_nothing_can_be_sampled_at_are_refused() -> None:
    for value in (0.01, 1, 30.0):
        check_temperature("temperature", value)
    for value in (1e-40, 1e-5, 0, -1.0, float("nan"), float("inf"), "hot", True, None):
        with pytest.raises(QuickmergeError, match=r"^--temperature must be a number of at least 0\.0001"):
            check_temperature("--temperature", value)
    lm = model()
    lm.generation_config.temperature = 1e-40
    with pytest.raises(QuickmergeError, match=r"temperature in the model's generation_config\.json must be a number"):
        own_generation(copy.deepcopy(lm))
    with pytest.raises(QuickmergeError, match="temperature must be a number of at least"):
        decoding = SpeculativeDecoding(PromptLookup(), tree=2)
        lm.generate(IDS, do_sample=True, max_new_tokens=3, custom_generate=decoding)


def test_what_changes_nothing_is_not_told(tiny_llama) -> None:
    config = tiny_llama.generation_config
    for name, value in {
        "output_attentions": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "use_cache": True,
    }.items():
        setattr(config, name, value)
    assert own_generation(tiny_llama) == []
    tiny_llama.generation_config.use_cache = False
    assert "use_cache" in own_generation(tiny_llama)[0]
