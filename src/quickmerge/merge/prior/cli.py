"""``quickmerge train prior``: the autoregressive prior over merged tokens, for a language model or for images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import (
    LAYER,
    MODEL,
    load_model,
    one_sentence,
    parse_keeps,
    parse_layer,
    quiet,
    read_text,
)
from quickmerge.console.training import OUT, Training, tell, trains

if TYPE_CHECKING:
    from quickmerge.datasets import Data
    from quickmerge.training import TrainingConfig

EXAMPLE = "Example: quickmerge train prior --model smollm2-135m --data texts/ --keep 0.1,0.2,0.42 --out runs/prior"


@trains()
def prior(
    data: Annotated[
        list[Path],
        typer.Option("--data", help="Texts, images, videos, folders of them, a dataset."),
    ],
    out: OUT,
    more: Annotated[list[Path] | None, typer.Argument(help="Further paths after --data.", show_default=False)] = None,
    model: MODEL = "smollm2-135m",
    keep: Annotated[str, typer.Option("--keep", help="Shares to train at, with commas.")] = "0.1,0.2,0.42",
    layer: LAYER = None,
    width: Annotated[int, typer.Option("--width", help="Features per slot inside the prior.", hidden=True)] = 256,
    layers: Annotated[int, typer.Option("--layers", help="Transformer blocks of the prior.", hidden=True)] = 2,
    head: Annotated[
        str, typer.Option("--head", help="gaussian, mixture, energy, flow or diffusion.", hidden=True)
    ] = "gaussian",
    directions: Annotated[str, typer.Option("--directions", help="forward or both.", hidden=True)] = "both",
    depths: Annotated[
        str | None,
        typer.Option(
            "--depths", help="Blocks where slots are corrected (8,16), or none. Default: several.", hidden=True
        ),
    ] = None,
    saliency: Annotated[
        bool, typer.Option("--saliency/--no-saliency", help="Learn a term of the saliency.", hidden=True)
    ] = True,
    context: Annotated[int, typer.Option("--context", help="Text: tokens that are merged.")] = 1024,
    target: Annotated[int, typer.Option("--target", help="Text: tokens that are predicted.")] = 192,
    questions: Annotated[float, typer.Option("--questions", help="Text: share of windows that ask (0 to 1).")] = 0.0,
    held_out: Annotated[
        list[Path] | None, typer.Option("--held-out", help="Texts that training must share no passage with.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the weights in float16.", hidden=True)] = False,
    column: Annotated[str | None, typer.Option("--column", help="Column of a dataset on disk.", hidden=True)] = None,
    size: Annotated[int, typer.Option("--size", help="Images and video: side of the square.")] = 128,
    patch: Annotated[int, typer.Option("--patch", help="Images and video: side of a patch.", hidden=True)] = 8,
    frames: Annotated[int, typer.Option("--frames", help="Video: frames per clip.", hidden=True)] = 8,
    *,
    training: Training,
) -> None:
    """Train the prior over merged tokens: of a language model's prompts, or of images or video."""
    quiet()
    from quickmerge.datasets import find_data

    settings = training.config
    keeps = parse_keeps(keep)
    found = find_data([*data, *(more or [])])
    with one_sentence():
        shape = {"width": width, "layers": layers, "head": head, "directions": directions}
        if _is_text(found, column):
            blocks = None if depths is None else [] if depths == "none" else _blocks(depths)
            _train_text(
                found, out, model=model, keeps=keeps, layer=parse_layer(layer), depths=blocks, config=settings,
                resume=training.resume, shape={**shape, "saliency": saliency}, context=context, target=target,
                held_out=[read_text(path) for path in held_out or []], column=column, half=half, questions=questions,
            )  # fmt: skip
        else:
            _train_images(
                found, out, keeps=keeps, config=settings, resume=training.resume, shape=shape, half=half,
                size=size, patch=patch, frames=frames, column=column,
            )  # fmt: skip


def _blocks(text: str) -> list[int]:
    found = parse_layer(text)
    return found if isinstance(found, list) else [] if found is None else [found]


def _is_text(found: Data, column: str | None) -> bool:
    if found.kind == "dataset":
        from quickmerge.datasets import from_disk

        return from_disk(found.files, column).kind == "text"
    return found.kind == "text"


def _train_text(
    found: Data,
    out: Path,
    *,
    model: str,
    keeps: list[float],
    layer: int | list[int] | None,
    depths: list[int] | None,
    config: TrainingConfig,
    resume: bool,
    shape: dict[str, Any],
    context: int,
    target: int,
    held_out: list[str],
    column: str | None,
    half: bool,
    questions: float,
) -> None:
    from quickmerge.datasets import AskedWindows, TextWindows, from_disk
    from quickmerge.merge.prior.train_text import train_prior_text
    from quickmerge.terminal import Terminal

    lm, tokenizer = load_model(model)
    documents = from_disk(found.files, column) if found.kind == "dataset" else found.files
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in held_out]
    say = Terminal(stderr=True)
    with say.status("reading the text"):
        windows = TextWindows(tokenizer, documents, context + target, held_out=ids)
        count = len(windows)
    left = f"; {windows.overlapping} share a passage with a held-out text" if windows.overlapping else ""
    short = f"; {windows.skipped} documents are shorter than that" if windows.skipped else ""
    say.print(f"{count} windows of {context + target} tokens{short}{left}", highlight=False)
    data = AskedWindows(windows, tokenizer, context=context, share=questions) if questions else windows
    result = train_prior_text(
        lm, data, config, out, name=model, keeps=keeps, layer=layer, depths=depths, context=context,
        resume=resume, half=half, **shape,
    )  # fmt: skip
    tell(result, out)


def _train_images(
    found: Data,
    out: Path,
    *,
    keeps: list[float],
    config: TrainingConfig,
    resume: bool,
    shape: dict[str, Any],
    half: bool,
    size: int,
    patch: int,
    frames: int,
    column: str | None,
) -> None:
    from quickmerge.datasets import ImageFolder, VideoClips, from_disk
    from quickmerge.merge.prior.train_patches import train_prior_patches
    from quickmerge.terminal import Terminal

    say = Terminal(stderr=True)
    dataset: ImageFolder | VideoClips
    with say.status("looking at the images"):
        if found.kind == "videos":
            dataset = VideoClips(found.files, size, frames)
        else:
            dataset = ImageFolder(from_disk(found.files, column) if found.kind == "dataset" else found.files, size)
        count = len(dataset)
    say.print(f"{count} {f'clips of {frames} frames' if found.kind == 'videos' else 'images'}", highlight=False)
    result = train_prior_patches(
        dataset, config, out, keeps=keeps, patch=patch, kind="videos" if found.kind == "videos" else "images",
        resume=resume, half=half, **shape,
    )  # fmt: skip
    tell(result, out)
