"""A vision-language model made of a vision encoder and a language model: LLaVA (Liu et al., arXiv 2304.08485)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quickmerge.datasets.labelled import PixelFormat
from quickmerge.errors import QuickmergeError, UnsupportedModelError, whole_number
from quickmerge.models.chat import end_of_turn, with_images
from quickmerge.models.encoder import Encoder, find_encoder, prefix_of

__all__ = ["IMAGE", "new_vlm"]

IMAGE = "<image>"
"""The token that stands for a patch of an image."""


def new_vlm(
    vision: PreTrainedModel,
    language: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    processor: Any,
    *,
    layers: Sequence[int] = (4, 8, 11),
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The LLaVA of transformers around copies of a vision encoder and a language model.

    The patches' features are put one after another from several depths of the encoder: low ones hold colours and
    edges, high ones what is seen. A multilayer perceptron of two layers, drawn from torch's global generator, takes
    them to the width of the language model. Neither of the two given models is changed, nor is the tokenizer.

    Args:
        vision: a vision transformer, at most a class token in front of its patches.
        language: a causal language model, held in the type that the result shall have.
        tokenizer: of the language model.
        processor: the image processor of the encoder. The new one scales an image's shorter side to what is cut out,
            so that a square image loses nothing.
        layers: hidden states of the encoder: 0 is what its first block reads, L what its last one gives.

    Raises:
        UnsupportedModelError: a model is not of a kind that LLaVA can hold.
        QuickmergeError: `layers` or the processor's image size does not fit the encoder.
    """
    encoder = find_encoder(vision)
    head = language.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or getattr(head, "bias", None) is not None:
        raise UnsupportedModelError(
            f"language must be a causal language model whose output is one matrix, got a {type(language).__name__}"
        )
    chosen = _depths(layers, len(encoder))
    form = PixelFormat.of(processor)
    class_tokens, patches = _tokens(encoder, form)
    words = copy.deepcopy(tokenizer)
    words.add_special_tokens({"extra_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    words.chat_template = with_images(words.chat_template, IMAGE)
    strategy = "default" if class_tokens else "full"
    config = LlavaConfig(
        vision_config=copy.deepcopy(encoder.config),
        text_config=copy.deepcopy(language.config),
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        image_seq_length=patches,
        vision_feature_layer=chosen,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=bool(language.config.tie_word_embeddings),
    )
    config.text_config.vocab_size = max(len(words), int(language.config.vocab_size))
    model = LlavaForConditionalGeneration(config).to(language.dtype)
    _copy_weights(model, encoder, language)
    if language.generation_config is not None:
        model.generation_config = copy.deepcopy(language.generation_config)
    _end_with(model, end_of_turn(words))
    return model.eval(), LlavaProcessor(
        image_processor=_uncut(processor, form),
        tokenizer=words,
        patch_size=encoder.config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=class_tokens,
        chat_template=words.chat_template,
        image_token=IMAGE,
    )


def _end_with(model: LlavaForConditionalGeneration, end: int) -> None:
    """Let `generate` stop at a token too."""
    assert model.generation_config is not None
    known = model.generation_config.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    if end not in ends:
        model.generation_config.eos_token_id = [*ends, end] if ends else end


def _depths(layers: Sequence[int], blocks: int) -> list[int]:
    chosen = [whole_number("each of layers", each, 0) for each in layers]
    if not chosen or len(set(chosen)) != len(chosen) or max(chosen) > blocks:
        raise QuickmergeError(f"layers must be different whole numbers from 0 to {blocks}, got {layers!r}")
    return chosen


@torch.no_grad()
def _tokens(encoder: Encoder, form: PixelFormat) -> tuple[int, int]:
    """How many tokens stand in front of the patches of an image, and how many patches there are."""
    name, side = type(encoder.base).__name__, encoder.config.patch_size
    if not isinstance(side, int) or form.height % side or form.width % side:
        raise QuickmergeError(
            f"the image processor must make images that patches of {side} pixels fill, got {form.height} x {form.width}"
        )
    like = next(encoder.base.parameters())
    pixels = torch.zeros(1, 3, form.height, form.width, dtype=like.dtype, device=like.device)
    try:
        seen: Tensor = encoder.base(pixels).last_hidden_state
    except ValueError as error:
        raise QuickmergeError(f"vision takes no images of {form.height} x {form.width} pixels ({error})") from error
    grid = encoder.grid(pixels)
    class_tokens = prefix_of(seen.shape[1], grid, name)
    if class_tokens > 1:
        raise UnsupportedModelError(
            f"vision must have at most a class token in front of its patches, {name} has {class_tokens} tokens there"
        )
    return class_tokens, grid[1] * grid[2]


@torch.no_grad()
def _copy_weights(model: LlavaForConditionalGeneration, encoder: Encoder, language: PreTrainedModel) -> None:
    # a classifier may lack the pooler that the bare encoder has, and that is not used here either
    missing, _ = model.model.vision_tower.load_state_dict(encoder.base.state_dict(), strict=False)
    if used := [name for name in missing if not name.startswith(("pooler.", "head."))]:
        raise UnsupportedModelError(f"vision lacks weights of {type(model.model.vision_tower).__name__}: {used[0]}")
    state = dict(language.base_model.state_dict())
    embedding, head = language.get_input_embeddings(), language.get_output_embeddings()
    made = model.get_input_embeddings()
    key = next(name for name, value in language.base_model.named_parameters() if value is embedding.weight)
    state[key] = _with_rows(embedding.weight, made.weight.shape[0])
    model.model.language_model.load_state_dict(state)
    if model.lm_head.weight is not made.weight:
        model.lm_head.weight.copy_(_with_rows(head.weight, made.weight.shape[0]))


def _with_rows(matrix: Tensor, rows: int) -> Tensor:
    """A matrix of ``rows`` rows, of which the new ones are the mean of the others."""
    mean = matrix.float().mean(0, keepdim=True).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(rows - matrix.shape[0], -1)])


def _uncut(processor: Any, form: PixelFormat) -> Any:
    settings = {
        **processor.to_dict(),
        "do_resize": True,
        "do_center_crop": True,
        "size": {"shortest_edge": min(form.height, form.width)},
        "crop_size": {"height": form.height, "width": form.width},
    }
    return type(processor).from_dict(settings)
