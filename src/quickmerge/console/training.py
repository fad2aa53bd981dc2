"""What the train commands share: their options, the settings these make, and how a run's end is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import one_sentence
from quickmerge.errors import clean_name

if TYPE_CHECKING:
    from quickmerge.training import TrainingConfig, TrainingResult

BATCH = 16

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
ALIGN = Annotated[
    int,
    typer.Option("--align", help="First fit the projector to the words that stand in boxes, by so many pictures."),
]
USUAL_STEPS = 1000


def training_config(path: Path | None, **options: Any) -> TrainingConfig:
    """Settings from a file, if there is one, with the options that were given before it."""
    from quickmerge.training import TrainingConfig

    given = {name: value for name, value in options.items() if value is not None}
    with one_sentence():
        if path is not None:
            return replace(TrainingConfig.from_file(path), **given)
        steps = given.get("steps", USUAL_STEPS)
        usual = {"steps": steps, "batch": 4, "learning_rate": 1e-3, "warmup": min(30, steps), "save_every": 100}
        return TrainingConfig(**{**usual, **given})


def vision_config(path: Path | None, **options: Any) -> TrainingConfig:
    """Training settings, with a batch of images where neither the file nor an option says another."""
    if path is None and options.get("batch") is None:
        options["batch"] = BATCH
    return training_config(path, **options)


def tell(result: TrainingResult, out: Path) -> None:
    """Say what a run has left."""
    told = "wrote" if result.finished else f"stopped after step {result.steps}; go on with --resume:"
    print(f"{told} {clean_name(out)}")
