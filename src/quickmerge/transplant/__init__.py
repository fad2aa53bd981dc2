"""Tokenizer transplantation: another tokenizer for a model, without training (arXiv 2506.06607)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge._lazy import lazy

if TYPE_CHECKING:
    from quickmerge.models.tokenizers import load_tokenizer as load_tokenizer
    from quickmerge.transplant.api import transplant as transplant
    from quickmerge.transplant.choose_by_tokens import choose as choose
    from quickmerge.transplant.donor import embeddings_from_text as embeddings_from_text
    from quickmerge.transplant.matching import DigitReport as DigitReport
    from quickmerge.transplant.matching import Matching as Matching
    from quickmerge.transplant.matching import digit_report as digit_report
    from quickmerge.transplant.matching import match as match
    from quickmerge.transplant.matching_pursuit import Sparse as Sparse
    from quickmerge.transplant.matching_pursuit import omp as omp
    from quickmerge.transplant.quality import Report as Report
    from quickmerge.transplant.tokens import Token as Token
    from quickmerge.transplant.tokens import Vocabulary as Vocabulary
    from quickmerge.transplant.tokens import read_vocabulary as read_vocabulary

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "api": ("transplant",),
        "choose_by_tokens": ("choose",),
        "donor": ("embeddings_from_text",),
        "matching": (
            "DigitReport",
            "Matching",
            "digit_report",
            "match",
        ),
        "matching_pursuit": (
            "Sparse",
            "omp",
        ),
        "quality": ("Report",),
        "quickmerge.models.tokenizers": ("load_tokenizer",),
        "tokens": (
            "Token",
            "Vocabulary",
            "read_vocabulary",
        ),
    },
)
