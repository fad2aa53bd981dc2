"""Texts for the benchmarks of multipole attention: long pieces of documents, spans that come twice, generated text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError

HEAD = 256
"""Tokens of text in front of a span that comes twice, so that it is neither a sink nor at the beginning."""


@dataclass(frozen=True)
class Piece:
    """Token ids ``(1, N)`` of a text, what kind of text it is, and the documents it was joined from."""

    name: str
    kind: str
    ids: Tensor


@dataclass(frozen=True)
class Copied:
    """A context ``(1, N)`` that holds a ``span (1, S)`` of random tokens once, and ``other`` never."""

    name: str
    kind: str
    filler: int
    context: Tensor
    span: Tensor
    other: Tensor


def pieces(tokenizer: Any, folder: Path, tokens: int, count: int) -> list[Piece]:
    """``count`` pieces of ``tokens`` tokens, kinds taking turns; ``folder`` holds a folder of texts for each kind.

    A piece starts where a document starts. Where that is too short the next ones of its kind follow, and the next piece
    starts with the document after those: no token is in two pieces.

    Raises:
        QuickmergeError: the documents are not enough.
    """
    kinds = sorted(path for path in folder.glob("*") if path.is_dir())
    if not kinds:
        raise QuickmergeError(f"{folder} holds no documents; benchmarks/documents.py gathers some")
    found: list[Piece] = []
    for place, kind in enumerate(kinds):
        share = (count - place + len(kinds) - 1) // len(kinds)
        found += _of_kind(tokenizer, kind, tokens, share)
    return found


def _of_kind(tokenizer: Any, folder: Path, tokens: int, count: int) -> list[Piece]:
    cut: list[Piece] = []
    names: list[str] = []
    ids: list[int] = []
    for path in sorted(folder.glob("*.txt")):
        names.append(path.stem)
        ids += tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            cut.append(Piece(" + ".join(names), folder.name, torch.tensor([ids[:tokens]])))
            names, ids = [], []
    if len(cut) < count:
        raise QuickmergeError(f"{folder} must hold {count} texts of {tokens} tokens, got {len(cut)}")
    return [cut[(2 * i + 1) * len(cut) // (2 * count)] for i in range(count)]


def copied(tokenizer: Any, folder: Path, filler: int, span: int, count: int) -> list[Copied]:
    """``count`` contexts in which a random span is followed by ``filler`` tokens of text.

    The span's tokens are drawn evenly from those of the vocabulary that are not special, anew for each context.
    """
    special = set(tokenizer.all_special_ids)
    usual = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    found = []
    for number, piece in enumerate(pieces(tokenizer, folder, HEAD + filler, count)):
        rng = torch.Generator().manual_seed(number)
        one, other = usual[torch.randint(len(usual), (2, span), generator=rng)].split(1)
        context = torch.cat([piece.ids[:, :HEAD], one, piece.ids[:, HEAD:]], 1)
        found.append(Copied(piece.name, piece.kind, filler, context, one, other))
    return found


def written(model: Any, prompt: Tensor, tokens: int, *, temperature: float, top_p: float, seed: int) -> Tensor:
    """``tokens`` tokens ``(1, tokens)`` that the model writes after ``prompt``, sampled from its full attention."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        whole: Tensor = model.generate(
            prompt, do_sample=True, temperature=temperature, top_p=top_p, top_k=0, min_new_tokens=tokens,
            max_new_tokens=tokens, attention_mask=torch.ones_like(prompt), pad_token_id=0,
        )  # fmt: skip
    return whole[:, prompt.shape[1] :]
