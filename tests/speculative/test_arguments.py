"""Arguments of ``generate`` that speculation can't keep, each told in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import past
from decoding_samples import greedy, prompts, tiny
from transformers import DynamicCache, LogitsProcessorList, StaticCache, SynthIDTextWatermarkingConfig
from transformers.generation import ClassifierFreeGuidanceLogitsProcessor

from quickmerge.errors import QuickmergeError
from quickmerge.speculative import PromptLookup, SpeculativeDecoding

DICT = {"return_dict_in_generate": True}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "greedy search and sampling, got beam_search: leave num_beams"),
    "contrastive": ({"penalty_alpha": 0.5, "top_k": 3}, "got contrastive_search"),
    "assisted": ({"prompt_lookup_num_tokens": 3}, "got assisted_generation"),
    "scores": ({"output_scores": True, **DICT}, "output_scores must be False with speculative decoding, got True"),
    "logits": ({"output_logits": True, **DICT}, "output_logits must be False"),
    "attentions": ({"output_attentions": True, **DICT}, "output_attentions must be False"),
    "states": ({"output_hidden_states": True, **DICT}, "output_hidden_states must be False"),
    "guidance": ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor does not work"),
    "no cache": ({"use_cache": False}, "use_cache must be True with speculative decoding, got False"),
    "chunks": ({"prefill_chunk_size": 2}, "prefill_chunk_size must be left out, got 2"),
    "synced": ({"synced_gpus": True}, "synced_gpus must be False"),
    "assistant": ({"assistant_model": tiny(seed=1)}, "assistant_model must be left out: the drafter takes its place"),
    "static": (
        {"cache_implementation": "static"},
        "must be a DynamicCache .* got one with StaticLayer",
    ),
    "offloaded": ({"cache_implementation": "offloaded"}, "must be a DynamicCache"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal_is_one_sentence(name: str) -> None:
    more, message = REFUSED[name]
    decoding = SpeculativeDecoding(PromptLookup(), tree=4)
    for how in (decoding, lambda *args, **kwargs: decoding(*args, **kwargs)):
        with pytest.raises(QuickmergeError, match=message):
            greedy(tiny(), prompts([5]), 4, custom_generate=how, **more)


def test_embeddings_as_a_prompt_are_refused() -> None:
    embeds = torch.zeros(1, 4, 16, dtype=torch.float64)
    decoding = SpeculativeDecoding(PromptLookup())
    with pytest.raises(QuickmergeError, match="needs the prompt as input_ids of at least one token, no embeddings"):
        tiny().generate(inputs_embeds=embeds, max_new_tokens=3, custom_generate=decoding)


def test_guidance_by_a_processor_and_a_watermark_of_several_rows_are_refused() -> None:
    guided = LogitsProcessorList([ClassifierFreeGuidanceLogitsProcessor(2.0)])
    decoding = SpeculativeDecoding(PromptLookup(), tree=4)
    with pytest.raises(QuickmergeError, match="ClassifierFreeGuidanceLogitsProcessor does not work"):
        greedy(tiny(), prompts([5]), 4, custom_generate=decoding, logits_processor=guided)
    mark = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
    with pytest.raises(QuickmergeError, match="watermarking_config of SynthID takes one row, got 2"):
        greedy(tiny(), prompts([5, 4]), 4, custom_generate=decoding, watermarking_config=mark)
    text = greedy(tiny(), prompts([5]), 6, watermarking_config=mark)
    assert torch.equal(greedy(tiny(), prompts([5]), 6, custom_generate=decoding, watermarking_config=mark), text)


def test_a_cache_of_another_kind_and_padding_on_the_right_are_refused() -> None:
    decoding = SpeculativeDecoding(PromptLookup(), tree=4)
    model, inputs = tiny(), prompts([5, 3])
    with pytest.raises(QuickmergeError, match="StaticLayer in a StaticCache, whose size is fixed"):
        greedy(model, inputs, 4, custom_generate=decoding, **past(StaticCache(model.config, max_cache_len=20)))
    right = {name: x.flip(1) for name, x in inputs.items()}
    with pytest.raises(QuickmergeError, match="attention_mask must end with 1 in every row: pad on the left"):
        greedy(model, right, 4, custom_generate=decoding)
    assert torch.equal(
        greedy(model, inputs, 4, custom_generate=decoding, **past(DynamicCache())), greedy(model, inputs, 4)
    )
