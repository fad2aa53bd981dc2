"""Choosing among given labels: each label's exact probability, all of them packed behind one prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.recognition.guess import Guess, check_share, ranked
from quickmerge.recognition.model import Prefix, Recognizer
from quickmerge.recognition.tree import Tree

__all__ = ["choose", "closed_set"]


@torch.no_grad()
def closed_set(recognizer: Recognizer, prefix: Prefix, labels: Sequence[str], *, chunk: int = 256) -> Tensor:
    """``log P(label | image)`` of every label with its closing separator: ``(B, n)``.

    Args:
        recognizer: what reads.
        prefix: of B images.
        labels: n labels.
        chunk: how many tokens of labels are read at once. Fewer take less memory.

    Raises:
        ValueError: for a chunk that is no whole number of at least 1.
        QuickmergeError: there is no label, or one that can't be used.
    """
    chunk = whole_number("chunk", chunk)
    if isinstance(labels, str) or not labels:
        raise QuickmergeError(f"labels must hold at least one label, got {labels!r}")
    codec, tree = recognizer.labels, Tree(recognizer, prefix)
    tokens = [(*codec.ids(label), codec.sep) for label in labels]
    start = tree.first.log_softmax(-1)
    device = start.device
    out = start[:, torch.tensor([each[0] for each in tokens], device=device)]
    for part in _parts(tokens, chunk):
        group = torch.tensor([k for k, each in enumerate(part) for _ in tokens[each]], device=device)[None]
        ids = torch.tensor([i for each in part for i in tokens[each]], device=device)[None]
        # every row but those of separators predicts the next token of its label
        inside = torch.cat([group[:, 1:] == group[:, :-1], group[:, :1] != group[:, :1]], 1)
        logits = tree.fork().pack(ids, group + 1, inside.expand(len(start), -1))
        logits = logits.view(len(start), -1, logits.shape[-1])
        target, label = ids[:, 1:][inside[:, :-1]], group[inside]
        log_p = logits.gather(-1, target.expand(len(start), -1)[..., None])[..., 0] - logits.logsumexp(-1)
        out = out.index_add(1, torch.tensor(part, device=device)[label], log_p)
    return out


def choose(
    recognizer: Recognizer, prefix: Prefix, labels: Sequence[str], top: int | None = None, minimum: float = 0.0
) -> list[list[Guess]]:
    """The most probable of given labels, with their exact probabilities; a label that is there twice counts once.

    Raises:
        ValueError, QuickmergeError: as `closed_set`.
    """
    check_share("minimum", minimum)
    names = list(dict.fromkeys(recognizer.labels.normal(label) for label in labels))
    rows = closed_set(recognizer, prefix, names).tolist()
    return [ranked(zip(names, row, strict=True), top, minimum) for row in rows]


def _parts(tokens: list[tuple[int, ...]], chunk: int) -> Iterator[list[int]]:
    """Labels by number, as many at once as ``chunk`` tokens hold, but one at least."""
    part: list[int] = []
    size = 0
    for index, each in enumerate(tokens):
        if part and size + len(each) > chunk:
            yield part
            part, size = [], 0
        part.append(index)
        size += len(each)
    yield part
