"""Tokenizer transplantation: another tokenizer for a model, without training (arXiv 2506.06607)."""

from quickmerge.vocabulary.cooccurrence import embeddings_from_text
from quickmerge.vocabulary.digits import DigitReport, digit_report
from quickmerge.vocabulary.load_tokenizer import load_tokenizer
from quickmerge.vocabulary.matching import Matching, match
from quickmerge.vocabulary.omp import Sparse, omp
from quickmerge.vocabulary.report import Report
from quickmerge.vocabulary.select import choose
from quickmerge.vocabulary.tokens import Token, Vocabulary, read_vocabulary
from quickmerge.vocabulary.transplant import transplant

__all__ = [
    "DigitReport",
    "Matching",
    "Report",
    "Sparse",
    "Token",
    "Vocabulary",
    "choose",
    "digit_report",
    "embeddings_from_text",
    "load_tokenizer",
    "match",
    "omp",
    "read_vocabulary",
    "transplant",
]
