"""LLaVA in vLLM with fewer visual tokens: CLIP and SigLIP towers, each patch a token, chosen behind the projector."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.merge.reducers.base import merge_visual_tokens
from quickmerge.merge.tokens.budget import kept_of
from quickmerge.serve.vllm.plugin import check_version

check_version()  # in front of what other versions may not have

from vllm.config import VllmConfig  # noqa: E402
from vllm.model_executor.models.llava import (  # noqa: E402
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper  # noqa: E402
from vllm.multimodal import MULTIMODAL_REGISTRY  # noqa: E402
from vllm.multimodal.parse import ImageEmbeddingItems, MultiModalDataItems  # noqa: E402

from quickmerge.serve.vllm.settings import visual_of  # noqa: E402
from quickmerge.serve.vllm.towers import TowerHeads, check_engine  # noqa: E402

__all__ = ["QuickmergeLlava"]

TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Model types of the towers that are served."""

WHERE = "quickmerge's LLaVA in vLLM"
POSITIONS = "consecutive"
"""vLLM counts the tokens that are there: it has no places for those that went."""


def _check(config: Any) -> None:
    kind = config.vision_config.model_type
    if kind not in TOWERS:
        raise QuickmergeError(f"vision_config must be of {' or '.join(TOWERS)} in {WHERE}, got {kind}")
    if not isinstance(config.vision_feature_layer, int):
        raise QuickmergeError(f"vision_feature_layer must be one layer in {WHERE}, got {config.vision_feature_layer!r}")


class QuickmergeLlavaInfo(LlavaProcessingInfo):
    """Counts the tokens that will be there."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """How many tokens of an image the language model reads."""
        config = self.get_hf_config()
        _check(config)
        every = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return kept_of(visual_of(config, POSITIONS).budget, every)


class QuickmergeLlavaProcessor(LlavaMultiModalProcessor):
    """Refuses what can't be reduced."""

    def _get_prompt_updates(self, mm_items: MultiModalDataItems, *args: Any, **kwargs: Any) -> Sequence[Any]:
        if "image" in mm_items and isinstance(mm_items.get_items("image", object), ImageEmbeddingItems):
            raise QuickmergeError("image_embeds can't be given to quickmerge's LLaVA in vLLM: give images")
        return cast("Sequence[Any]", super()._get_prompt_updates(mm_items, *args, **kwargs))


@MULTIMODAL_REGISTRY.register_processor(
    QuickmergeLlavaProcessor, info=QuickmergeLlavaInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class QuickmergeLlava(LlavaForConditionalGeneration):
    """vLLM's LLaVA, reading of each image what the reducer of ``hf_overrides["quickmerge"]["visual"]`` leaves.

    What it reads is what `quickmerge.reduce(model, reducer, positions="consecutive")` reads in transformers.
    """

    # transformers 5 saves a tower without the name of its inner model.
    hf_to_vllm_mapper = (
        WeightsMapper(
            orig_to_new_regex={
                re.compile(r"^(?:model\.)?vision_tower\.(embeddings|encoder|pre_layrnorm|post_layernorm|head)\."): (
                    r"vision_tower.vision_model.\1."
                )
            }
        )
        | LlavaForConditionalGeneration.hf_to_vllm_mapper
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        _check(config)
        check_engine(vllm_config)
        self._asked = visual_of(config, POSITIONS)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        attention: Any = self.vision_tower.vision_model.encoder.layers[-1].self_attn
        clip = config.vision_config.model_type == "clip_vision_model"
        self._watch = TowerHeads(
            attention.qkv_proj, self._asked, attention.num_heads_per_partition, class_token=clip,
            shared=attention.tp_size > 1,
        )  # fmt: skip
        side = config.vision_config.image_size // config.vision_config.patch_size
        gone = int(config.vision_feature_select_strategy == "default")
        # A class token that stays belongs to no place in the image, and a patch that goes has one.
        self._gone, self._grid = gone, (1, side, side) if gone == int(clip) else None

    def _process_image_input(self, image_input: Mapping[str, Any]) -> Tensor:
        features = self._process_image_pixels(image_input)
        saliency, key = (None if x is None else x[:, self._gone :] for x in self._watch.take())
        asks = self._asked.needs.visual
        kept, _, _ = merge_visual_tokens(
            self.multi_modal_projector(features), self._asked,
            features=features if "tower" in asks else None, saliency=saliency, key=key, grid=self._grid,
            depth=self.config.text_config.num_hidden_layers,
        )  # fmt: skip
        return kept
