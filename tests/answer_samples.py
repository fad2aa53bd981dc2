"""A vision-language model of a few thousand weights that is asked about images."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from quickmerge.merge.train.new_vlm import new_vlm

WORDS = "what where is the red star at left right top there a how many of yes no 0 1 2 3 ? user assistant :".split()  # noqa: SIM905


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    made.chat_template = (
        "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' <end> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
    )
    return made


def tiny_vlm() -> tuple[Any, Any]:
    """A LLaVA of a tiny DINOv2 and a tiny Llama: 36 visual tokens, weights large enough to prefer something."""
    torch.manual_seed(0)
    vision = hf.Dinov2Model(
        hf.Dinov2Config(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2, image_size=48, patch_size=8,
            initializer_range=0.3,
        )
    )  # fmt: skip
    language = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=len(WORDS) + 2, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, eos_token_id=1, bos_token_id=None, pad_token_id=None, initializer_range=0.3,
        )
    )  # fmt: skip
    images = hf.BitImageProcessorPil(
        size={"height": 48, "width": 48}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    return new_vlm(vision.eval(), language.eval(), tokenizer(), images, layers=(1, 3))
