"""Qwen2.5-VL in vLLM with fewer visual tokens; what is done to them is in `quickmerge.serve.vllm.squares`."""

from __future__ import annotations

from quickmerge.serve.vllm.squares import ImagesOnly, KeptCounts, Squares  # it sees to the version, so it comes first

# isort: split
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

__all__ = ["QuickmergeQwen2_5_VL"]


class _Info(ImagesOnly, Qwen2_5_VLProcessingInfo):
    pass


class _Processor(KeptCounts, Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class QuickmergeQwen2_5_VL(Squares, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL, reading of each image what the reducer of ``hf_overrides["quickmerge"]["visual"]`` leaves.

    What it reads is what `quickmerge.reduce(model, reducer)` reads in transformers.
    """
