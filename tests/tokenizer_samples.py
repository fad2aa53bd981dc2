"""Small real tokenizers of every family, trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The cat sat on the mat, and the dog ran after the cat.",
    "A transformer pays for every token that it reads.",
    "Numbers such as 12, 345 and 6789 are cut into pieces; 2024 is a year.",
    "def add(a, b):\n    return a + b  # the sum\n",
    "Ein schöner Tag für größere Übungen, naïve déjà vu.",
    "Кошка сидит на окне. 猫は窓に座っています。",
    "the the the cat cat and and and (not) so, so: really!",
)


def wrap(backend: Tokenizer, **roles: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)


@cache
def byte_level(size: int = 420, special: Sequence[str] = ("<|endoftext|>",)) -> PreTrainedTokenizerFast:
    """GPT-2's family; every text can be cut."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return wrap(backend, eos_token=special[0])


def byte_tokens() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def sentencepiece_bpe(size: int = 520, way: str = "prepend") -> PreTrainedTokenizerFast:
    """Llama 2's family, with bytes for what has no token; both of the ways in which its spaces are written."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # words are kept apart while it is trained, as SentencePiece does
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*special, *byte_tokens()], show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    parts = json.loads(backend.to_str())
    parts["added_tokens"] = [one for one in parts["added_tokens"] if one["content"] in special]
    if way == "prepend":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        parts["normalizer"] = json.loads(normalizers.Sequence(steps).__getstate__())
        parts["pre_tokenizer"] = None
    else:
        metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        parts["pre_tokenizer"] = json.loads(metaspace.__getstate__())
    return wrap(Tokenizer.from_str(json.dumps(parts)), unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def unigram() -> PreTrainedTokenizerFast:
    """T5's family: no bytes, so what it doesn't know is unknown."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return wrap(backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


@cache
def wordpiece(lowercase: bool = True) -> PreTrainedTokenizerFast:
    """BERT's family."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return wrap(backend, **{f"{role}_token": text for role, text in roles.items()})


def from_words(words: Mapping[str, int], *added: AddedToken, **roles: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that merges its letters into the words that it is given, and nothing else."""
    vocabulary = {**words}
    for character in pre_tokenizers.ByteLevel.alphabet():
        vocabulary.setdefault(character, len(vocabulary))
    merges = []
    for word in sorted(words, key=len):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
            if (pair := (word[: end - 1], word[end - 1])) not in merges:
                merges.append(pair)
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added))
    return wrap(backend, **roles)
