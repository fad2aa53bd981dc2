"""Labels decoded one after the other, ``a, b, c``, as a caption is: what one-shot sampling is held against.

Every token sees the image and all tokens before it, whatever the mask in training was. The row of a separator has to
know what follows, so a recognizer for this is trained with the objective ``reference``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from quickmerge.errors import whole_number
from quickmerge.recognition.branches import Tree
from quickmerge.recognition.guess import Guess
from quickmerge.recognition.labels import LabelCodec
from quickmerge.recognition.network import Network, Prefix

__all__ = ["beam", "beam_ids", "greedy", "greedy_ids"]

Written = list[tuple[int, float]]
"""Tokens with their log-probabilities, in the order in which they were written."""
TIMES = 3
"""A sequence that says one label so many times goes round in circles."""


def greedy(
    recognizer: Network, prefix: Prefix, labels: int | None = None, *, max_tokens: int = 64
) -> list[list[Guess]]:
    """The labels of the sequence that always goes on with the most probable token, each once, in their order.

    The sequence ends with the end-of-text token, after ``max_tokens`` tokens, once it has ``labels`` different labels,
    or when a label comes for the third time. A label that it does not close is left out. A score is the probability of
    the label's tokens given all before it.

    Args:
        recognizer: what reads.
        prefix: of B images.
        labels: how many labels at most, None for as many as come.
        max_tokens: of the whole sequence.

    Raises:
        ValueError: naming the setting that is out of range.
    """
    return [_guesses(recognizer, each, labels) for each in greedy_ids(recognizer, prefix, labels, max_tokens)]


@torch.no_grad()
def greedy_ids(recognizer: Network, prefix: Prefix, labels: int | None, max_tokens: int) -> list[Written]:
    """The tokens of `greedy` and their log-probabilities."""
    _check(labels, max_tokens)
    tree, codec, ends = Tree(recognizer, prefix), recognizer.labels, _ends(recognizer)
    written: list[Written] = [[] for _ in prefix.embeds]
    going, logits, base = list(range(len(written))), tree.first, len(tree)
    for step in range(max_tokens):
        best = logits.log_softmax(-1).max(-1)
        for row, token, log_p in zip(going, best.indices.tolist(), best.values.tolist(), strict=True):
            written[row].append((token, log_p))
        going = [row for row in going if not _ended(codec, written[row], ends, labels)]
        if not going or step + 1 == max_tokens:
            break
        ids = torch.tensor([[each[-1][0]] for each in written], device=recognizer.device)
        real = torch.zeros_like(ids, dtype=torch.bool)
        real[going] = True
        path = (base + torch.arange(step, device=ids.device)).expand(len(ids), 1, -1)
        logits = tree.grow(ids, torch.full_like(ids, step), path, real)
    return written


def beam(
    recognizer: Network, prefix: Prefix, labels: int | None = None, *, width: int = 3, max_tokens: int = 64
) -> list[list[Guess]]:
    """The labels of the best sequence that beam search finds, each once, in their order.

    Sequences are compared by their log-probability per token; they end as in `greedy`.

    Args:
        recognizer: what reads.
        prefix: of B images.
        labels: how many labels at most, None for as many as come.
        width: how many sequences are followed.
        max_tokens: of the whole sequence.

    Raises:
        ValueError: naming the setting that is out of range.
    """
    found = beam_ids(recognizer, prefix, labels, width, max_tokens)
    return [_guesses(recognizer, each, labels) for each in found]


@torch.no_grad()
def beam_ids(recognizer: Network, prefix: Prefix, labels: int | None, width: int, max_tokens: int) -> list[Written]:
    """The tokens of the best sequence of `beam` and their log-probabilities."""
    _check(labels, max_tokens)
    width = whole_number("width", width)
    tree, codec, ends = Tree(recognizer, prefix), recognizer.labels, _ends(recognizer)
    count, device = len(prefix.embeds), recognizer.device
    finished: list[list[Written]] = [[] for _ in range(count)]
    # each sequence with the columns of its tokens in the tree
    live: list[list[tuple[Written, list[int]]]] = [[([], [])] for _ in range(count)]
    rows = tree.first.log_softmax(-1)
    for step in range(max_tokens):
        number = 0
        for image, beams in enumerate(live):
            scores = rows[number : number + len(beams)]
            number += len(beams)
            live[image] = _followed(beams, scores, width, codec, ends, labels, finished[image])
            if _decided(finished[image], live[image], width):
                live[image] = []
        if not any(live) or step + 1 == max_tokens:
            break
        wide, base = max(len(beams) for beams in live), len(tree)
        ids = torch.zeros(count, wide, dtype=torch.long)
        real, path = torch.zeros_like(ids, dtype=torch.bool), torch.full((count, wide, step), -1)
        for image, beams in enumerate(live):
            for i, (tokens, columns) in enumerate(beams):
                ids[image, i], real[image, i] = tokens[-1][0], True
                path[image, i] = torch.tensor(columns, dtype=torch.long)
                columns.append(base + i)
        ids, real, path = ids.to(device), real.to(device), path.to(device)
        rows = tree.grow(ids, torch.full_like(ids, step), path, real).log_softmax(-1)
    return [max([*done, *(each for each, _ in beams)], key=_mean) for done, beams in zip(finished, live, strict=True)]


def _followed(
    beams: list[tuple[Written, list[int]]],
    rows: Tensor,
    width: int,
    codec: LabelCodec,
    ends: set[int],
    labels: int | None,
    finished: list[Written],
) -> list[tuple[Written, list[int]]]:
    """The best continuations of one image's sequences; those that have ended go to ``finished``."""
    if not beams:
        return []
    so_far = torch.tensor([math.fsum(p for _, p in tokens) for tokens, _ in beams], device=rows.device)
    top = (rows + so_far[:, None]).flatten().topk(min(2 * width, rows.numel())).indices
    out: list[tuple[Written, list[int]]] = []
    for place, index in enumerate(top.tolist()):
        which, token = divmod(index, rows.shape[1])
        tokens = [*beams[which][0], (token, float(rows[which, token]))]
        if not _ended(codec, tokens, ends, labels):
            out.append((tokens, list(beams[which][1])))
        elif place < width:
            finished.append(tokens)
        if len(out) == width:
            break
    return out


def _decided(finished: list[Written], live: list[tuple[Written, list[int]]], width: int) -> bool:
    """Whether enough sequences have ended that are better than those that go on are so far."""
    if len(finished) < width or not live:
        return not live
    return sorted(map(_mean, finished))[-width] >= max(_mean(tokens) for tokens, _ in live)


def _mean(tokens: Written) -> float:
    return math.fsum(p for _, p in tokens) / len(tokens)


def _check(labels: int | None, max_tokens: int) -> None:
    max_tokens = whole_number("max_tokens", max_tokens)
    if labels is not None:
        labels = whole_number("labels", labels)


def _ends(recognizer: Network) -> set[int]:
    """The tokens that end a text."""
    settings = recognizer.language.generation_config or recognizer.language.config
    told = settings.eos_token_id
    ends = {recognizer.labels.tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])}
    return {int(token) for token in ends if token is not None}


def _ended(codec: LabelCodec, tokens: Written, ends: set[int], labels: int | None) -> bool:
    last = tokens[-1][0]
    if last in ends:
        return True
    if last != codec.sep:
        return False
    said = Counter(label for label, _ in _split(codec, [token for token, _ in tokens], [0.0] * len(tokens), ends))
    return max(said.values(), default=0) >= TIMES or (labels is not None and len(said) >= labels)


def _guesses(recognizer: Network, tokens: Written, labels: int | None) -> list[Guess]:
    ids, log_p = [token for token, _ in tokens], [p for _, p in tokens]
    found: dict[str, float] = {}
    for label, p in _split(recognizer.labels, ids, log_p, _ends(recognizer)):
        found.setdefault(label, math.exp(p))
    return [Guess(label, score) for label, score in found.items()][:labels]


def _split(codec: LabelCodec, ids: Sequence[int], log_p: Sequence[float], ends: set[int]) -> list[tuple[str, float]]:
    """The closed labels of a sequence that are not empty, with the log-probability of their tokens and the close."""
    out, begin = [], 0
    for at, token in enumerate(ids):
        if token == codec.sep or token in ends:
            label = codec.text(ids[begin:at])
            if label:
                out.append((label, math.fsum(log_p[begin : at + 1])))
            begin = at + 1
    return out
