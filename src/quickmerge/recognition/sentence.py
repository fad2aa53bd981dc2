"""Sentence embeddings: what two labels are compared by when they are not the same word."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, UnsupportedModelError, check_string

__all__ = ["SentenceEncoder"]

LONGEST = 256
"""Tokens of a text that are read, as all-MiniLM-L6-v2 was published; a label has a handful."""


class SentenceEncoder:
    """Texts as unit vectors: the mean of an encoder's last hidden states over a text's tokens, scaled to length 1.

    A text is embedded once, and remembered. Texts are read in batches of about one length, so that little is padded.

    Args:
        model: a transformers encoder that gives ``last_hidden_state``.
        tokenizer: its tokenizer.
        batch: texts read at once.

    Raises:
        ValueError: ``batch`` is below 1.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch: int = 64) -> None:
        if batch < 1:
            raise ValueError(f"batch must be a whole number of at least 1, got {batch!r}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch = batch
        self._known: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str] = "minilm-l6",
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> SentenceEncoder:
        """Load an encoder: an embedded name or a folder.

        Raises:
            UnsupportedModelError: it is neither, or the folder holds no encoder with a tokenizer.
            CacheFolderError, FetchError, DamagedWeightsError: as `quickmerge.models.load`.
        """
        from transformers import AutoModel, AutoTokenizer

        from quickmerge.models.download import cache_folder
        from quickmerge.models.embedded import EMBEDDED, SENTENCE_MODELS
        from quickmerge.models.folder import check_files, check_model_folder
        from quickmerge.models.read import first_sentence, read_config, read_weights, transformers_silenced
        from quickmerge.models.weights import local_path

        name = os.fspath(name_or_path)
        if name not in SENTENCE_MODELS and not local_path("name_or_path", name).is_dir():
            raise UnsupportedModelError(
                f"a sentence encoder is an embedded name ({', '.join(SENTENCE_MODELS)}) or a folder, got {name!r}"
            )
        source = str(EMBEDDED[name].prepare(cache_folder(cache_dir), progress=progress)) if name in SENTENCE_MODELS \
            else str(local_path("name_or_path", name))  # fmt: skip
        check_files(Path(source))
        with transformers_silenced():
            try:
                tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            except Exception as error:  # transformers raises whatever its parsers raise
                raise UnsupportedModelError(f"{name} has no usable tokenizer ({first_sentence(error)})") from error
            check_model_folder(Path(source))
            # A sentence encoder is saved without the pooler that BERT has, and none is used.
            model, lacking = read_weights(AutoModel, source, read_config(source), {"dtype": torch.float32})
        if any(not missing.startswith("pooler.") for missing in lacking):
            raise UnsupportedModelError(f"{name} lacks weights of a {type(model).__name__}: {', '.join(lacking[:3])}")
        return cls(model, tokenizer)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors ``(n, D)``, float32 on the CPU, one a text.

        Raises:
            QuickmergeError: a text is empty, or no text of whole characters.
        """
        for text in texts:
            check_string("each of the texts to embed", text)
            if not text.strip():
                raise QuickmergeError("texts to embed must hold something each, got an empty one")
        new = sorted({text for text in texts if text not in self._known}, key=lambda text: (len(text), text))
        for start in range(0, len(new), self.batch):
            part = new[start : start + self.batch]
            self._known.update(zip(part, self._embed(part), strict=True))
        if not texts:
            return torch.zeros(0, self.model.config.hidden_size)
        return torch.stack([self._known[text] for text in texts])

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> Tensor:
        device = next(self.model.parameters()).device
        read = self.tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt").to(device)
        hidden = self.model(**read).last_hidden_state.float()  # (n, N, D)
        valid = read["attention_mask"].unsqueeze(-1).float()  # (n, N, 1)
        mean = (hidden * valid).sum(1) / valid.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu()
