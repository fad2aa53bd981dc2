"""``quickmerge train vlm``: teach a language model to see, with a vision transformer, on questions about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.cli.common import MODEL, one_sentence, quiet
from quickmerge.cli.train_classifier import CONFIG, MINUTES, OUT, PRECISION, RESUME, SAVE_EVERY, SEED, say, tell
from quickmerge.cli.train_prior import training_config
from quickmerge.errors import QuickmergeError
from quickmerge.printable import clean_name

if TYPE_CHECKING:
    from quickmerge.training.questions import AskedPictures

RATE = 3e-4
"""At 1e-3 the projector's outputs grow twentyfold within 200 steps, and all patches come to look alike."""
EXAMPLE = "Example: quickmerge train vlm --data scenes/train,photos/train --test scenes/test --out runs/vlm"

DATA = Annotated[str, typer.Option("--data", help="Folders with pictures and annotations.jsonl, commas between them.")]
TEST = Annotated[str | None, typer.Option("--test", help="Such folders to measure the answers on.")]
VISION = Annotated[str, typer.Option("--vision", help="vit-small-14, a folder, or a Hugging Face id.")]
LAYERS = Annotated[
    str, typer.Option("--layers", help="Depths of the vision transformer whose features the model gets, together.")
]
QUESTIONS = Annotated[int, typer.Option("--questions", help="At most so many of a picture in a step.")]
ALIGN = Annotated[
    int,
    typer.Option("--align", help="First fit the projector to the words that stand in boxes, by so many pictures."),
]
WARMUP_LANGUAGE = Annotated[
    float, typer.Option("--warmup-language", help="Share of the training in which the language model stays.")
]
LANGUAGE_RATE = Annotated[
    float, typer.Option("--language-rate", help="The language model's rate as a share of the projector's.")
]


def vlm(
    data: DATA,
    out: OUT,
    model: MODEL = "smollm2-135m",
    vision: VISION = "vit-small-14",
    layers: LAYERS = "4,8,11",
    test: TEST = None,
    resume: RESUME = False,
    config: CONFIG = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps. Default: 1000.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Pictures per step and process. Default: 4.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help=f"Default: {RATE}.")] = None,
    questions: QUESTIONS = 10,
    align: ALIGN = 0,
    warmup_language: WARMUP_LANGUAGE = 0.1,
    language_rate: LANGUAGE_RATE = 0.3,
    precision: PRECISION = None,
    seed: SEED = None,
    save_every: SAVE_EVERY = None,
    max_minutes: MINUTES = None,
) -> None:
    """Train a LLaVA of a vision transformer and a language model; it writes an ordinary transformers folder."""
    quiet()
    import torch

    from quickmerge.models import load, load_vision
    from quickmerge.training.answers import train_vlm
    from quickmerge.training.new_vlm import new_vlm

    if config is None and learning_rate is None:
        learning_rate = RATE
    settings = training_config(
        config, steps=steps, batch=batch, learning_rate=learning_rate, precision=precision, seed=seed,
        save_every=save_every, max_minutes=max_minutes,
    )  # fmt: skip
    depths = _depths(layers)
    pictures, held_out = _pictures("--data", data), _pictures("--test", test)
    tower, image_processor = load_vision(vision)
    language, tokenizer = load(model)
    with one_sentence():
        torch.manual_seed(settings.seed)
        made, processor = new_vlm(tower, language, tokenizer, image_processor, layers=depths)
        dataset = _asked(pictures, made, processor, questions)
        asked = _asked(held_out, made, processor, None) if held_out else None
        say(f"{len(dataset)} pictures with {sum(len(each.questions) for each in dataset.pictures)} questions")
        result = train_vlm(
            made, processor, dataset, settings, out, align=align, warmup_language=warmup_language,
            language_rate=language_rate, resume=resume,
        )  # fmt: skip
        tell(result, out)
        if asked is not None and result.finished:
            _measure(made, asked)


def _depths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise QuickmergeError(f"--layers must be whole numbers with commas (4,8,11), got {text!r}") from None


def _pictures(option: str, folders: str | None) -> list[Any]:
    from quickmerge.training.data.annotated import read_annotated

    if folders is None:
        return []
    names = [name.strip() for name in folders.split(",")]
    if not all(names):
        raise QuickmergeError(f"{option} must be a folder, or several with commas between them, got {folders!r}")
    return [picture for name in names for picture in read_annotated(Path(name).expanduser())]


def _asked(pictures: list[Any], model: Any, processor: Any, questions: int | None) -> AskedPictures:
    from quickmerge.training.data.labelled import PixelFormat
    from quickmerge.training.questions import AskedPictures

    return AskedPictures(
        pictures, processor.tokenizer, PixelFormat.of(processor.image_processor), questions=questions,
        image_tokens=model.config.image_seq_length, image_token=model.config.image_token_id,
    )  # fmt: skip


def _measure(model: Any, dataset: AskedPictures) -> None:
    from quickmerge.terminal import Terminal
    from quickmerge.training.answers import evaluate_answers

    with Terminal(stderr=True).status(f"asking about {len(dataset)} pictures"):
        shares = evaluate_answers(model.eval(), dataset)
    told = ", ".join(f"{kind} {share:.3f}" for kind, share in shares.items() if kind != "all")
    print(f"answered to the letter on {len(dataset)} pictures: {shares['all']:.4f} ({clean_name(told)})")
