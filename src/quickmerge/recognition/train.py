"""What a recognizer is trained with: the probability of an image's labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from quickmerge.datasets.images import ImageFolder
from quickmerge.datasets.labelled import PixelFormat
from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.models.identity import model_hash
from quickmerge.recognition.labels import Packed
from quickmerge.recognition.language import read
from quickmerge.recognition.model import Recognizer
from quickmerge.recognition.network import Prefix
from quickmerge.training.align import Words, fitted_of, patch_texts, placed_images
from quickmerge.training.config import TrainingConfig
from quickmerge.training.loop import TrainingResult, train
from quickmerge.training.objective import Objective, with_data
from quickmerge.training.packing import packed_mask, packed_positions

if TYPE_CHECKING:
    from quickmerge.datasets.annotated import Annotated

__all__ = [
    "OBJECTIVES",
    "LabelLoss",
    "LabelledScenes",
    "align_words",
    "collate_scenes",
    "feature_bytes",
    "pixel_format",
    "read_features",
    "train_recognizer",
]


OBJECTIVES = ("paper", "reference")


class LabelLoss(Objective):
    """Negative log-likelihood of the labels of a batch of images, in nats per predicted token.

    ``"paper"`` is Eq. 6 of arXiv 2312.02142, ``-sum_k sum_t log p(w_t^k | w_<t^k, X)`` with every label closed by the
    separator. The first tokens of all labels are predicted by the row behind the prompt, the one that one-shot
    sampling reads; every label stands where it stands at inference; no row predicts across labels.

    ``"reference"`` is what the public code trains: labels at the places that they have in the packed sequence, the
    separator's row predicts the next label's first token, the last label has no separator, and with the mask
    ``independent`` its tokens, which no separator opens, see the prefix alone. The loss over BOS and prompt tokens that
    the public code adds is left out: their text is always the same.

    A batch is a mapping with ``pixels (B, 3, H, W)`` or ``features (B, M, D_v)`` (with ``valid (B, M)`` if need be),
    and ``labels``, a list of labels for each image, in the order in which they shall stand.

    Args:
        recognizer: trained in place.
        objective: ``"paper"`` or ``"reference"``.

    Raises:
        ValueError: for another objective, or ``"paper"`` for a recognizer whose labels see one another.
    """

    def __init__(self, recognizer: Recognizer, objective: str = "paper") -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            hint = near_match(str(objective), OBJECTIVES)
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}{hint}")
        if objective == "paper" and not recognizer.config.independent:
            raise ValueError(
                f"objective must be 'reference' for a recognizer with mask={recognizer.config.mask!r}, whose labels "
                "see one another: got 'paper'"
            )
        self.recognizer = recognizer
        self.objective = objective

    def forward(self, batch: Mapping[str, Any], progress: float) -> dict[str, Tensor]:
        """The loss, and the parts of it on first tokens (``first``) and on all others (``rest``)."""
        nats, first, _ = self.nats(batch)
        started = nats[first].mean()
        rest = nats[~first].mean() if bool((~first).any()) else torch.zeros_like(started)
        return {"loss": nats.mean(), "first": started.detach(), "rest": rest.detach()}

    def nats(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """``-log p (T,)`` of every predicted token, whether it begins a label ``(T,)``, and its image ``(T,)``."""
        recognizer = self.recognizer
        packed = recognizer.labels.encode(batch["labels"]).to(recognizer.device)
        prefix = self._prefix(batch)
        if len(prefix.embeds) != len(packed.ids):
            raise QuickmergeError(
                f"labels must be given for each of the {len(prefix.embeds)} images, got {len(packed.ids)}"
            )
        paper = self.objective == "paper"
        if not paper:
            packed = _open_ended(packed)
        embeds = recognizer.language.get_input_embeddings()(packed.ids)
        embeds = torch.cat([prefix.embeds, embeds.to(prefix.embeds.dtype)], 1)
        group = torch.cat([torch.zeros_like(prefix.valid, dtype=torch.long), packed.group], 1)
        valid = torch.cat([prefix.valid, packed.valid], 1)
        image = torch.cat([prefix.image, torch.zeros_like(packed.valid)], 1)
        config = recognizer.config
        see = packed_mask(group, image, valid, independent=config.independent, bidirectional=config.bidirectional)
        if not paper and config.independent:
            see = see & ~_unopened(group, packed)[:, None, None, :]
        position = packed_positions(group if config.independent and paper else torch.zeros_like(group), valid)
        rows, source, target, first, image_of = _plan(prefix, packed, paper=paper)
        log_p = F.log_softmax(read(recognizer.language, embeds, see, position, rows=rows), -1)
        return -log_p[source, target], first, image_of

    def _prefix(self, batch: Mapping[str, Any]) -> Prefix:
        features, valid = batch.get("features"), batch.get("valid")
        if features is None:
            if "pixels" not in batch:
                raise QuickmergeError(f"batch must hold pixels or features, got {', '.join(batch) or 'nothing'}")
            features, valid = self.recognizer.look(batch["pixels"])
        return self.recognizer.prefix(features, valid)


def _plan(prefix: Prefix, packed: Packed, *, paper: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Which rows predict, and what.

    Returns:
        ``rows (B, P + N)`` bool, the R rows whose logits are needed; and for each of the T predicted tokens the number
        of its row among these, the token, whether it begins a label, and its image, ``(T,)`` each.
    """
    length = prefix.valid.shape[1]
    batch, at = packed.valid.nonzero(as_tuple=True)
    first = packed.first[batch, at]
    # the row before, but for first tokens in the paper's objective the last one of the prefix
    before = length + at - 1
    if paper:
        before = torch.where(first, length - 1, before)
    rows = torch.zeros(len(packed.ids), length + packed.ids.shape[1], dtype=torch.bool, device=at.device)
    rows[batch, before] = True
    number = (rows.flatten().long().cumsum(0) - 1).view(rows.shape)
    return rows, number[batch, before], packed.ids[batch, at], first, batch


def _open_ended(packed: Packed) -> Packed:
    """Labels without the separator behind the last one."""
    end = packed.valid.sum(-1, keepdim=True) - 1
    index = torch.arange(packed.ids.shape[1], device=end.device)
    valid = index < end
    return Packed(packed.ids, torch.where(valid, packed.group, 0), valid, packed.first, packed.count)


def _unopened(group: Tensor, packed: Packed) -> Tensor:
    """``(B, P + N)`` bool: the tokens of the last label, which the public code hides from everything."""
    return group == packed.count[:, None]


# A head start for a recogniser: the linear projector that says best, in least squares, what stands on image tokens.
#
# As `quickmerge.training.align` for a projector of one matrix P, which has a closed form: with f_t the features of an
# image token and e_t the embedding of the words in whose box it lies (the mean embedding where there are none),
#
#     P = argmin sum_t w_t |P f_t - e_t|^2 + r |P|^2 = (sum w e f^T) (sum w f f^T + r)^-1.
#
# This is not in the paper (arXiv 2312.02142), which trains long enough without.


EMPTY = 0.1
"""How much a token counts on which nothing stands; there are many."""
RIDGE = 1e-3
"""Relative to the mean square of a feature."""


@torch.no_grad()
def align_words(recognizer: Recognizer, dataset: LabelledScenes, *, pictures: int) -> float:
    """Fit the projector of ``recognizer``, in place, to the words of what stands on each image token.

    Args:
        recognizer: its other weights stay as they are.
        dataset: its images; those with objects are used, evenly taken. Their tokens must be a square grid.
        images: how many of them at most.

    Returns:
        The share of the variance of the words' embeddings that is explained on the last tenth of the images, which
        are not fitted.

    Raises:
        QuickmergeError: if no image has objects, or the tokens are no square grid.
    """
    pictures = whole_number("images", pictures)
    chosen = placed_images(dataset.pictures, pictures)
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


# Training a recogniser on images with labels.


class Scene(Protocol):
    """An image file and the labels of what it shows, such as `quickmerge.datasets.annotated.Annotated`."""

    @property
    def path(self) -> Path: ...

    @property
    def labels(self) -> tuple[str, ...]: ...


class LabelledScenes:
    """Images with labels, as a recogniser is trained on them.

    An item is ``{"pixels": (3, H, W), "labels": [...]}``, or ``{"features": (M, D_v), "labels": [...]}`` once `keep`
    was given the encoder's features. The labels come in a new order each time, drawn from torch's global generator,
    which the training loop seeds for every step.

    Args:
        scenes: files and labels; what has no label is left out, and counted in ``unlabelled``.
        form: what the encoder wants to be shown.

    Raises:
        QuickmergeError: no image has a label, or, when one is asked for, an image can't be read.
    """

    def __init__(self, scenes: Sequence[Scene], form: PixelFormat) -> None:
        used = [scene for scene in scenes if scene.labels]
        if not used:
            raise QuickmergeError(f"at least one image must have labels, got {len(scenes)} images without")
        self.unlabelled = len(scenes) - len(used)
        self.pictures = used
        self.labels = [tuple(scene.labels) for scene in used]
        self.form = form
        self._images = ImageFolder([scene.path for scene in used], (form.height, form.width))
        self._features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: int) -> Tensor:
        """One image, ``(3, H, W)`` float32, standardised."""
        return self.form.standardised(self._images[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One image or its features, with its labels in a random order."""
        labels = self.labels[index]
        item: dict[str, Any] = {"labels": [labels[i] for i in torch.randperm(len(labels)).tolist()]}
        if self._features is None:
            return {**item, "pixels": self.pixels(index)}
        return {**item, "features": self._features[index]}

    def keep(self, features: Tensor) -> None:
        """From now on give out these features ``(n, M, D_v)`` instead of pixels."""
        if features.ndim != 3 or len(features) != len(self):
            raise ValueError(
                f"features must be ({len(self)}, tokens, width) for {len(self)} images, got {tuple(features.shape)}"
            )
        self._features = features

    def describe(self, index: int) -> str:
        """What an image is called."""
        return self._images.describe(index)

    def fingerprint(self) -> str:
        """A sha256 over labels, pixel format and a sample of the images, in hexadecimal."""
        known = f"{self._images.fingerprint()} {self.labels} {self.form}"
        return hashlib.sha256(known.encode()).hexdigest()


def collate_scenes(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items: stacked pixels or features, and a list of labels for each."""
    kind = "features" if "features" in items[0] else "pixels"
    return {kind: torch.stack([item[kind] for item in items]), "labels": [item["labels"] for item in items]}


def feature_bytes(recognizer: Recognizer, scenes: LabelledScenes) -> int:
    """What the features of all images would take in half precision."""
    return 2 * recognizer.features(scenes.pixels(0)[None]).numel() * len(scenes)


def read_features(
    recognizer: Recognizer,
    scenes: LabelledScenes,
    *,
    batch: int = 16,
    half: bool = False,
    shrink: Callable[[Tensor], Tensor] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """The frozen encoder's features of all images, ``(n, M, D_v)`` in bfloat16.

    Args:
        recognizer: whose encoder reads.
        scenes: the images.
        batch: images read at once.
        half: let the encoder compute in bfloat16.
        shrink: makes fewer tokens ``(B, M', D_v)`` of some features ``(B, M, D_v)`` before they are kept.
        advance: called with the number of images read each time.
    """
    kept = []
    for start in range(0, len(scenes), batch):
        rows = range(start, min(start + batch, len(scenes)))
        pixels = torch.stack([scenes.pixels(index) for index in rows])
        with torch.autocast(recognizer.device.type, torch.bfloat16, enabled=half):
            features = recognizer.features(pixels)
        kept.append((features if shrink is None else shrink(features)).to("cpu", torch.bfloat16))
        if advance is not None:
            advance(len(rows))
    return torch.cat(kept)


def pixel_format(recognizer: Recognizer) -> PixelFormat:
    """What a recogniser wants to be shown."""
    config = recognizer.config
    return PixelFormat(config.image_size, config.image_size, config.mean, config.std)


def train_recognizer(
    recognizer: Recognizer,
    dataset: LabelledScenes,
    config: TrainingConfig,
    out: Path | str,
    *,
    objective: str = "paper",
    align: int = 0,
    resume: bool = False,
    fingerprint: dict[str, Any] | None = None,
) -> TrainingResult:
    """Train a recogniser in place; its encoder stays as it is.

    Args:
        recognizer: what is trained, and saved in ``out`` after the last step.
        dataset: items as `LabelledScenes` gives them.
        config: of the training loop.
        out: folder for the result, its checkpoints and metrics.
        objective: ``"paper"`` or ``"reference"``, see `quickmerge.recognition.LabelLoss`.
        align: by how many images with objects the projector is aligned before the first step; see
            `quickmerge.recognition.train`. 0 leaves it as it was drawn.
        resume: go on from the newest checkpoint.
        fingerprint: whatever else must be the same for a resumed run.

    Raises:
        QuickmergeError, ValueError: for anything that does not fit; see `quickmerge.training.train`.
    """
    loss = LabelLoss(recognizer, objective=objective)
    align = whole_number("align", align, 0)
    known = {"model": model_hash(recognizer), "objective": objective, "align": align, **(fingerprint or {})}
    if align and not resume:  # a checkpoint holds what came of it
        align_words(recognizer, dataset, pictures=align)
    return train(
        loss, dataset, config, out, collate=collate_scenes, resume=resume, fingerprint=with_data(known, dataset),
        finish=recognizer.save_pretrained,
    )  # fmt: skip
