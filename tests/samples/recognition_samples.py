"""Tiny recognizers, tokenizers of every kind, and slow, obvious statements of what a recognizer computes."""

from __future__ import annotations

from typing import Any

import hosts_zoo
import torch
import vision_zoo
from strategies import generator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from quickmerge.recognition import Prefix, Recognizer

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PROMPT = "The objects are"
NAMES = ("cat", "red", "car", "traffic", "lights", "dog", "sky")
TEXT = [
    "The objects in the image are cat, dog, red car, traffic lights; a blue sky, two dogs, cats and cars",
    "sunflower, sun, sunlight, flower pot, potted plant, plants; the image of a red sunlight",
] * 4


def words(*more: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, in which every word is one token."""
    vocabulary = [*SPECIAL, ",", *PROMPT.split(), *NAMES, *more]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrapped(made)


def pieces(kind: str) -> PreTrainedTokenizerFast:
    """A trained tokenizer of pieces: ``bytes`` (as GPT-2), ``metaspace`` (as SentencePiece) or ``wordpiece``."""
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=120, special_tokens=list(SPECIAL), show_progress=False)
    else:
        made = Tokenizer(models.BPE())
        alphabet = []
        if kind == "bytes":
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            made.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
        else:
            made.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
            )
            made.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(
            vocab_size=360 if kind == "bytes" else 90, special_tokens=list(SPECIAL), initial_alphabet=alphabet,
            show_progress=False,
        )  # fmt: skip
    made.train_from_iterator(TEXT, trainer)
    return wrapped(made)


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def build(
    family: str = "llama",
    vision: str = "vit",
    *,
    dtype: torch.dtype = torch.float64,
    blocks: int = 2,
    tokenizer: Any = None,
    seed: int = 0,
    language: dict[str, Any] | None = None,
    **more: Any,
) -> Recognizer:
    """A recognizer with random weights, large enough that every token matters."""
    tokenizer = tokenizer or words()
    settings = {"vocab_size": len(tokenizer), **(language or {})}
    made = hosts_zoo.build(family, dtype=dtype, seed=seed, **settings)
    eye = vision_zoo.build(vision, dtype=dtype, seed=seed)
    torch.manual_seed(seed)
    settings = {"prompt": PROMPT, "image_size": vision_zoo.IMAGE, **more}
    recognizer = Recognizer.new(eye, made, tokenizer, blocks=blocks, **settings)
    with torch.no_grad():  # the same numbers in every precision
        for value, std in ((recognizer.projector.weight, 0.3), (recognizer.boundary, 1.0)):
            value.copy_(std * torch.randn(value.shape, generator=generator(seed), dtype=torch.float64))
    return recognizer.eval()


def seen(recognizer: Recognizer, rows: int = 2, tokens: int = 5, seed: int = 0) -> Tensor:
    """Random features of images."""
    shape = (rows, tokens, recognizer.projector.in_features)
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(recognizer.boundary.dtype)


def ragged(rows: int, tokens: int, seed: int) -> Tensor:
    """Which features are valid: at least one of each image, anywhere."""
    valid = torch.rand(rows, tokens, generator=generator(seed)) < 0.6
    valid[torch.arange(rows), torch.arange(rows) % tokens] = True
    return valid


def prefixes(recognizer: Recognizer, rows: int = 2, tokens: int = 5, seed: int = 0, *, whole: bool = False) -> Prefix:
    """Prefixes of images with random features, some of them padding."""
    valid = None if whole else ragged(rows, tokens, seed)
    with torch.no_grad():
        return recognizer.prefix(seen(recognizer, rows, tokens, seed), valid)


def alone(recognizer: Recognizer, prefix: Prefix, row: int, ids: list[int], *, both_ways: bool = True) -> Tensor:
    """``(T + 1, V)`` logits of the last prefix row and of every token of ``ids``, one plain sequence without padding.

    The mask is written out pair by pair; sliding windows too.
    """
    language = recognizer.language
    config = language.config
    keep = prefix.valid[row]
    before, image = prefix.embeds[row][keep], prefix.image[row][keep].tolist()
    tokens = language.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
    embeds = torch.cat([before, tokens])[None]
    n = embeds.shape[1]
    image += [False] * len(ids)

    def mask(window: int | None) -> Tensor:
        out = torch.full((n, n), torch.finfo(embeds.dtype).min, dtype=embeds.dtype)
        for i in range(n):
            for j in range(n):
                sees = j <= i or (both_ways and image[i] and image[j])
                if sees and (window is None or i - j < window):
                    out[i, j] = 0
        return out[None, None]

    windows = [hosts_zoo.window_of(config, layer) for layer in range(config.num_hidden_layers)]
    masks: Any = mask(windows[0])
    if len(set(windows)) > 1:
        masks = {config.layer_types[layer]: mask(window) for layer, window in enumerate(windows)}
    out = language(
        inputs_embeds=embeds, attention_mask=masks, position_ids=torch.arange(n)[None], use_cache=False
    ).logits[0]
    return out[len(before) - 1 :]


def label_log_p(recognizer: Recognizer, prefix: Prefix, row: int, label: str) -> float:
    """``log P(label | image)`` with the separator, by one separate forward."""
    ids = [*recognizer.labels.ids(label), recognizer.labels.sep]
    log_p = alone(recognizer, prefix, row, ids[:-1]).double().log_softmax(-1)
    return sum(float(log_p[t, token]) for t, token in enumerate(ids))
