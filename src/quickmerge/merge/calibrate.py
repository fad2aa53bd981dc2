"""An entropy budget whose mean share is known: its scale, measured for a model, a method and a length of prompts.

`Entropy` keeps ``scale * exp H`` tokens of a prompt, and what ``exp H`` is depends on the model, on the saliency and on
how long a prompt is. So one asks for a mean share, and the scale that gives it is measured on a text that ships with
the library. It is a plain number of the budget: whoever saves a recipe saves it, and it gives the same tokens again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quickmerge.data import demo_document
from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.merge.attach import reduce
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.text.blocks import schedule_of
from quickmerge.merge.text.modes import Prefix
from quickmerge.merge.tokens.budget import Entropy, as_budget, effective_tokens
from quickmerge.merge.tokens.view import TokenView
from quickmerge.models.decoder import find_decoder
from quickmerge.models.spans import check_tokenizer

__all__ = ["WINDOWS", "calibrated", "length_class", "spread_of"]

WINDOWS = 6
"""Windows of the shipped text that are read."""

SHORTEST = 64
"""A window has this many tokens at least: in fewer the protected ones decide."""


@dataclass(frozen=True)
class _Noting:
    """A budget that keeps every token and notes ``exp H / N`` of each row."""

    found: list[float] = field(default_factory=list)

    def count(self, view: TokenView, saliency: Tensor | None) -> Tensor:
        """All of them."""
        self.found.extend((effective_tokens(view, saliency) / view.counted_length).tolist())
        return view.valid.sum(-1)


def length_class(tokens: int) -> int:
    """The power of two that a prompt of ``tokens`` tokens is calibrated at, the next one from 64 on."""
    return max(SHORTEST, 1 << (whole_number("tokens", tokens) - 1).bit_length())


def spread_of(
    model: PreTrainedModel, tokenizer: Any, reducer: Reducer, layer: Any = None, *, tokens: int = 1024
) -> list[float]:
    """``exp H / N`` of the saliency at the first merge, of windows of ``tokens`` tokens of the shipped document.

    Args:
        model: a supported causal language model.
        tokenizer: that of the model.
        reducer: a method with a saliency; its ``keep`` plays no part.
        layer: where it merges, as in `quickmerge.reduce`.
        tokens: how long a window is; the whole document where that is shorter.

    Returns:
        One number in (0, 1] for each of `WINDOWS` windows, evenly spaced over the document.

    Raises:
        QuickmergeError, ValueError: for what `quickmerge.reduce` refuses, or a method without a saliency.
    """
    ids = check_tokenizer(tokenizer).encode(demo_document(), add_special_tokens=False)
    tokens = min(max(SHORTEST, whole_number("tokens", tokens)), len(ids))
    starts = sorted({(len(ids) - tokens) * i // max(1, WINDOWS - 1) for i in range(WINDOWS)})
    first = schedule_of(find_decoder(model, shared=True), layer).layers[0]
    noting = _Noting()
    mode = Prefix(min_tokens=0, tokenizer=tokenizer)
    with torch.inference_mode(), reduce(model, replace(reducer, keep=noting), first, mode=mode):
        for start in starts:
            window = torch.tensor([ids[start : start + tokens]], device=model.device)
            model(window, use_cache=False, logits_to_keep=1)
    if len(noting.found) != len(starts):
        raise QuickmergeError(f"reducer must ask its budget by a saliency, got {reducer.name}")
    return noting.found


def calibrated(
    model: PreTrainedModel, tokenizer: Any, reducer: Reducer, share: float, layer: Any = None, *, tokens: int = 1024
) -> Reducer:
    """The method with an `Entropy` budget that keeps the mean share ``share``, as a plain share ``keep`` does.

    So it costs on average what ``keep=share`` costs, and a prompt whose saliency is spread wide more than another.
    Where there are several merges the first leaves more than the share, see `Schedule`.

    Args:
        model: a supported causal language model.
        tokenizer: that of the model.
        reducer: a method with a saliency; its ``keep`` is replaced.
        share: the mean share of the tokens that the blocks from the first merge on read, in (0, 1].
        layer: where it merges, as in `quickmerge.reduce`.
        tokens: how long the prompts are; measured at `length_class` of it.

    Raises:
        QuickmergeError, ValueError: as `spread_of`.
    """
    as_budget(float(share))
    decoder = find_decoder(model, shared=True)
    schedule, depth = schedule_of(decoder, layer), len(decoder)
    blocks = [b - a for a, b in pairwise((*schedule.layers, depth))]
    # Behind an entropy budget each later merge leaves the same share of what is there, whatever that is.
    first = min(1.0, share * sum(blocks) / sum(d * schedule.decay**s for s, d in enumerate(blocks)))
    spread = spread_of(model, tokenizer, reducer, layer, tokens=length_class(tokens))
    return replace(reducer, keep=Entropy.calibrated(max(first, 0.05), spread))
