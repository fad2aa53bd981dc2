"""What of ``generate``'s arguments speculation can't keep: each told in one sentence."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from quickmerge.decoding.handed import Handed
from quickmerge.errors import QuickmergeError
from quickmerge.models.compat import (
    AlternatingCodebooksLogitsProcessor,
    ClassifierFreeGuidanceLogitsProcessor,
    GenerationMode,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from quickmerge.models.generation import check_temperature

__all__ = ["check_arguments"]

NEVER = (
    AlternatingCodebooksLogitsProcessor,
    ClassifierFreeGuidanceLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
"""Processors that run the model themselves, or count its steps."""

OUTPUTS = ("output_attentions", "output_hidden_states", "output_logits", "output_scores")


def check_arguments(
    input_ids: Tensor,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    model_kwargs: dict[str, Any],
    handed: Handed,
) -> None:
    """Raise QuickmergeError for what speculation can't keep."""
    rows = len(input_ids)
    if handed.assistant_model is not None:
        raise QuickmergeError("assistant_model must be left out: the drafter takes its place")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise QuickmergeError(
            f"speculative decoding is for greedy search and sampling, got {mode.value}: "
            "leave num_beams, penalty_alpha, dola_layers and prompt_lookup_num_tokens out"
        )
    for name in OUTPUTS:
        if getattr(config, name, None):
            raise QuickmergeError(f"{name} must be False with speculative decoding, got True")
    if config.use_cache is False or model_kwargs.get("use_cache") is False:
        raise QuickmergeError("use_cache must be True with speculative decoding, got False")
    if config.do_sample and config.temperature is not None:
        check_temperature("temperature", config.temperature)
    if config.prefill_chunk_size is not None:
        raise QuickmergeError(f"prefill_chunk_size must be left out, got {config.prefill_chunk_size}")
    if handed.synced_gpus:
        raise QuickmergeError("synced_gpus must be False with speculative decoding, got True")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0 or model_kwargs.get("inputs_embeds") is not None:
        raise QuickmergeError("speculative decoding needs the prompt as input_ids of at least one token, no embeddings")
    if handed.streamer is not None and rows > 1:
        raise QuickmergeError(f"streamer takes one row, got {rows}")
    for processor in processors:
        if isinstance(processor, NEVER):
            raise QuickmergeError(
                f"{type(processor).__name__} does not work with speculative decoding: leave guidance_scale out"
            )
        if rows > 1 and isinstance(processor, SynthIDTextWatermarkLogitsProcessor):
            # It remembers what it was last asked about, and would be asked about one row after another.
            raise QuickmergeError(f"watermarking_config of SynthID takes one row, got {rows}")
