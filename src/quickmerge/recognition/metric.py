"""How good recognised labels are: by meaning (arXiv 2312.02142, section 4.1) and by the letter.

For an image with reference labels r_1..r_M and predictions g_1..g_N, and S_ij the cosine of their sentence embeddings,

    R = mean_i max_j S_ij      P = mean_j max_i S_ij      F1 = 2 P R / (P + R),

each averaged over images. Labels of unrelated things are about a third alike by this measure, so a number means little
without its floor: what the same predictions score against references of other images. The exact recall beside it asks
for the very label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError

__all__ = [
    "Encode",
    "Exact",
    "Meaning",
    "exact",
    "exact_curve",
    "meaning",
    "meaning_floor",
    "scores",
    "threshold_curve",
]

Encode = Callable[[Sequence[str]], Tensor]
"""Texts to unit vectors ``(n, D)``, such as a `quickmerge.recognition.sentence.SentenceEncoder`."""

Labels = Sequence[Sequence[str]]
"""The labels of each image; predictions best first."""

THRESHOLDS = (0.0, 0.3, 0.5, 1.0)
ROUNDING = 1e-5
"""A cosine of a label with itself may fall so far short of 1 in float32."""


@dataclass(frozen=True)
class Meaning:
    """Means over images of the recall, the precision and their harmonic mean, by cosine of sentence embeddings."""

    recall: float
    precision: float
    f1: float

    def as_dict(self) -> dict[str, float]:
        """By name, as JSON holds them."""
        return asdict(self)


@dataclass(frozen=True)
class Exact:
    """Means over images of what is found by exact match.

    Args:
        recall: share of the references among the predictions.
        precision: share of the predictions that are references; 0 for an image without predictions.
        predictions: how many there were to an image.
    """

    recall: float
    precision: float
    predictions: float

    def as_dict(self) -> dict[str, float]:
        """By name, as JSON holds them."""
        return asdict(self)


def meaning(
    references: Labels, predictions: Labels, encode: Encode, *, at: int | None = None, threshold: float | None = None
) -> Meaning:
    """R, P and F1 of predictions against references, image by image.

    An image without predictions scores 0 in all three.

    Args:
        references: of each image, at least one.
        predictions: of each image, best first.
        encode: embeds labels.
        at: only the first so many predictions of an image count; None: all.
        threshold: a pair whose cosine is below counts as 0; None: every pair counts.

    Raises:
        QuickmergeError: there is no image, an image has no reference, or the two differ in length.
        ValueError: ``at`` is below 1.
    """
    predictions = _checked(references, predictions, at)
    rows, vectors = _embedded([*references, *predictions], encode)
    scores = []
    for wanted, given in zip(rows[: len(references)], rows[len(references) :], strict=True):
        if not given:
            scores.append((0.0, 0.0, 0.0))
            continue
        cosine = vectors[wanted] @ vectors[given].T  # (M, N)
        if threshold is not None:
            cosine = torch.where(cosine >= threshold - ROUNDING, cosine, 0.0)
        recall, precision = float(cosine.amax(1).mean()), float(cosine.amax(0).mean())
        both = recall + precision
        scores.append((recall, precision, 2 * precision * recall / both if both > 0 else 0.0))
    recall, precision, f1 = torch.tensor(scores, dtype=torch.float64).mean(0).tolist()
    return Meaning(recall, precision, f1)


def meaning_floor(
    references: Labels, predictions: Labels, encode: Encode, *, at: int | None = None, seed: int = 0
) -> Meaning:
    """What the same predictions score against the references of other images: no image keeps its own.

    Raises:
        QuickmergeError: as `meaning`, or there is only one image.
    """
    if len(references) < 2:
        raise QuickmergeError(f"the floor needs the references of at least 2 images, got {len(references)}")
    order = torch.randperm(len(references), generator=torch.Generator().manual_seed(seed)).tolist()
    # In a random circle everyone gets the next one's, so nobody gets his own.
    swapped = dict(zip(order, [*order[1:], order[0]], strict=True))
    return meaning([references[swapped[i]] for i in range(len(references))], predictions, encode, at=at)


def threshold_curve(
    references: Labels, predictions: Labels, encode: Encode, thresholds: Sequence[float] = THRESHOLDS
) -> dict[float, Meaning]:
    """`meaning` at rising thresholds; at 1 only labels that embed alike count."""
    return {value: meaning(references, predictions, encode, threshold=value) for value in thresholds}


def exact(references: Labels, predictions: Labels, *, at: int | None = None) -> Exact:
    """Recall and precision by the letter; case and white space do not count.

    Args:
        references: of each image, at least one.
        predictions: of each image, best first.
        at: only the first so many predictions of an image count; 0: as many as the image has references; None: all.

    Raises:
        QuickmergeError: there is no image, an image has no reference, or the two differ in length.
        ValueError: ``at`` is below 0.
    """
    own = [list(given)[: len(set(_plain(wanted)))] for wanted, given in zip(references, predictions, strict=False)]
    predictions = _checked(references, own if at == 0 and len(predictions) == len(references) else predictions,
                           at or None)  # fmt: skip
    found = []
    for wanted, given in zip(references, predictions, strict=True):
        right, said = set(_plain(wanted)), set(_plain(given))
        hits = len(right & said)
        found.append((hits / len(right), hits / len(said) if said else 0.0, float(len(said))))
    return Exact(*torch.tensor(found, dtype=torch.float64).mean(0).tolist())


def exact_curve(references: Labels, predictions: Labels, ks: Sequence[int] = (1, 3, 5, 10)) -> dict[int, Exact]:
    """`exact` of the first k predictions, for several k."""
    return {k: exact(references, predictions, at=k) for k in ks}


def scores(references: Labels, predictions: Labels, encode: Encode | None = None) -> dict[str, Any]:
    """Everything there is to say of some predictions, as JSON holds it.

    Args:
        references: of each image, at least one.
        predictions: of each image, best first.
        encode: embeds labels; None leaves out what needs it.
    """
    found: dict[str, Any] = {
        "images": len(references),
        "exact": exact(references, predictions).as_dict(),
        "exact_at": {str(k): value.as_dict() for k, value in exact_curve(references, predictions).items()},
        "exact_at_own": exact(references, predictions, at=0).as_dict(),
    }
    if encode is not None:
        found["meaning"] = meaning(references, predictions, encode).as_dict()
        found["floor"] = meaning_floor(references, predictions, encode).as_dict() if len(references) > 1 else None
        curve = threshold_curve(references, predictions, encode)
        found["thresholds"] = {f"{value:g}": scored.as_dict() for value, scored in curve.items()}
    return found


def _plain(labels: Sequence[str]) -> list[str]:
    return [" ".join(label.casefold().split()) for label in labels]


def _checked(references: Labels, predictions: Labels, at: int | None) -> list[Sequence[str]]:
    """The predictions that count; raises as the callers say."""
    if at is not None and (isinstance(at, bool) or not isinstance(at, int) or at < 1):
        raise ValueError(f"at must be a whole number of at least 1, or None for all predictions, got {at!r}")
    if not references or len(references) != len(predictions):
        raise QuickmergeError(
            f"references and predictions must be given for the same images, at least one, "
            f"got {len(references)} and {len(predictions)}"
        )
    for number, wanted in enumerate(references):
        if not wanted:
            raise QuickmergeError(f"references must hold a label for each image, image {number + 1} has none")
    return [list(given)[:at] for given in predictions]


def _embedded(labels: Labels, encode: Encode) -> tuple[list[list[int]], Tensor]:
    """Each list's labels as rows of one matrix of different labels ``(n, D)``, in float64."""
    number: dict[str, int] = {}
    rows = [[number.setdefault(label, len(number)) for label in one] for one in labels]
    return rows, encode(list(number)).double()
