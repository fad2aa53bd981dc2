"""``quickmerge train recognizer``: teach the first blocks of a language model to name what is in an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import MODEL, load_model, one_sentence, parse_wholes, progress, quiet
from quickmerge.console.training import ALIGN, OUT, Training, reads_once, tell, trains
from quickmerge.errors import FetchError, clean_name
from quickmerge.terminal import say

if TYPE_CHECKING:
    from quickmerge.recognition import Recognizer
    from quickmerge.recognition.train import LabelledScenes

EXAMPLE = "Example: quickmerge train recognizer --data scenes/train --test scenes/test --out runs/recognizer"


@trains(batch=16)
def recognizer(
    data: Annotated[str, typer.Option("--data", help="Folders with images and annotations.jsonl, with commas.")],
    out: OUT,
    model: MODEL = "smollm2-135m",
    vision: Annotated[
        str, typer.Option("--vision", help="vit-small-14, a folder, or a Hugging Face id.")
    ] = "vit-small-14",
    test: Annotated[Path | None, typer.Option("--test", help="Such a folder to measure the recogniser on.")] = None,
    blocks: Annotated[int, typer.Option("--blocks", help="First blocks of the language model that are used.")] = 6,
    layers: Annotated[
        str | None,
        typer.Option(
            "--vision-layers",
            help="Hidden states of the encoder that are read (4,8,11). Default: the last.",
            hidden=True,
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option("--objective", help="paper: all first tokens at one row; reference: as published.", hidden=True),
    ] = "paper",
    mask: Annotated[
        str, typer.Option("--mask", help="What labels see: independent, prefix or causal.", hidden=True)
    ] = "independent",
    align: ALIGN = 0,
    prompt: Annotated[
        str, typer.Option("--prompt", help="What stands between the image and a label.", hidden=True)
    ] = "The objects in the image are",
    features: Annotated[
        bool | None,
        typer.Option(
            "--keep-features/--read-again",
            help="Keep the features in memory or read in every step. Default: keep what fits.",
            hidden=True,
        ),
    ] = None,
    *,
    training: Training,
) -> None:
    """Train a recogniser: it names the objects in an image in free words, most probable first."""
    quiet()
    import torch

    from quickmerge.datasets.labelled import PixelFormat
    from quickmerge.models import load_vision
    from quickmerge.recognition import Recognizer
    from quickmerge.recognition.train import train_recognizer

    settings = training.config
    depths = None if layers is None else parse_wholes("--vision-layers", layers)
    folders = [Path(part) for part in data.split(",")]
    scenes, held_out = annotated(folders), None if test is None else annotated([test])
    encoder, processor = load_vision(vision)
    language, tokenizer = load_model(model)
    with one_sentence():
        torch.manual_seed(settings.seed)
        form = PixelFormat.of(processor)
        network = Recognizer.new(
            encoder, language, tokenizer, blocks=blocks, layers=depths, mask=mask, prompt=prompt,
            image_size=min(form.height, form.width), mean=form.mean, std=form.std,
        )  # fmt: skip
        del encoder, language  # the recogniser has copies of what it needs
        dataset = scenes_of(scenes, network)
        left = f"; {dataset.unlabelled} images without labels are left out" if dataset.unlabelled else ""
        kinds = len({label for labels in dataset.labels for label in labels})
        say(f"{len(dataset)} images with {kinds} different labels{left}")
        shown = settings.steps * settings.batch * settings.accumulate
        keep_features(network, dataset, features, shown=shown, half=settings.precision == "bf16")
        result = train_recognizer(
            network, dataset, settings, out, objective=objective, align=align, resume=training.resume
        )
        tell(result, out)
        if held_out is not None and result.finished:
            measure(network, scenes_of(held_out, network))


def annotated(folders: Sequence[Path]) -> list[Any]:
    """The annotated images of some folders, one after the other."""
    from quickmerge.datasets.annotated import read_annotated

    return [scene for folder in folders for scene in read_annotated(folder)]


def scenes_of(scenes: Sequence[Any], network: Recognizer) -> LabelledScenes:
    """Images as a recogniser wants to be shown them."""
    from quickmerge.recognition.train import LabelledScenes, pixel_format

    return LabelledScenes(scenes, pixel_format(network))


def keep_features(network: Recognizer, dataset: LabelledScenes, wanted: bool | None, *, shown: int, half: bool) -> None:
    """Read the images once and keep their features, where that is asked for, or fits and saves something.

    Args:
        network: whose frozen encoder reads.
        dataset: the images; it then gives out features.
        wanted: True: in any case; False: not at all; None: where they fit into memory and images come twice.
        shown: images that the training will look at in all.
        half: let the encoder compute in bfloat16.

    Raises:
        QuickmergeError: it is asked for, and there is not the memory.
    """
    from quickmerge.recognition.train import feature_bytes, read_features

    if not reads_once(wanted, "images", len(dataset), lambda: feature_bytes(network, dataset), looks=shown):
        return
    with progress() as bar:
        task = bar.add_task("reading the images", total=len(dataset))
        dataset.keep(read_features(network, dataset, half=half, advance=lambda count: bar.update(task, advance=count)))


def measure(network: Recognizer, dataset: LabelledScenes, *, top: int = 10, batch: int = 8) -> dict[str, Any]:
    """Print how good the labels are that a recogniser gives to images that it was not trained on."""
    import torch

    from quickmerge.recognition.metric import scores
    from quickmerge.recognition.sentence import SentenceEncoder

    given: list[list[str]] = []
    with progress() as bar:
        task = bar.add_task("naming what is in the test images", total=len(dataset))
        for start in range(0, len(dataset), batch):
            rows = range(start, min(start + batch, len(dataset)))
            pixels = torch.stack([dataset.pixels(index) for index in rows])
            guesses = network.eval().recognize(pixels, top=top)
            given += [[guess.label for guess in row] for row in guesses]
            bar.update(task, advance=len(rows))
    encode = None
    try:
        encode = SentenceEncoder.load()
    except FetchError as error:
        say(f"labels can't be compared by meaning: {error}")
    found = scores(dataset.labels, given, encode)
    at, own = found["exact_at"], found["exact_at_own"]
    print(f"exact recall on {len(dataset)} images: {at['5']['recall']:.3f} at 5, {at['10']['recall']:.3f} at 10, "
          f"{own['recall']:.3f} at as many as there are (precision {own['precision']:.3f})")  # fmt: skip
    if encode is not None:
        for name, key in (("by meaning", "meaning"), ("its floor, references of other images", "floor")):
            if (value := found[key]) is not None:
                print(f"{clean_name(name)}: R {value['recall']:.3f}, P {value['precision']:.3f}, F1 {value['f1']:.3f}")
    return found
