"""``quickmerge train dynamicvit``: predictors that learn which patches a classifier can do without."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quickmerge.cli.common import one_sentence, quiet
from quickmerge.cli.train_classifier import (
    AUGMENT,
    BATCHES,
    CONFIG,
    DATA,
    MINUTES,
    OUT,
    PRECISION,
    RATE,
    RESUME,
    SAVE_EVERY,
    SEED,
    SMOOTHING,
    STEPS,
    TEST,
    check_labels,
    held_out_pictures,
    labelled,
    measure,
    pictures,
    say,
    tell,
    vision_config,
)
from quickmerge.errors import QuickmergeError

EXAMPLE = "Example: quickmerge train dynamicvit --model runs/classifier --data photos/train --keep 0.7 --out runs/dvit"


def dynamicvit(
    model: Annotated[str, typer.Option("--model", help="An image classifier: a folder or a Hugging Face id.")],
    data: DATA,
    out: OUT,
    keep: Annotated[
        float, typer.Option("--keep", help="Share of the patches that each stage leaves, in (0, 1).")
    ] = 0.7,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Blocks before which patches drop out. Default: 3,6,9 of 12.")
    ] = None,
    test: TEST = None,
    resume: RESUME = False,
    config: CONFIG = None,
    steps: STEPS = None,
    batch: BATCHES = None,
    learning_rate: RATE = None,
    backbone_rate: Annotated[
        float, typer.Option("--backbone-rate", help="The classifier's rate as a share of the predictors'; 0: it stays.")
    ] = 0.01,
    frozen: Annotated[
        float, typer.Option("--frozen", help="Share of the training in which the classifier stays as it is at first.")
    ] = 1 / 6,
    ratio_weight: Annotated[float, typer.Option("--ratio-weight", help="Weight of the kept shares' loss.")] = 2.0,
    distill_weight: Annotated[
        float, typer.Option("--distill-weight", help="Weight of each distance from the teacher.")
    ] = 0.5,
    precision: PRECISION = None,
    seed: SEED = None,
    save_every: SAVE_EVERY = None,
    max_minutes: MINUTES = None,
    smoothing: SMOOTHING = 0.1,
    augment: AUGMENT = True,
) -> None:
    """Train DynamicViT on a classifier, which it is distilled from and fine-tuned with."""
    quiet()
    from quickmerge.models import load_vision
    from quickmerge.training.classify import check_classifier
    from quickmerge.training.dynamicvit import DynamicViTSettings, train_dynamicvit

    options = vision_config(
        config, steps=steps, batch=batch, learning_rate=learning_rate, precision=precision, seed=seed,
        save_every=save_every, max_minutes=max_minutes,
    )  # fmt: skip
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
        held_out = held_out_pictures(test, known, processor)
        say(f"{len(dataset)} images of {len(classes)} classes")
        if held_out is not None:
            measure("accuracy with every patch", network, held_out)
        result = train_dynamicvit(
            network, processor, dataset, options, out, name=model, keep=keep, layers=_blocks(layers), settings=settings,
            resume=resume,
        )  # fmt: skip
        tell(result, out)
        if held_out is not None and result.finished:
            _measure_reduced(network, out, held_out)


def _blocks(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise QuickmergeError(f"--layers must be whole numbers with commas (3,6,9), got {text!r}") from None


def _measure_reduced(network: Any, out: Path, held_out: Any) -> None:
    from quickmerge.hosts import reduce
    from quickmerge.reducers.dynamicvit import DynamicViT

    method = DynamicViT.from_pretrained(out)
    with reduce(network.eval(), method) as run:
        measure(f"accuracy at keep {method.keep:g}", network, held_out)
        stats = run.summary()
    print(f"tokens: {stats.tokens_kept:.1f} of {stats.tokens_in} a block")
