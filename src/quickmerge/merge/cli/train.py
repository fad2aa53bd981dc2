"""``quickmerge train classifier``: fine-tune a vision transformer on a folder of labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import MODEL, one_sentence, parse_wholes, quiet
from quickmerge.console.training import ALIGN, OUT, Training, tell, trains
from quickmerge.errors import QuickmergeError, clean_name
from quickmerge.terminal import say

if TYPE_CHECKING:
    from quickmerge.datasets.labelled import LabelledImages
    from quickmerge.datasets.questions import AskedImages

CLASSIFIER_EXAMPLE = (
    "Example: quickmerge train classifier --model vit-small-14 --data photos/train --out runs/classifier"
)

DATA = Annotated[Path, typer.Option("--data", help="A folder with a folder of images for each class.")]
TEST = Annotated[Path | None, typer.Option("--test", help="Such a folder to measure the accuracy on.")]
SMOOTHING = Annotated[float, typer.Option("--smoothing", help="Share of the target that all classes get.", hidden=True)]
AUGMENT = Annotated[
    bool, typer.Option("--augment/--no-augment", help="Cut and mirror the images at random.", hidden=True)
]


@trains(batch=16)
def classifier(
    data: DATA,
    out: OUT,
    model: Annotated[
        str, typer.Option("--model", help="vit-small-14, a folder, or a Hugging Face id.")
    ] = "vit-small-14",
    test: TEST = None,
    backbone_rate: Annotated[
        float,
        typer.Option("--backbone-rate", help="The backbone's rate as a share of the others'; 0: it stays."),
    ] = 0.1,
    smoothing: SMOOTHING = 0.1,
    augment: AUGMENT = True,
    *,
    training: Training,
) -> None:
    """Fine-tune a vision transformer to classify images; what it writes is an ordinary transformers folder."""
    quiet()
    import torch

    from quickmerge.merge.train.classify import new_classifier, train_classifier

    settings = training.config
    classes, images = labelled(data)
    backbone, processor = load_backbone(model)
    with one_sentence():
        torch.manual_seed(settings.seed)
        network = new_classifier(backbone, classes)
        dataset = pictures(images, classes, processor, augment=augment)
        held_out = held_out_images(test, classes, processor)
        say(f"{len(dataset)} images of {len(classes)} classes")
        result = train_classifier(
            network,
            processor,
            dataset,
            settings,
            out,
            smoothing=smoothing,
            backbone_rate=backbone_rate,
            resume=training.resume,
        )
        tell(result, out)
        if held_out is not None and result.finished:
            measure("accuracy", network, held_out)


# What `quickmerge train dynamicvit` shares --------------------------------------------------------------------------


def labelled(folder: Path) -> tuple[list[str], list[Any]]:
    """The classes of a folder, sorted, and its labelled images."""
    from quickmerge.datasets.labelled import read_labelled

    images = read_labelled(folder)
    return sorted({image.label for image in images}), images


def pictures(images: list[Any], classes: list[str], processor: Any, *, augment: bool) -> LabelledImages:
    """A dataset of labelled images as a model wants to be shown them."""
    from quickmerge.datasets.labelled import LabelledImages, PixelFormat

    return LabelledImages(images, classes, PixelFormat.of(processor), augment=augment)


def held_out_images(folder: Path | None, classes: list[str], processor: Any) -> LabelledImages | None:
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


def measure(what: str, model: Any, dataset: LabelledImages) -> float:
    """Print the accuracy of a model as it stands."""
    from quickmerge.merge.train.classify import evaluate
    from quickmerge.terminal import Terminal

    with Terminal(stderr=True).status(f"measuring the {what} on {len(dataset)} images"):
        share = evaluate(model.eval(), dataset)
    print(f"{what} on {len(dataset)} images: {share:.4f}")
    return share


def check_labels(classes: list[str], known: list[str], data: Path) -> None:
    """Raise QuickmergeError unless a classifier knows every class of some images."""
    strange = [label for label in classes if label not in known]
    if strange:
        some = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise QuickmergeError(
            f"--data must hold classes that the model knows ({some}), got {', '.join(map(repr, strange[:4]))} in {data}"
        )


# ``quickmerge train dynamicvit``: predictors that learn which patches a classifier can do without.


DYNAMICVIT_EXAMPLE = (
    "Example: quickmerge train dynamicvit --model runs/classifier --data photos/train --keep 0.7 --out runs/dvit"
)


@trains(batch=16)
def dynamicvit(
    model: Annotated[str, typer.Option("--model", help="A classifier: a folder or a Hugging Face id.")],
    data: DATA,
    out: OUT,
    keep: Annotated[
        float, typer.Option("--keep", help="Share of the patches that each stage leaves, in (0, 1).")
    ] = 0.7,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Blocks before which patches drop out. Default: 3,6,9 of 12.")
    ] = None,
    test: TEST = None,
    backbone_rate: Annotated[
        float, typer.Option("--backbone-rate", help="The classifier's rate as a share of the predictors'; 0: it stays.")
    ] = 0.01,
    frozen: Annotated[
        float,
        typer.Option("--frozen", help="Share of the training in which the classifier stays.", hidden=True),
    ] = 1 / 6,
    ratio_weight: Annotated[
        float, typer.Option("--ratio-weight", help="Weight of the kept shares' loss.", hidden=True)
    ] = 2.0,
    distill_weight: Annotated[
        float, typer.Option("--distill-weight", help="Weight of each distance from the teacher.", hidden=True)
    ] = 0.5,
    smoothing: SMOOTHING = 0.1,
    augment: AUGMENT = True,
    *,
    training: Training,
) -> None:
    """Train DynamicViT on a classifier, which it is distilled from and fine-tuned with."""
    quiet()
    from quickmerge.merge.train.classify import check_classifier
    from quickmerge.merge.train.dynamicvit import DynamicViTSettings, train_dynamicvit
    from quickmerge.models import load_vision

    options = training.config
    depths = None if layers is None else parse_wholes("--layers", layers, "whole numbers with commas (3,6,9)")
    with one_sentence():
        settings = DynamicViTSettings(
            ratio=ratio_weight, logits=distill_weight, features=distill_weight, smoothing=smoothing,
            backbone_rate=backbone_rate, frozen=frozen,
        )  # fmt: skip
    classes, images = labelled(data)
    network, processor = load_vision(model, task="classify")
    check_classifier(network)
    known = [str(network.config.id2label[index]) for index in range(network.config.num_labels)]
    check_labels(classes, known, data)
    with one_sentence():
        dataset = pictures(images, known, processor, augment=augment)
        held_out = held_out_images(test, known, processor)
        say(f"{len(dataset)} images of {len(classes)} classes")
        if held_out is not None:
            measure("accuracy with every patch", network, held_out)
        result = train_dynamicvit(
            network, processor, dataset, options, out, name=model, keep=keep, layers=depths, settings=settings,
            resume=training.resume,
        )  # fmt: skip
        tell(result, out)
        if held_out is not None and result.finished:
            _measure_reduced(network, out, held_out)


def _measure_reduced(network: Any, out: Path, held_out: Any) -> None:
    from quickmerge.merge.attach import reduce
    from quickmerge.merge.reducers.dynamicvit import DynamicViT

    method = DynamicViT.from_pretrained(out)
    with reduce(network.eval(), method) as run:
        measure(f"accuracy at keep {method.keep:g}", network, held_out)
        stats = run.summary()
    print(f"tokens: {stats.tokens_kept:.1f} of {stats.tokens_in} a block")


# ``quickmerge train vlm``: teach a language model to see, with a vision transformer, on questions about images.


VLM_RATE = 3e-4
"""At 1e-3 the projector's outputs grow twentyfold within 200 steps, and all patches come to look alike."""
VLM_EXAMPLE = "Example: quickmerge train vlm --data scenes/train,photos/train --test scenes/test --out runs/vlm"

VLM_DATA = Annotated[
    str, typer.Option("--data", help="Folders with images and annotations.jsonl, commas between them.")
]
VLM_TEST = Annotated[str | None, typer.Option("--test", help="Such folders to measure the answers on.")]
VISION = Annotated[str, typer.Option("--vision", help="vit-small-14, a folder, or a Hugging Face id.")]
LAYERS = Annotated[
    str, typer.Option("--layers", help="Depths of the vision transformer whose features the model gets, together.")
]
QUESTIONS = Annotated[int, typer.Option("--questions", help="At most so many of an image in a step.", hidden=True)]
WARMUP_LANGUAGE = Annotated[
    float,
    typer.Option("--warmup-language", help="Share of the training in which the language model stays.", hidden=True),
]
LANGUAGE_RATE = Annotated[
    float, typer.Option("--language-rate", help="The language model's rate as a share of the projector's.", hidden=True)
]


@trains(learning_rate=VLM_RATE)
def vlm(
    data: VLM_DATA,
    out: OUT,
    model: MODEL = "smollm2-135m",
    vision: VISION = "vit-small-14",
    layers: LAYERS = "4,8,11",
    test: VLM_TEST = None,
    questions: QUESTIONS = 10,
    align: ALIGN = 0,
    warmup_language: WARMUP_LANGUAGE = 0.1,
    language_rate: LANGUAGE_RATE = 0.3,
    *,
    training: Training,
) -> None:
    """Train a LLaVA of a vision transformer and a language model; it writes an ordinary transformers folder."""
    quiet()
    import torch

    from quickmerge.merge.train.answers import train_vlm
    from quickmerge.merge.train.new_vlm import new_vlm
    from quickmerge.models import load, load_vision

    settings = training.config
    depths = parse_wholes("--layers", layers)
    pictures, held_out = _pictures("--data", data), _pictures("--test", test)
    tower, image_processor = load_vision(vision)
    language, tokenizer = load(model)
    with one_sentence():
        torch.manual_seed(settings.seed)
        made, processor = new_vlm(tower, language, tokenizer, image_processor, layers=depths)
        dataset = _asked(pictures, made, processor, questions)
        asked = _asked(held_out, made, processor, None) if held_out else None
        say(f"{len(dataset)} images with {sum(len(each.questions) for each in dataset.pictures)} questions")
        result = train_vlm(
            made, processor, dataset, settings, out, align=align, warmup_language=warmup_language,
            language_rate=language_rate, resume=training.resume,
        )  # fmt: skip
        tell(result, out)
        if asked is not None and result.finished:
            _measure(made, asked)


def _pictures(option: str, folders: str | None) -> list[Any]:
    from quickmerge.datasets.annotated import read_annotated

    if folders is None:
        return []
    names = [name.strip() for name in folders.split(",")]
    if not all(names):
        raise QuickmergeError(f"{option} must be a folder, or several with commas between them, got {folders!r}")
    return [picture for name in names for picture in read_annotated(Path(name).expanduser())]


def _asked(pictures: list[Any], model: Any, processor: Any, questions: int | None) -> AskedImages:
    from quickmerge.datasets.labelled import PixelFormat
    from quickmerge.datasets.questions import AskedImages

    return AskedImages(
        pictures, processor.tokenizer, PixelFormat.of(processor.image_processor), questions=questions,
        image_tokens=model.config.image_seq_length, image_token=model.config.image_token_id,
    )  # fmt: skip


def _measure(model: Any, dataset: AskedImages) -> None:
    from quickmerge.merge.train.answers import evaluate_answers
    from quickmerge.terminal import Terminal

    with Terminal(stderr=True).status(f"asking about {len(dataset)} images"):
        shares = evaluate_answers(model.eval(), dataset)
    told = ", ".join(f"{kind} {share:.3f}" for kind, share in shares.items() if kind != "all")
    print(f"answered with exact match on {len(dataset)} images: {shares['all']:.4f} ({clean_name(told)})")
