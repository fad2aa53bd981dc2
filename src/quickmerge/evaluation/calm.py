"""BrierLM of CALMs and of ordinary language models at the same places of the same texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quickmerge.continuous.brier import GRAMS, BrierScore, brier_gap, brier_score
from quickmerge.continuous.discrete import discrete_terms
from quickmerge.continuous.rollout import calm_terms
from quickmerge.errors import QuickmergeError, whole_number

__all__ = ["BrierText", "brier_text", "compare", "is_calm", "text_terms"]

Row = dict[str, Any]
Advance = Callable[[int], None]

FEW = 10
"""With fewer documents than these, windows are what the interval is over."""


@dataclass(frozen=True)
class BrierText:
    """What BrierLM is measured on.

    Attributes:
        windows: ``(W, L)`` token ids, cut from documents from their start.
        places: ``(P, 2)``: the window and the place in it where an outcome of four tokens begins.
        groups: ``(P,)``: the document of each place, or its window where there are few documents.
        unit: which of the two, ``"documents"`` or ``"windows"``.
        step: all places are multiples of it.
    """

    windows: Tensor
    places: Tensor
    groups: Tensor
    unit: str
    step: int


def brier_text(
    tokenizer: Any,
    texts: Sequence[str],
    patches: Sequence[int] = (4,),
    *,
    length: int = 256,
    context: int = 32,
    limit: int = 2000,
    seed: int = 0,
) -> BrierText:
    """Choose places where a chunk begins for every chunk size, so that models of all of them are asked the same.

    Args:
        tokenizer: of all models.
        texts: documents, which no model was trained on.
        patches: K of every CALM that is measured; leave out ordinary models.
        length: L, tokens of a window.
        context: tokens that stand before a place at least.
        limit: places, drawn from all there are.
        seed: of that draw.

    Raises:
        QuickmergeError: no document is long enough for one place.
        ValueError: a number is out of range.
    """
    length, context, limit = (
        whole_number(name, value) for name, value in (("length", length), ("context", context), ("limit", limit))
    )
    patches = [whole_number("patch", patch) for patch in patches]
    step = math.lcm(GRAMS, *patches)  # outcomes of different places have no token in common
    reach = max([GRAMS, *(-(-GRAMS // patch) * patch for patch in patches)])
    begin = -(-context // step) * step
    offsets = list(range(begin, length - reach + 1, step))
    windows: list[list[int]] = []
    places: list[tuple[int, int]] = []
    documents: list[int] = []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), length):
            part = ids[start : start + length]
            here = [offset for offset in offsets if offset + reach <= len(part)]
            if here:
                places += [(len(windows), offset) for offset in here]
                documents += [number] * len(here)
                # What fills up a short window stands behind every outcome in it, and is read by nobody.
                windows.append(part + part[:1] * (length - len(part)))
    if not places:
        raise QuickmergeError(
            f"texts must hold a document of at least {begin + reach} tokens to be measured, in windows of as many; got "
            f"{len(texts)} documents in windows of {length}"
        )
    chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    found, document = torch.tensor(places)[chosen], torch.tensor(documents)[chosen]
    few = len(set(document.tolist())) < FEW
    return BrierText(
        torch.tensor(windows), found, found[:, 0] if few else document, "windows" if few else "documents", step
    )


def is_calm(model: Any) -> bool:
    """Whether a model draws chunks, instead of giving probabilities of tokens."""
    return bool(getattr(model.config, "model_type", None) == "quickmerge-calm")


def text_terms(
    model: Any,
    text: BrierText,
    *,
    samples: int = 16,
    paths: int = 4,
    seed: int = 0,
    advance: Advance = lambda _: None,
) -> Tensor:
    """Brier-1 to Brier-4 of a model at every place, ``(P, 4)`` float64.

    Args:
        model: a CALM or a causal LM of transformers, in eval mode.
        text: where.
        samples: draws of a CALM at each place and chunk.
        paths: of colliding chunks or tokens at each place.
        seed: of all that is random; each window has its own stream, so that the others do not matter.
        advance: called with the places done, window by window.

    Raises:
        QuickmergeError: a place does not fit the model.
    """
    if model.training:
        raise QuickmergeError("model must be in eval mode to be measured: call model.eval()")
    parts = []
    for window in sorted(set(text.places[:, 0].tolist())):
        here = text.places[text.places[:, 0] == window, 1]
        # torch's generator on a CPU reads 32 bits of its seed
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, window]).generate_state(1)[0]))
        if is_calm(model):
            found = calm_terms(model, text.windows[window], here, samples=samples, paths=paths, generator=generator)
        else:
            found = discrete_terms(model, text.windows[window], here, paths=paths, generator=generator)
        parts.append(found)
        advance(len(here))
    return torch.cat(parts)


def compare(
    terms: dict[str, Tensor], text: BrierText, *, against: str | None = None, resamples: int = 2000, seed: int = 0
) -> list[Row]:
    """A row for each model: BrierLM and its interval, and the paired difference from one of the models.

    Args:
        terms: of every model, by its name, at all places of the text.
        text: where they were measured.
        against: the model that the others are set beside; None for the first.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    other = against if against is not None else next(iter(terms))
    rows = []
    for name, mine in terms.items():
        score: BrierScore = brier_score(mine, text.groups, resamples=resamples, seed=seed)
        row: Row = {"method": name, "brier_lm": score.value, "brier_lm_low": score.low, "brier_lm_high": score.high}
        row |= {key: value for key, value in score.as_dict().items() if key not in ("value", "low", "high")}
        if name != other:
            gap = brier_gap(mine, terms[other], text.groups, resamples=resamples, seed=seed)
            row |= {"against": other, "gap": gap.value, "gap_low": gap.low, "gap_high": gap.high}
        rows.append({**row, "unit": text.unit})
    return rows
