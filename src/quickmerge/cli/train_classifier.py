"""``quickmerge train classifier``: fine-tune a vision transformer on a folder of labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.cli.common import one_sentence, quiet
from quickmerge.cli.train_prior import training_config
from quickmerge.errors import QuickmergeError
from quickmerge.printable import clean_name

if TYPE_CHECKING:
    from quickmerge.training import TrainingConfig, TrainingResult
    from quickmerge.training.data.labelled import LabelledPictures

EXAMPLE = "Example: quickmerge train classifier --model vit-small-14 --data photos/train --out runs/classifier"
BATCH = 16

DATA = Annotated[Path, typer.Option("--data", help="A folder with a folder of images for each class.")]
TEST = Annotated[Path | None, typer.Option("--test", help="Such a folder to measure the accuracy on.")]
OUT = Annotated[Path, typer.Option("--out", help="Folder for the result, its checkpoints and metrics.")]
RESUME = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")]
CONFIG = Annotated[
    Path | None, typer.Option("--config", help="Training settings, .toml or .json; options go before it.")
]
STEPS = Annotated[int | None, typer.Option("--steps", help="Optimizer steps. Default: 1000.")]
BATCHES = Annotated[int | None, typer.Option("--batch", help=f"Images per step and process. Default: {BATCH}.")]
RATE = Annotated[float | None, typer.Option("--learning-rate", help="The highest. Default: 0.001.")]
PRECISION = Annotated[str | None, typer.Option("--precision", help="no, bf16 or fp16. Default: no.")]
SEED = Annotated[int | None, typer.Option("--seed", help="Default: 0.")]
SAVE_EVERY = Annotated[int | None, typer.Option("--save-every", help="Steps between checkpoints.")]
MINUTES = Annotated[float | None, typer.Option("--max-minutes", help="Stop cleanly after so long.")]
SMOOTHING = Annotated[float, typer.Option("--smoothing", help="Share of the target that all classes get.")]
AUGMENT = Annotated[bool, typer.Option("--augment/--no-augment", help="Cut and mirror the images at random.")]


def classifier(
    data: DATA,
    out: OUT,
    model: Annotated[
        str, typer.Option("--model", help="vit-small-14, a folder, or a Hugging Face id of a vision transformer.")
    ] = "vit-small-14",
    test: TEST = None,
    resume: RESUME = False,
    config: CONFIG = None,
    steps: STEPS = None,
    batch: BATCHES = None,
    learning_rate: RATE = None,
    backbone_rate: Annotated[
        float, typer.Option("--backbone-rate", help="The transformer's rate as a share of the head's; 0: head alone.")
    ] = 0.1,
    precision: PRECISION = None,
    seed: SEED = None,
    save_every: SAVE_EVERY = None,
    max_minutes: MINUTES = None,
    smoothing: SMOOTHING = 0.1,
    augment: AUGMENT = True,
) -> None:
    """Fine-tune a vision transformer to classify images; what it writes is an ordinary transformers folder."""
    quiet()
    import torch

    from quickmerge.training.classify import new_classifier, train_classifier

    settings = vision_config(
        config, steps=steps, batch=batch, learning_rate=learning_rate, precision=precision, seed=seed,
        save_every=save_every, max_minutes=max_minutes,
    )  # fmt: skip
    classes, images = labelled(data)
    backbone, processor = load_backbone(model)
    with one_sentence():
        torch.manual_seed(settings.seed)
        network = new_classifier(backbone, classes)
        dataset = pictures(images, classes, processor, augment=augment)
        held_out = held_out_pictures(test, classes, processor)
        say(f"{len(dataset)} images of {len(classes)} classes")
        result = train_classifier(
            network, processor, dataset, settings, out, smoothing=smoothing, backbone_rate=backbone_rate, resume=resume
        )
        tell(result, out)
        if held_out is not None and result.finished:
            measure("accuracy", network, held_out)


# What `quickmerge train dynamicvit` shares --------------------------------------------------------------------------


def vision_config(path: Path | None, **options: Any) -> TrainingConfig:
    """Training settings, with a batch of images where neither the file nor an option says another."""
    if path is None and options.get("batch") is None:
        options["batch"] = BATCH
    return training_config(path, **options)


def labelled(folder: Path) -> tuple[list[str], list[Any]]:
    """The classes of a folder, sorted, and its labelled images."""
    from quickmerge.evaluation.images import read_labelled

    images = read_labelled(folder)
    return sorted({image.label for image in images}), images


def pictures(images: list[Any], classes: list[str], processor: Any, *, augment: bool) -> LabelledPictures:
    """A dataset of labelled images as a model wants to be shown them."""
    from quickmerge.training.data.labelled import LabelledPictures, PixelFormat

    return LabelledPictures(images, classes, PixelFormat.of(processor), augment=augment)


def held_out_pictures(folder: Path | None, classes: list[str], processor: Any) -> LabelledPictures | None:
    """The images to measure on, if there are any."""
    return None if folder is None else pictures(labelled(folder)[1], classes, processor, augment=False)


def load_backbone(name: str) -> tuple[Any, Any]:
    """A vision transformer and its image processor: with its classifier where it was saved as one."""
    from quickmerge.models import load_vision

    model, processor = load_vision(name)
    kinds = [str(kind) for kind in model.config.architectures or []]
    if any("ImageClassification" in kind for kind in kinds):
        return load_vision(name, task="classify")
    return model, processor


def measure(what: str, model: Any, dataset: LabelledPictures) -> float:
    """Print the accuracy of a model as it stands."""
    from quickmerge.terminal import Terminal
    from quickmerge.training.classify import evaluate

    with Terminal(stderr=True).status(f"measuring the {what} on {len(dataset)} images"):
        share = evaluate(model.eval(), dataset)
    print(f"{what} on {len(dataset)} images: {share:.4f}")
    return share


def say(sentence: str) -> None:
    """Print a sentence on stderr."""
    from quickmerge.terminal import Terminal

    Terminal(stderr=True, soft_wrap=True).print(sentence, highlight=False, markup=False)


def tell(result: TrainingResult, out: Path) -> None:
    """Say what a run has left."""
    told = "wrote" if result.finished else f"stopped after step {result.steps}; go on with --resume:"
    print(f"{told} {clean_name(out)}")


def check_labels(classes: list[str], known: list[str], data: Path) -> None:
    """Raise QuickmergeError unless a classifier knows every class of some images."""
    strange = [label for label in classes if label not in known]
    if strange:
        some = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise QuickmergeError(
            f"--data must hold classes that the model knows ({some}), got {', '.join(map(repr, strange[:4]))} in {data}"
        )
