"""One-shot sampling: every label's first token from one distribution, then all labels completed side by side."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from quickmerge.errors import near_match, whole_number
from quickmerge.recognition.guess import Guess, check_share, ranked
from quickmerge.recognition.language import read
from quickmerge.recognition.model import Prefix, Recognizer
from quickmerge.recognition.tree import Tree
from quickmerge.tokens.packing import packed_mask, packed_positions

__all__ = ["LAYOUTS", "Branches", "branches", "one_shot"]


@dataclass(frozen=True)
class Branches:
    """What one-shot sampling has completed.

    Args:
        ids: ``(B, k, T)`` tokens, the separator from a branch's end on.
        log_p: ``(B, k)`` log-probability of all its tokens, with the separator where it is finished.
        finished: ``(B, k)`` bool: closed by the separator. The others ran into the limit, fell below the minimum, or
            had no token to begin with (log-probability -inf); they are no labels.
    """

    ids: Tensor
    log_p: Tensor
    finished: Tensor


def one_shot(
    recognizer: Recognizer,
    prefix: Prefix,
    k: int,
    *,
    layout: str = "tree",
    max_tokens: int = 20,
    minimum: float = 0.0,
) -> list[list[Guess]]:
    """The k most probable first tokens, each completed greedily to a label (arXiv 2312.02142, section 3.4).

    A label's score is its probability with the closing separator. The same text from different tokens counts once,
    with the sum. Branches that are not closed within the limit are left out; `branches` shows them.

    Args:
        recognizer: what reads.
        prefix: of B images.
        k: how many branches, and at most how many labels.
        layout: ``"tree"`` feeds all branches as one sequence, ``"batch"`` as rows of a batch with copies of the cache,
            ``"uncached"`` reads everything anew in every step, as the public code does. The results are the same.
        max_tokens: of a label, without the separator.
        minimum: the least probability; branches that fall below it end at once.

    Raises:
        ValueError: naming the setting that is out of range.
    """
    found = branches(recognizer, prefix, k, layout=layout, max_tokens=max_tokens, minimum=minimum)
    out = []
    for ids, log_p, finished in zip(found.ids.tolist(), found.log_p.tolist(), found.finished.tolist(), strict=True):
        named = [(recognizer.labels.text(i), p) for i, p, f in zip(ids, log_p, finished, strict=True) if f]
        out.append(ranked(named, k, minimum))
    return out


@torch.no_grad()
def branches(
    recognizer: Recognizer,
    prefix: Prefix,
    k: int,
    *,
    layout: str = "tree",
    max_tokens: int = 20,
    minimum: float = 0.0,
) -> Branches:
    """One-shot sampling before labels are made of its tokens; arguments as for `one_shot`."""
    k = whole_number("k", k)
    max_tokens = whole_number("max_tokens", max_tokens)
    check_share("minimum", minimum)
    if layout not in LAYOUTS:
        raise ValueError(
            f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}{near_match(str(layout), LAYOUTS)}"
        )
    steps = LAYOUTS[layout](recognizer, prefix)
    sep, floor = recognizer.labels.sep, math.log(minimum) if minimum else -math.inf
    start = steps.first.log_softmax(-1).masked_fill(~recognizer.starts, -torch.inf)
    log_p, token = start.topk(min(k, start.shape[1]))
    alive = log_p.isfinite() & (log_p >= floor)
    finished = torch.zeros_like(alive)
    ids = token[..., None]
    for _ in range(max_tokens):
        if not bool(alive.any()):
            break
        step_log_p, step_token = _best(steps.follow(ids, alive), recognizer.labels.special)
        log_p = log_p.masked_scatter(alive, log_p[alive] + step_log_p)
        token = torch.full_like(token, sep).masked_scatter(alive, step_token)
        ids = torch.cat([ids, token[..., None]], -1)
        finished = finished | (alive & (token == sep))
        alive = alive & (token != sep) & (log_p >= floor)
    return Branches(ids, log_p, finished)


def _best(logits: Tensor, special: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable token that can stand in a label, of ``(R, V)``, and its log-probability among all tokens."""
    total = logits.logsumexp(-1)
    best = logits.index_fill(-1, special.to(logits.device), -torch.inf).max(-1)
    return best.values - total, best.indices


class _Steps(ABC):
    """Reads a prefix, and then again and again the newest token of every branch that goes on."""

    first: Tensor
    """``(B, V)`` logits behind the prefix."""

    def __init__(self, recognizer: Recognizer, prefix: Prefix) -> None:
        self.recognizer = recognizer
        self.prefix = prefix

    @abstractmethod
    def follow(self, ids: Tensor, alive: Tensor) -> Tensor:
        """Logits ``(R, V)`` of what follows the branches of ``ids (B, k, T)`` that are alive, in reading order."""


class _InTree(_Steps):
    """All branches in one row."""

    def __init__(self, recognizer: Recognizer, prefix: Prefix) -> None:
        super().__init__(recognizer, prefix)
        self.tree = Tree(recognizer, prefix)
        self.first = self.tree.first
        self.columns: Tensor | None = None

    def follow(self, ids: Tensor, alive: Tensor) -> Tensor:
        columns = ids[..., :0] if self.columns is None else self.columns
        wide = int(alive.sum(-1).max())
        # living branches first, in their order
        order = alive.long().argsort(dim=-1, descending=True, stable=True)[:, :wide]
        real = alive.gather(1, order)
        path = columns.gather(1, order[..., None].expand(-1, -1, columns.shape[-1]))
        new = len(self.tree) + torch.arange(wide, device=ids.device).expand_as(order)
        own = torch.full_like(alive, -1, dtype=torch.long).scatter(1, order, torch.where(real, new, -1))
        self.columns = torch.cat([columns, own[..., None]], -1)
        depth = torch.full_like(order, ids.shape[-1] - 1)
        return self.tree.grow(ids[..., -1].gather(1, order), depth, path, real)


class _InBatch(_Steps):
    """Every living branch in a row of its own, with its own copy of the prefix's cache."""

    def __init__(self, recognizer: Recognizer, prefix: Prefix) -> None:
        super().__init__(recognizer, prefix)
        self.tree = Tree(recognizer, prefix)
        self.first = self.tree.first
        self.cache = self.tree.cache
        self.rows: Tensor | None = None  # the branch that each row of the cache belongs to

    def follow(self, ids: Tensor, alive: Tensor) -> Tensor:
        flat = alive.flatten().nonzero()[:, 0]
        image = flat // alive.shape[1]
        keep = image if self.rows is None else (self.rows[:, None] == flat).long().argmax(0)
        self.cache.batch_select_indices(keep)
        self.rows = flat
        valid, length, depth = self.prefix.valid[image], self.prefix.length[image], ids.shape[-1]
        see = torch.cat([valid, valid.new_ones(len(flat), depth)], 1)[:, None, None]
        behind = length[:, None] + torch.arange(depth, device=ids.device)
        language = self.recognizer.language
        embeds = language.get_input_embeddings()(ids.flatten(0, 1)[flat, -1:]).to(self.prefix.embeds.dtype)
        position = torch.cat([self.tree.position[image], behind], 1)
        logits = read(language, embeds, see, position[:, -1:], cache=self.cache, key_position=position)
        return logits[:, 0]


class _Uncached(_Steps):
    """Prefix and branches read anew in every step, finished ones too."""

    def __init__(self, recognizer: Recognizer, prefix: Prefix) -> None:
        super().__init__(recognizer, prefix)
        self.first = self._read(torch.zeros(len(prefix.embeds), 1, 0, dtype=torch.long, device=prefix.embeds.device))

    def follow(self, ids: Tensor, alive: Tensor) -> Tensor:
        return self._read(ids)[alive.flatten()]

    def _read(self, ids: Tensor) -> Tensor:
        prefix, k = self.prefix, ids.shape[1]
        behind = self.recognizer.language.get_input_embeddings()(ids.flatten(0, 1)).to(prefix.embeds.dtype)
        embeds, valid, image = (x.repeat_interleave(k, 0) for x in (prefix.embeds, prefix.valid, prefix.image))
        more = valid.new_ones(behind.shape[:2])
        valid, image = torch.cat([valid, more], 1), torch.cat([image, ~more], 1)
        group = torch.zeros_like(valid, dtype=torch.long)
        see = packed_mask(group, image, valid, bidirectional=self.recognizer.config.bidirectional)
        last = torch.zeros_like(valid)
        last[:, -1] = True
        whole = torch.cat([embeds, behind], 1)
        return read(self.recognizer.language, whole, see, packed_positions(group, valid), rows=last)


LAYOUTS: dict[str, type[_Steps]] = {"tree": _InTree, "batch": _InBatch, "uncached": _Uncached}
