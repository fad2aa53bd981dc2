"""A head start for a recogniser: the linear projector that says best, in least squares, what stands on image tokens.

As `quickmerge.training.align` for a projector of one matrix P, which has a closed form: with f_t the features of an
image token and e_t the embedding of the words in whose box it lies (the mean embedding where there are none),

    P = argmin sum_t w_t |P f_t - e_t|^2 + r |P|^2 = (sum w e f^T) (sum w f f^T + r)^-1.

This is not in the paper (arXiv 2312.02142), which trains long enough without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.recognition import Recognizer
from quickmerge.training.align import Words, fitted_of, patch_texts, placed_pictures

if TYPE_CHECKING:
    from quickmerge.training.data.annotated import Annotated
    from quickmerge.training.recognizer import LabelledScenes

__all__ = ["align_words"]

EMPTY = 0.1
"""How much a token counts on which nothing stands; there are many."""
RIDGE = 1e-3
"""Relative to the mean square of a feature."""


@torch.no_grad()
def align_words(recognizer: Recognizer, dataset: LabelledScenes, *, pictures: int) -> float:
    """Fit the projector of ``recognizer``, in place, to the words of what stands on each image token.

    Args:
        recognizer: its other weights stay as they are.
        dataset: its pictures; those with objects are used, evenly taken. Their tokens must be a square grid.
        pictures: how many of them at most.

    Returns:
        The share of the variance of the words' embeddings that is explained on the last tenth of the pictures, which
        are not fitted.

    Raises:
        QuickmergeError: if no picture has objects, or the tokens are no square grid.
    """
    pictures = whole_number("pictures", pictures)
    chosen = placed_pictures(dataset.pictures, pictures)
    fitted = fitted_of(chosen)
    words = Words(recognizer.labels.tokenizer, recognizer.language.get_input_embeddings().weight.float())
    mean = words.of([None]).double().cpu()
    weight = recognizer.projector.weight
    square = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    product = torch.zeros(weight.shape[1], weight.shape[0], dtype=torch.float64)
    wrong = spread = 0.0
    solution = torch.zeros_like(product)
    for number, index in enumerate(chosen):
        item = dataset[index]
        seen = item["features"] if "features" in item else recognizer.features(item["pixels"][None])[0]
        side = round(len(seen) ** 0.5)
        if side * side != len(seen):
            raise QuickmergeError(f"image tokens must be a square grid to be aligned, got {len(seen)} of them")
        texts = patch_texts(cast("Annotated", dataset.pictures[index]), (side, side))
        wanted = words.of(texts).double().cpu()
        counts = torch.tensor([EMPTY if text is None else 1.0 for text in texts], dtype=torch.float64)
        seen = seen.to("cpu", torch.float64)
        if number < fitted:
            square += (seen * counts[:, None]).T @ seen
            product += (seen * counts[:, None]).T @ wanted
        if number == fitted - 1:
            ridge = RIDGE * float(square.diagonal().mean()) * torch.eye(len(square), dtype=torch.float64)
            solution = torch.linalg.solve(square + ridge, product)
            weight.copy_(solution.T.to(weight))
        elif number >= fitted:
            wrong += float(((seen @ solution - wanted).square().sum(-1) * counts).sum())
            spread += float(((wanted - mean).square().sum(-1) * counts).sum())
    return 1 - wrong / spread if spread else float("nan")
