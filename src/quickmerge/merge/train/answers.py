"""Training a vision-language model to answer questions about images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlavaForConditionalGeneration

from quickmerge.datasets.questions import AskedImages, Packed, pack
from quickmerge.errors import UnsupportedModelError, whole_number
from quickmerge.locks import sole_writer
from quickmerge.merge.train.classify import check_share
from quickmerge.models.chat import answer_ids, prompt_ids
from quickmerge.models.compat import attention_implementation
from quickmerge.models.identity import model_hash
from quickmerge.models.part import save_model
from quickmerge.sampling import evenly
from quickmerge.training.align import align_projector, projector_input
from quickmerge.training.config import TrainingConfig
from quickmerge.training.loop import TrainingResult, train
from quickmerge.training.metrics import share_shown
from quickmerge.training.objective import Objective, with_data
from quickmerge.training.packing import additive, packed_mask, packed_positions

__all__ = ["Answer", "answer_ids", "evaluate_answers", "prompt_ids", "scaled_inputs", "train_vlm"]

PROJECTOR, LANGUAGE = "projector", "language"
SAMPLES = 64
"""Images that the spread of the tower's features is measured on."""


def answer_logits(model: LlavaForConditionalGeneration, batch: Packed) -> Tensor:
    """The logits ``(A, vocabulary)`` of the tokens that answer, each question seen as if it were alone.

    The output matrix is applied at these rows only.
    """
    image = batch.ids == model.config.image_token_id
    # LLaVA reads an image causally, as any text
    mask = packed_mask(batch.group, image, batch.valid, bidirectional=False)
    if attention_implementation(model.config.text_config) == "eager":
        mask = additive(mask, model.dtype)
    hidden = model.model(
        input_ids=batch.ids,
        pixel_values=batch.pixels,
        attention_mask=mask,
        position_ids=packed_positions(batch.group, batch.valid),
        use_cache=False,
    ).last_hidden_state
    logits: Tensor = model.lm_head(hidden.flatten(0, 1)[batch.at])
    return logits


class Answer(Objective):
    """Cross-entropy of the answers' tokens, of questions about images as `pack` puts them together.

    The projector is trained from the first step on, the language model later and at a lower rate, and the vision
    tower not at all.

    Args:
        model: a LLaVA, trained in place.
        warmup_language: share of the training in which the language model stays as it is.
        language_rate: its learning rate as a share of that of the projector; 0 leaves it as it is.

    Raises:
        ValueError: for a share out of range, or a model that is no LLaVA.
    """

    uses_every_parameter = False

    def __init__(
        self, model: LlavaForConditionalGeneration, *, warmup_language: float = 0.1, language_rate: float = 0.3
    ) -> None:
        super().__init__()
        check_vlm(model)
        check_share("warmup_language", warmup_language, 0.0)
        check_share("language_rate", language_rate, 0.0)
        self.projector = model.model.multi_modal_projector
        self.language = model.model.language_model
        self.head = model.lm_head
        self._whole = [model]  # a list, so that the tower stays out of the module tree
        self.warmup_language, self.language_rate = warmup_language, language_rate
        model.model.vision_tower.requires_grad_(False)
        if language_rate == 0:
            self.language.requires_grad_(False)
            self.head.requires_grad_(False)

    def group_of(self, name: str) -> str:  # noqa: D102
        return PROJECTOR if name.startswith("projector.") else LANGUAGE

    def rate_of(self, group: str, progress: float) -> float:  # noqa: D102
        if group == PROJECTOR:
            return 1.0
        return 0.0 if progress < self.warmup_language else self.language_rate

    def place(self, device: torch.device) -> None:  # noqa: D102
        self._whole[0].model.vision_tower.to(device)

    def forward(self, batch: Packed, progress: float) -> dict[str, Tensor]:
        """The loss, and the share of questions that are answered with exact match."""
        logits = answer_logits(self._whole[0], batch).float()
        return {"loss": F.cross_entropy(logits, batch.target), "exact": exact(logits, batch).mean()}


def exact(logits: Tensor, batch: Packed) -> Tensor:
    """For each question 1 if its greedy answer is the right one, else 0: every token is the most likely one."""
    wrong = (logits.detach().argmax(-1) != batch.target).float()
    count = int(batch.question[-1]) + 1
    return (wrong.new_zeros(count).index_add_(0, batch.question, wrong) == 0).float()


def train_vlm(
    model: LlavaForConditionalGeneration,
    processor: Any,
    dataset: AskedImages,
    config: TrainingConfig,
    out: Path,
    *,
    align: int = 0,
    fresh: bool = True,
    warmup_language: float = 0.1,
    language_rate: float = 0.3,
    resume: bool = False,
) -> TrainingResult:
    """Train a vision-language model and save it in ``out`` as transformers does, with its processor.

    Args:
        model: a LLaVA; `new_vlm` makes one. Trained in place.
        processor: the processor that is saved beside it.
        dataset: images with questions.
        config: settings of the loop.
        out: folder for the model, checkpoints and metrics.
        align: by how many images with objects the projector is aligned before the first step; see
            `quickmerge.training.align`. 0 leaves it as it is.
        fresh: whether the projector is as `new_vlm` drew it; False for one that was trained before.
        warmup_language: see `Answer`.
        language_rate: see `Answer`.
        resume: go on from the newest checkpoint.

    Raises:
        QuickmergeError, ValueError: for anything that does not fit; see `quickmerge.training.train`.
    """
    align = whole_number("align", align, 0)
    fingerprint = {
        "model": model_hash(model), "align": align, "warmup_language": warmup_language, "language_rate": language_rate,
    }  # fmt: skip
    with scaled_inputs(model, dataset, fresh=fresh):
        if align and not resume:  # a checkpoint holds what came of it
            with share_shown("aligning the projector") as tell:
                align_projector(model, dataset, processor.tokenizer, pictures=align, seed=config.seed, progress=tell)
        objective = Answer(model, warmup_language=warmup_language, language_rate=language_rate)
        result = train(
            objective, dataset, config, out, collate=pack, resume=resume, fingerprint=with_data(fingerprint, dataset)
        )
    if result.finished and PartialState().is_main_process:
        with sole_writer(Path(out)):
            save_model(Path(out), model.eval(), processor)
    return result


def check_vlm(model: object) -> None:
    """Raise UnsupportedModelError unless ``model`` is a LLaVA."""
    if not isinstance(model, LlavaForConditionalGeneration):
        raise UnsupportedModelError(
            f"model must be a LlavaForConditionalGeneration such as new_vlm makes, got a {type(model).__name__}"
        )


class _Columns(nn.Module):
    """A matrix ``(D, F)`` whose columns are those of the parameter times ``scale (F,)``."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale

    def right_inverse(self, matrix: Tensor) -> Tensor:
        return matrix / self.scale


@contextmanager
def scaled_inputs(model: LlavaForConditionalGeneration, dataset: AskedImages, *, fresh: bool = False) -> Iterator[None]:
    """Let the projector learn as if each of the tower's features had a deviation of 1.

    The residual stream of a vision transformer grows tenfold from its low blocks to its high ones. AdamW takes steps
    of one size for all weights, so that what colours and edges are told by would be learnt ten times later. The
    matrix that is trained is W' in W = W' / deviation; on leaving, W stands in its place.

    Args:
        model: whose projector it is.
        dataset: images to measure the deviations on.
        fresh: True for a projector just drawn at random: what was drawn becomes W', and the mean of the features is
            taken out. False leaves unchanged what the projector computes.
    """
    linear = model.model.multi_modal_projector.linear_1
    mean, deviation = _spread(model, dataset)
    if fresh:
        with torch.no_grad():
            linear.weight /= deviation
            linear.bias -= linear.weight @ mean
    parametrize.register_parametrization(linear, "weight", _Columns(1 / deviation))
    try:
        yield
    finally:
        parametrize.remove_parametrizations(linear, "weight")


@torch.no_grad()
def _spread(model: LlavaForConditionalGeneration, dataset: AskedImages) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``(F,)`` of what the projector reads, over patches of up to 64 images."""
    sampled = evenly(range(len(dataset)), SAMPLES)
    features = torch.cat([projector_input(model, dataset.pixels(index)).double() for index in sampled])
    like = model.model.multi_modal_projector.linear_1.weight
    # a feature that never changes teaches nothing, and must not be blown up
    deviation = features.std(0).clamp_min(1e-6 * features.std().clamp_min(1e-12))
    return features.mean(0).to(like), deviation.to(like)


def evaluate_answers(model: LlavaForConditionalGeneration, dataset: AskedImages) -> dict[str, float]:
    """Exact match of a model as it stands: the share of the questions of each kind, and of all (``"all"``).

    The dataset should ask every question of an image (``questions=None``), so that kinds are told by their order.
    """
    right: dict[str, list[float]] = {"all": []}
    with torch.inference_mode():
        for index in range(len(dataset)):
            batch = pack([dataset[index]]).to(model.device)
            for question, one in zip(
                dataset.pictures[index].questions, exact(answer_logits(model, batch), batch).tolist(), strict=True
            ):
                right.setdefault(question.kind, []).append(one)
                right["all"].append(one)
    return {kind: sum(values) / len(values) for kind, values in right.items()}
