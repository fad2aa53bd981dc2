"""The tokenizer of a CALM: a given one, or one that is made of the training text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError, UnknownModelError, first_sentence, whole_number
from quickmerge.files import read_text

__all__ = ["END", "read_tokenizer", "train_tokenizer"]

END = "<|endoftext|>"
ENDS = (END, "</s>", "<|im_end|>", "<|end_of_text|>", "<eos>")
"""What end tokens are called where a file does not say which one it is."""


def read_tokenizer(name: str) -> Any:
    """A tokenizer of transformers with an end token.

    Args:
        name: a model's name, folder or hub id as in `quickmerge.load`, a folder with a tokenizer alone, or a
            tokenizer.json file.

    Raises:
        QuickmergeError: there is none, or it has no end token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from quickmerge.models import MODELS, cache_folder
    from quickmerge.models.console import transformers_silenced
    from quickmerge.models.embedded import prepare_embedded
    from quickmerge.models.folder import TEXT_BYTES, check_files
    from quickmerge.models.hub import hub_folder
    from quickmerge.models.paths import check_regular, local_path

    path = local_path("tokenizer", name)
    try:
        with transformers_silenced():
            if path.is_file() and not (path.parent / "tokenizer_config.json").is_file():
                check_regular(path, TEXT_BYTES)
                tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
            elif name in MODELS:
                found = prepare_embedded(name, cache_folder(None), progress=True)
                tokenizer = AutoTokenizer.from_pretrained(found, trust_remote_code=False)
            else:
                folder = path.parent if path.is_file() else path
                folder = folder if folder.is_dir() else hub_folder(name, weights=False)
                check_files(folder)
                tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever their parsers raise
        if isinstance(error, QuickmergeError) and not isinstance(error, UnknownModelError):
            raise
        raise QuickmergeError(
            f"tokenizer must be a model's name, a folder or a tokenizer.json file, got {name!r} "
            f"({first_sentence(error)})"
        ) from error
    if tokenizer.eos_token_id is None:
        known = tokenizer.get_vocab()
        end = next((token for token in ENDS if token in known), None)
        if end is None:
            raise QuickmergeError(
                f"tokenizer {name!r} must have an end token, which closes a document, got none: name one as eos_token "
                "in a tokenizer_config.json beside it"
            )
        tokenizer.eos_token = end
    return tokenizer


def train_tokenizer(documents: Sequence[Path | str], size: int) -> Any:
    """A byte-level BPE tokenizer of some texts: it can write any text.

    Args:
        documents: files to read, or the texts themselves.
        size: tokens, the 256 bytes and the end token included.

    Raises:
        QuickmergeError: the texts are too few for so many tokens, or a file is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    size = whole_number("vocabulary", size, 257)

    def texts() -> Iterator[str]:
        for source in documents:
            yield read_text(source) if isinstance(source, Path) else source

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts(), trainer)
    if made.get_vocab_size() != size:
        raise QuickmergeError(
            f"vocabulary must be at most {made.get_vocab_size()}, as many different tokens as the texts give, "
            f"got {size}"
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, padding_side="left")
