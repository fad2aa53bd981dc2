"""What Qwen2.5-VL and Qwen3-VL share in vLLM: visual tokens with places in a grid, of which some are left.

The text behind an image stands where it would stand behind all of its tokens, and a token that stays keeps its place.
Which tokens stay is known once an image was encoded, after vLLM has asked for places. So places of visual tokens are
left open at first (below 0), each token carries its own in further channels of its embedding, and vLLM's door for
models that prune videos (`recompute_mrope_positions`) fills them in, chunk by chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quickmerge.errors import QuickmergeError
from quickmerge.merge.reducers.base import Reducer, merge_visual_tokens
from quickmerge.merge.tokens.budget import kept_of
from quickmerge.serve.vllm.plugin import check_version

check_version()  # in front of what other versions may not have

from vllm.config import VllmConfig  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from quickmerge.serve.vllm.settings import visual_of  # noqa: E402
from quickmerge.serve.vllm.towers import PackedTower, check_engine  # noqa: E402

__all__ = ["CHANNELS", "ImagesOnly", "KeptCounts", "Squares"]

POSITIONS = "kept"
BASE = 128
"""Places are written as two digits of this base, which bfloat16 holds exactly."""
CHANNELS = 6
"""Channels behind an embedding: two digits of each of the three places."""
DOOR = 1e-9
"""The share of videos' tokens that vLLM is told to prune: any above 0 opens its door, and videos are not served."""


class ImagesOnly:
    """A ``ProcessingInfo`` without videos, whose tokens come frame by frame."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images, and no video."""
        return {"image": None, "video": 0}


class KeptCounts:
    """A processor that makes room for the tokens that will be there."""

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> Sequence[Any]:
        config = self.info.get_hf_config()  # type: ignore[attr-defined]
        budget = visual_of(config, POSITIONS).budget
        updates = super()._get_prompt_updates(*args, **kwargs)  # type: ignore[misc]
        return [_shortened(each, budget) if each.modality == "image" else each for each in updates]


def _shortened(update: Any, budget: Any) -> Any:
    every = cast("Callable[[int], list[int]]", update.replacement)

    def kept(index: int) -> list[int]:
        tokens = every(index)
        return tokens[: kept_of(budget, len(tokens))]

    return replace(update, replacement=kept)


class Squares:
    """A model in front of vLLM's own: its visual tokens chosen, and the places of those that stay."""

    _asked: Reducer
    _tower: PackedTower
    _depth: int
    _wide: int
    visual: Any
    config: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config, engine = vllm_config.model_config.hf_config, vllm_config.model_config.multimodal_config
        check_engine(vllm_config)
        asked = visual_of(config, POSITIONS)
        if engine.video_pruning_rate not in (None, DOOR):
            raise QuickmergeError(
                f"video_pruning_rate must be left out with quickmerge's models in vLLM, got {engine.video_pruning_rate}"
            )
        if vllm_config.use_v2_model_runner:
            raise QuickmergeError(
                "VLLM_USE_V2_MODEL_RUNNER must be 0 with quickmerge's Qwen models in vLLM, whose second model runner "
                "asks no model for the places of tokens that were pruned"
            )
        engine.video_pruning_rate = DOOR
        _open_on_cpu()
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        text = config.get_text_config()
        self._asked, self._depth, self._wide = asked, text.num_hidden_layers, text.hidden_size
        self._tower = PackedTower(self.visual, config.vision_config, asked)
        # How far new tokens stand from where they are counted, by the tensor of a prompt's places.
        self._behind: Any = WeakTensorKeyDictionary()

    # Choosing ---------------------------------------------------------------------------------------------------

    def _process_image_input(self, image_input: Mapping[str, Any]) -> tuple[Tensor, ...]:
        if image_input["type"] != "pixel_values":
            raise QuickmergeError("image_embeds can't be given to quickmerge's models in vLLM: give images")
        every: tuple[Tensor, ...] = super()._process_image_input(image_input)  # type: ignore[misc]
        return every

    def _postprocess_image_embeds_evs(
        self, image_embeds_split: tuple[Tensor, ...], image_input: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Reduce the tokens of each image, ``(n, D)``, and write behind each where it stands: ``(K, D + CHANNELS)``."""
        grids = [cast("tuple[int, int, int]", tuple(each)) for each in image_input["image_grid_thw"].tolist()]
        out = []
        for vectors, seen in zip(image_embeds_split, self._tower.take(grids), strict=True):
            hidden, more = vectors[None, :, : self._wide], vectors[None, :, self._wide :]
            told = [None if part is None else part[None] for part in seen.parts()]
            kept, anchors, plan = merge_visual_tokens(
                hidden, self._asked, features=told[0], saliency=told[1], key=told[2], grid=seen.grid, depth=self._depth
            )
            if more.shape[-1]:
                # features of lower layers of the tower, which blocks of the language model are given of each token
                kept = torch.cat([kept, plan.merge(more).to(kept.dtype)], -1)
            assert seen.grid is not None
            places = torch.stack(torch.unravel_index(anchors[0], seen.grid), -1)
            digits = torch.cat([places // BASE, places % BASE], -1)
            out.append(torch.cat([kept[0], digits.to(kept.dtype)], -1))
        return tuple(out)

    # Places -----------------------------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Places of a prompt, ``(3, N)``: of the text those behind whole images, of visual tokens ``-1 - (first)``."""
        merge = self.config.vision_config.spatial_merge_size
        parts: list[Tensor] = []
        column = place = 0
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            _, height, width = (int(each) for each in feature.data["image_grid_thw"].data.flatten())
            start = feature.mm_position.offset
            parts.append(torch.arange(place, place + start - column))
            place += start - column
            parts.append(torch.full((feature.mm_position.length,), -1 - place))
            column = start + feature.mm_position.length
            place += max(height // merge, width // merge)
        rest = len(input_tokens) - column
        parts.append(torch.arange(place, place + rest))
        positions = torch.cat(parts).expand(3, -1).clone()
        self._behind[positions] = place + rest - len(input_tokens)
        return positions, self._behind[positions]

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Take the channels off visual tokens that are about to be read, and write where they stand.

        Args:
            input_ids: of the whole prompt.
            multimodal_embeddings: of the images, or parts of them, that are read now.
            mrope_positions: ``(3, N)``, of `get_mrope_input_positions`, with what was written before.
            num_computed_tokens: how many tokens of the prompt have been read.
        """
        ids = torch.as_tensor(input_ids)
        positions = mrope_positions.clone()
        columns = (ids.cpu() == self.config.image_token_id).nonzero().flatten()
        columns = columns[columns >= num_computed_tokens]
        plain = [each[:, :-CHANNELS] for each in multimodal_embeddings]
        if plain:
            digits = torch.cat([each[:, -CHANNELS:] for each in multimodal_embeddings]).to(positions.device).long().T
            columns = columns[: digits.shape[1]]
            first = positions[:, columns]
            # Those that were written before, in front of a preemption, stay.
            positions[:, columns] = torch.where(first < 0, -1 - first + digits[:3] * BASE + digits[3:], first)
        return plain, positions, self._behind[mrope_positions]


def _open_on_cpu() -> None:
    """Let vLLM's runner for CPUs ask whether the model prunes, which only the one for GPUs does when it loads it."""
    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    own = CPUModelRunner.initialize_kv_cache
    if getattr(own, "quickmerge", False):
        return

    @functools.wraps(own)
    def initialize(runner: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(runner.model, Squares):
            runner.is_multimodal_pruning_enabled = True
        return own(runner, *args, **kwargs)

    initialize.quickmerge = True  # type: ignore[attr-defined]
    CPUModelRunner.initialize_kv_cache = initialize
