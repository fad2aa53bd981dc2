"""A head start for a projector: what stands on a patch, in the language model's own words.

A language model that is shown patches learns for long what they mean before it learns to answer. Where images come
with boxes, the projector can be told directly: a patch inside the box of ``red circle`` becomes the sum of the model's
embeddings of these words. That is a regression, fitted without the language model, in minutes; then the model reads
patches as it reads words. Boxes are used for nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from quickmerge.datasets.images import upright_size
from quickmerge.datasets.questions import AskedImages
from quickmerge.errors import QuickmergeError
from quickmerge.sampling import evenly

if TYPE_CHECKING:
    from quickmerge.datasets.annotated import Annotated

__all__ = [
    "Words",
    "align_projector",
    "fitted_of",
    "patch_texts",
    "placed_images",
    "projector_input",
    "word_embedding",
]

BATCH, RATE = 1024, 1e-3
EMPTY = 24
"""Patches of each image that nothing stands on; there are many, and they are all alike."""


def align_projector(
    model: LlavaForConditionalGeneration,
    dataset: AskedImages,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pictures: int,
    epochs: int = 12,
    seed: int = 0,
    progress: Any = None,
) -> float:
    """Fit the projector of ``model``, in place, to the words of what stands on each patch.

    Args:
        model: a LLaVA.
        dataset: its images; those with `objects` are used, evenly taken.
        tokenizer: of the model.
        images: how many of them at most.
        epochs: passes over their patches.
        seed: of the order.
        progress: called with the share that is done.

    Returns:
        The share of the variance of the words' embeddings that is explained on the last tenth of the images, which
        are not fitted; 0 is no better than a constant.

    Raises:
        QuickmergeError: if no image has objects.
    """
    chosen = placed_images(dataset.pictures, pictures)
    tell = progress or (lambda share: None)
    features, targets, held = _gather(model, dataset, tokenizer, chosen, lambda share: tell(0.6 * share))
    projector = model.model.multi_modal_projector
    weights = [p for p in projector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.01)
    steps, generator = epochs * -(-held // BATCH), torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    scale = targets.var()
    with torch.enable_grad():
        for epoch in range(epochs):
            for part in torch.split(torch.randperm(held, generator=generator), BATCH):
                loss = F.mse_loss(projector(features[part].float()), targets[part].float()) / scale
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
            tell(0.6 + 0.4 * (epoch + 1) / epochs)
    optimizer.zero_grad()
    with torch.no_grad():
        wanted = targets[held:].float()
        if not len(wanted):
            return float("nan")
        wrong = (projector(features[held:].float()) - wanted).square().mean()
        return 1 - float(wrong / (wanted - wanted.mean(0)).square().mean())


@torch.no_grad()
def _gather(
    model: LlavaForConditionalGeneration,
    dataset: AskedImages,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Sequence[int],
    tell: Any,
) -> tuple[Tensor, Tensor, int]:
    """What the projector reads ``(P, F)`` and should write ``(P, D)``, and how many of them are fitted."""
    words = Words(tokenizer, model.get_input_embeddings().weight)
    patch = int(model.config.vision_config.patch_size)
    features: list[Tensor] = []
    targets: list[Tensor] = []
    held = 0
    draw = torch.Generator().manual_seed(0)
    for number, index in enumerate(chosen):
        if number == fitted_of(chosen):
            held = sum(map(len, features))
        pixels = dataset.pixels(index)
        texts = patch_texts(dataset.pictures[index], (pixels.shape[-2] // patch, pixels.shape[-1] // patch))
        empty = [at for at, text in enumerate(texts) if text is None]
        some = torch.randperm(len(empty), generator=draw)[:EMPTY].tolist()
        taken = [at for at, text in enumerate(texts) if text is not None] + [empty[each] for each in some]
        features.append(projector_input(model, pixels)[taken].bfloat16())
        targets.append(words.of([texts[at] for at in taken]).bfloat16())
        tell((number + 1) / len(chosen))
    return torch.cat(features), torch.cat(targets), held or sum(map(len, features))


def placed_images(pictures: Sequence[Any], most: int) -> list[int]:
    """The numbers of at most ``most`` images with objects, evenly taken.

    Raises:
        QuickmergeError: if there are none.
    """
    placed = [index for index, picture in enumerate(pictures) if getattr(picture, "objects", ())]
    if not placed:
        raise QuickmergeError("images must have objects (texts with boxes) to align the projector by, got none")
    return evenly(placed, most)


def fitted_of(chosen: Sequence[int]) -> int:
    """How many of the chosen images are fitted: all but the last tenth, and one at least."""
    return max(1, len(chosen) * 9 // 10)


def projector_input(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the projector of a LLaVA reads of an image ``(3, H, W)``: ``(N, F)``."""
    seen: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    try:
        model.get_image_features(pixel_values=pixels[None].to(model.device))
    finally:
        hook.remove()
    return seen[0]


class Words:
    """What texts are worth as embeddings, each looked up once; no text is the mean of all embeddings.

    Args:
        tokenizer: of the language model.
        table: its input embeddings ``(V, D)``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, table: Tensor) -> None:
        self._tokenizer, self._table = tokenizer, table
        self._known: dict[str | None, Tensor] = {None: table.mean(0)}

    def of(self, texts: Sequence[str | None]) -> Tensor:
        """``(len(texts), D)``."""
        for text in set(texts) - set(self._known):
            assert text is not None
            self._known[text] = word_embedding(self._tokenizer, self._table, text)
        return torch.stack([self._known[text] for text in texts])


def word_embedding(tokenizer: PreTrainedTokenizerBase, table: Tensor, text: str) -> Tensor:
    """The sum of a text's token embeddings over the root of their number, so that it is as long as one: ``(D,)``."""
    ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
    embedding: Tensor = table[ids].sum(0) / len(ids) ** 0.5
    return embedding


def patch_texts(picture: Annotated, grid: tuple[int, int]) -> list[str | None]:
    """What stands on each patch of an image that was scaled to cover a grid and cut around its centre.

    A patch belongs to the smallest box that its centre is in.

    Args:
        image: with objects.
        grid: patches down and across.
    """
    width, height = upright_size(picture.path)
    rows, columns = grid
    scale = max(columns / width, rows / height)  # patches a pixel
    left, top = (width * scale - columns) / 2, (height * scale - rows) / 2
    texts: list[str | None] = [None] * (rows * columns)
    by_size = sorted(picture.objects, key=lambda one: -(one.box[2] - one.box[0]) * (one.box[3] - one.box[1]))
    for one in by_size:
        x0, y0, x1, y1 = (edge * scale for edge in one.box)
        for row in range(rows):
            for column in range(columns):
                if x0 <= column + 0.5 + left < x1 and y0 <= row + 0.5 + top < y1:
                    texts[row * columns + column] = one.text
    return texts
