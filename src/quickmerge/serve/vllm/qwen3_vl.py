"""Qwen3-VL in vLLM with fewer visual tokens; what is done to them is in `quickmerge.serve.vllm.squares`."""

from __future__ import annotations

from quickmerge.serve.vllm.squares import ImagesOnly, KeptCounts, Squares  # it sees to the version, so it comes first

# isort: split
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

__all__ = ["QuickmergeQwen3VL"]


class _Info(ImagesOnly, Qwen3VLProcessingInfo):
    pass


class _Processor(KeptCounts, Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=Qwen3VLDummyInputsBuilder)
class QuickmergeQwen3VL(Squares, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL, reading of each image what the reducer of ``hf_overrides["quickmerge"]["visual"]`` leaves.

    What it reads is what `quickmerge.reduce(model, reducer)` reads in transformers.

    Features of lower layers of the tower (DeepStack) stand behind the embeddings, and go and merge with them.
    """
